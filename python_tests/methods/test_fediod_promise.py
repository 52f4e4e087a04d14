"""What FedIOD says of its privacy: every release that happens is covered or listed, and nothing else is."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from fedkern.methods import fediod_private as privacy
from fedkern.methods import fediod_promise as promise
from fedkern.methods.base import Federation
from fedkern.methods.fediod_options import IODOptions, settle

THROUGH_D = "the generator's gradients through the discriminators"
THROUGH_T = "the generator's gradients through the teachers"
OWN_T = "a client's own gradients for the generator through its teacher"
STUDENT = "the teachers' answers that the student learns from"
MIXED = "the teachers' answers (which change the student and other clients' gradients)"
ADVERSARIAL = (
    "the teachers' answers (which change the student, other clients' gradients and the adversarial term's gradient for "
    "the generator)"
)
COUNTS = "the clients' class counts"
CONFIDENCE = "the discriminators' confidence in every image"
RECORDS = "the losses and accuracies that the run's records tell of a client"
SILENT = {"class_weights": "uniform"}

needs_accounting = pytest.mark.skipif(
    find_spec("dp_accounting") is None,
    reason="dp-accounting is not installed (pip install 'fedkern[privacy]')",
)


def options(**settings):
    return settle(IODOptions(batch=8, iterations=5, **settings))


@pytest.mark.parametrize(
    ("settings", "covers", "leaves"),
    [
        ({"sigma_d": 40.0, "shards": 50}, [THROUGH_D], [THROUGH_T, MIXED, COUNTS]),
        ({"epsilon": 5.0, "histogram_noise": 3.0}, [THROUGH_D, COUNTS], [THROUGH_T, MIXED]),
        ({"sigma_d": 40.0, "class_weights": "known"}, [THROUGH_D], [THROUGH_T, MIXED, "which classes a client has"]),
        # A discriminator's confidence is withheld, told, or not used at all.
        ({"sigma_d": 1.0, "scores": "release", **SILENT}, [THROUGH_D], [THROUGH_T, MIXED, CONFIDENCE]),
        ({"sigma_d": 1.0, "scores": "release", "disc_weight": False, **SILENT}, [THROUGH_D], [THROUGH_T, MIXED]),
        # Noise on the gradients through a client's teacher leaves all else that its logits do.
        ({"sigma_t": 900.0, **SILENT}, [OWN_T], [THROUGH_D, MIXED]),
        ({"sigma_t": 900.0, "epsilon": 9.0, "w_adv": 1.0, **SILENT}, [THROUGH_D, OWN_T], [ADVERSARIAL]),
        ({"sigma_t": 900.0, "epsilon": 9.0, "w_diverse": 0.0, **SILENT}, [THROUGH_D, OWN_T], [STUDENT]),
        # The generator does not ask teachers, or no discriminators.
        ({"sigma_d": 1.0, "w_clear": 0.0, "w_diverse": 0.0, **SILENT}, [THROUGH_D], [STUDENT]),
        ({"sigma_t": 1.0, "w_real": 0.0, **SILENT}, [OWN_T], [MIXED]),
        # Private teachers alone, with counts, and with all that there is.
        ({"teacher_dp": True, **SILENT}, [THROUGH_T, STUDENT], [THROUGH_D, CONFIDENCE]),
        ({"teacher_dp": True, "epsilon": 5.0}, [THROUGH_D, THROUGH_T, STUDENT], [COUNTS]),
        (
            {"teacher_dp": True, "epsilon": 5.0, "w_adv": 1.0, "histogram_noise": 3.0},
            [THROUGH_D, THROUGH_T, STUDENT, COUNTS, "so the released generator and student"], [],
        ),
        # Counts alone.
        ({"histogram_noise": 3.0}, [COUNTS], [THROUGH_D, THROUGH_T, MIXED, CONFIDENCE]),
        ({"histogram_noise": 3.0, "mode": "public"}, [COUNTS], [STUDENT]),
        ({"teacher_dp": True, "mode": "public", **SILENT}, [STUDENT, "so the released student"], []),
    ],
)  # fmt: skip
def test_every_release_is_covered_or_listed(settings, covers, leaves):
    said = promise.guarantee(options(**settings))
    assert said.covers == tuple(covers)
    assert said.leaves == (*leaves, RECORDS)
    assert said.delta == 1e-5


def test_nothing_is_promised_where_nothing_is_private():
    for settings in ({}, {"histogram_noise": 3.0, **SILENT}):  # noise on counts that nobody is told
        assert promise.guarantee(options(**settings)) is None
        server = SimpleNamespace(state={}, warn=None)
        privacy.prepare(server, options(**settings))
        assert server.state == {}


@needs_accounting
@pytest.mark.parametrize(
    ("settings", "covered"),
    [
        ({"sigma_d": 1.0}, THROUGH_D),
        ({"sigma_t": 1.0}, OWN_T),
        ({"histogram_noise": 3.0, "mode": "public"}, COUNTS),
        ({"sigma_d": 1.0, "histogram_noise": 3.0}, f"{THROUGH_D} and {COUNTS}"),
        ({"teacher_dp": True}, None),
    ],
)
def test_the_warning_names_what_is_covered(settings, covered):
    said = {}
    server = SimpleNamespace(state={}, federation=Federation(2, (50, 50), 10), warn=said.__setitem__)
    privacy.prepare(server, options(**settings))
    if covered is None:
        assert said == {}
        return
    assert said["teachers-uncovered"] == (
        f"Epsilon covers {covered}, not the teachers' answers, which the student learns from: teacher_dp=true covers "
        "those too."
    )


def test_confidence_travels_where_nobody_withholds_it():
    assert promise.tells_scores(options())
    assert promise.tells_scores(options(sigma_d=1.0, scores="release"))
    for settings in ({"sigma_d": 1.0}, {"disc_weight": False}, {"mode": "public"}):
        assert not promise.tells_scores(options(**settings))


def test_open_clipping_norms_follow_the_loss():
    assert promise.clip_d(options()) == 0.03
    assert promise.clip_d(options(bce="sum")) == promise.clip_d(options(preset="code")) == 0.3
    assert promise.clip_d(options(clip_d=7.0, preset="code")) == 7.0
