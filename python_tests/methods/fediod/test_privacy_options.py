"""What FedIOD says of its privacy: every release that happens is covered or listed, and nothing else is."""

from types import SimpleNamespace

import pytest

from fedkern.methods import METHODS
from fedkern.methods.base import Federation
from fedkern.methods.fediod import privacy_options as promise
from fedkern.methods.fediod import private_messages as privacy
from fedkern.methods.fediod.presets import IODOptions, settle
from fedkern.settings.config import RunConfig
from python_tests.extras import needs_accounting

THROUGH_D, THROUGH_T, LOGITS = "discriminator_gradients", "teacher_gradients", "teacher_logits"
COUNTS, KNOWN, SCORES = "class_counts", "known_classes", "scores"
TEXTS = {
    THROUGH_D: "the generator's gradients through the discriminators",
    THROUGH_T: "the generator's gradients through the teachers",
    LOGITS: "the teachers' answers (which change the student and other clients' gradients)",
    COUNTS: "the clients' class counts",
    KNOWN: "which classes a client has",
    SCORES: "the discriminators' confidence in every image",
}
OWN_T = "a client's own gradients for the generator through its teacher"
STUDENT = "the teachers' answers that the student learns from"
ADVERSARIAL = (
    "the teachers' answers (which change the student, other clients' gradients and the adversarial term's gradient for "
    "the generator)"
)
SILENT = {"class_weights": "uniform"}


def options(**settings):
    return settle(IODOptions(**{"preset": "paper", "batch": 8, "iterations": 5, **settings}))


@pytest.mark.parametrize(
    ("settings", "covers", "leaves", "texts"),
    [
        ({"sigma_d": 40.0, "shards": 50}, [THROUGH_D], [THROUGH_T, LOGITS, COUNTS], {}),
        ({"epsilon": 5.0, "histogram_noise": 3.0}, [THROUGH_D, COUNTS], [THROUGH_T, LOGITS], {}),
        ({"sigma_d": 40.0, "class_weights": "known"}, [THROUGH_D], [THROUGH_T, LOGITS, KNOWN], {}),
        # A discriminator's confidence is withheld, told, or not used at all.
        ({"sigma_d": 1.0, "scores": "release", **SILENT}, [THROUGH_D], [THROUGH_T, LOGITS, SCORES], {}),
        ({"sigma_d": 1.0, "scores": "release", "disc_weight": False, **SILENT}, [THROUGH_D], [THROUGH_T, LOGITS], {}),
        # Noise on the gradients through a client's teacher leaves all else that its logits do.
        ({"sigma_t": 900.0, **SILENT}, [THROUGH_T], [THROUGH_D, LOGITS], {THROUGH_T: OWN_T}),
        (
            {"sigma_t": 900.0, "epsilon": 9.0, "w_adv": 1.0, **SILENT}, [THROUGH_D, THROUGH_T], [LOGITS],
            {THROUGH_T: OWN_T, LOGITS: ADVERSARIAL},
        ),
        (
            {"sigma_t": 900.0, "epsilon": 9.0, "w_diverse": 0.0, **SILENT}, [THROUGH_D, THROUGH_T], [LOGITS],
            {THROUGH_T: OWN_T, LOGITS: STUDENT},
        ),
        # The generator does not ask teachers, or no discriminators.
        ({"sigma_d": 1.0, "w_clear": 0.0, "w_diverse": 0.0, **SILENT}, [THROUGH_D], [LOGITS], {LOGITS: STUDENT}),
        ({"sigma_t": 1.0, "w_real": 0.0, **SILENT}, [THROUGH_T], [LOGITS], {THROUGH_T: OWN_T}),
        # Private teachers alone, with counts, and with all that there is.
        ({"teacher_dp": True, **SILENT}, [THROUGH_T, LOGITS], [THROUGH_D, SCORES], {LOGITS: STUDENT}),
        ({"teacher_dp": True, "epsilon": 5.0}, [THROUGH_D, THROUGH_T, LOGITS], [COUNTS], {LOGITS: STUDENT}),
        (
            {"teacher_dp": True, "epsilon": 5.0, "w_adv": 1.0, "histogram_noise": 3.0},
            [THROUGH_D, THROUGH_T, LOGITS, COUNTS], [], {LOGITS: STUDENT},
        ),
        # Counts alone.
        ({"histogram_noise": 3.0}, [COUNTS], [THROUGH_D, THROUGH_T, LOGITS, SCORES], {}),
        ({"histogram_noise": 3.0, "mode": "public"}, [COUNTS], [LOGITS], {LOGITS: STUDENT}),
        ({"teacher_dp": True, "mode": "public", **SILENT}, [LOGITS], [], {LOGITS: STUDENT}),
    ],
)  # fmt: skip
def test_every_release_is_covered_or_listed(settings, covers, leaves, texts):
    said = promise.guarantee(options(**settings))
    assert said.to_dict() == {"covers": covers, "leaves_uncovered": leaves}
    assert {**said.covers, **said.leaves} == {name: {**TEXTS, **texts}[name] for name in (*covers, *leaves)}
    assert said.figure == ("epsilon_covered" if leaves else "epsilon")
    assert said.with_records().to_dict() == {"covers": covers, "leaves_uncovered": [*leaves, "records"]}
    assert said.with_records().figure == "epsilon_covered"
    assert said.delta == 1e-5


def test_nothing_is_promised_where_nothing_is_private():
    for settings in ({}, {"histogram_noise": 3.0, **SILENT}):  # noise on counts that nobody is told
        assert promise.guarantee(options(**settings)) is None
        server = SimpleNamespace(state={}, warn=None)
        privacy.prepare(server, options(**settings))
        assert server.state == {}


@needs_accounting
def test_options_settle_the_noise():
    server = SimpleNamespace(state={}, federation=Federation(2, (50, 50), 10), warn=None)
    privacy.prepare(server, options(sigma_d=1.0, histogram_noise=3.0))
    assert server.state == {"privacy": {"sigma_d": 1.0, "steps": 10}}


def test_the_warning_names_what_is_covered_what_is_not_and_the_way_out():
    said = promise.guarantee(options(sigma_d=1.0, histogram_noise=3.0))
    assert said.warning() == (
        f"The whole release has no epsilon: what is told as epsilon_covered covers {TEXTS[THROUGH_D]} and "
        f"{TEXTS[COUNTS]}, not {TEXTS[THROUGH_T]} and {TEXTS[LOGITS]}; teacher_dp=true covers what comes from the "
        "teachers."
    )
    assert "teacher_dp" not in promise.guarantee(options(teacher_dp=True)).warning()


def test_records_are_private_where_an_option_asks_for_privacy():
    kind = METHODS["fediod"]
    for settings in (
        {"epsilon": 1.0},
        {"sigma_d": 1.0},
        {"sigma_t": 1.0},
        {"teacher_dp": True},
        {"histogram_noise": 1.0},
    ):
        assert kind.promises(IODOptions(**settings))
        assert RunConfig.make("fediod", options=settings).records == "private"
    assert not kind.promises(IODOptions())
    assert RunConfig.make("fediod").records == RunConfig.make("fedavg").records == "all"


def test_confidence_travels_where_nobody_withholds_it():
    assert promise.tells_scores(options())
    assert promise.tells_scores(options(sigma_d=1.0, scores="release"))
    for settings in ({"sigma_d": 1.0}, {"disc_weight": False}, {"mode": "public"}):
        assert not promise.tells_scores(options(**settings))


def test_open_clipping_norms_follow_the_loss():
    assert promise.clip_d(options()) == 0.03
    assert promise.clip_d(options(bce="sum")) == promise.clip_d(options(preset="code")) == 0.3
    assert promise.clip_d(options(clip_d=7.0, preset="code")) == 7.0
