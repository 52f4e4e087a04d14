"""FedIOD's statements about privacy: every release is covered or listed, and nothing else is."""

from types import SimpleNamespace

import pytest

from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.methods.base import Federation
from fedkern.methods.fediod import private_messages as privacy
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.settings.config import RunConfig
from python_tests.extras import needs_accounting

THROUGH_D, THROUGH_T, LOGITS = "discriminator_gradients", "teacher_gradients", "teacher_logits"
COUNTS, SCORES = "class_counts", "scores"
TEXTS = {
    THROUGH_D: "the generator's gradients through the discriminators",
    THROUGH_T: "the generator's gradients through the teachers",
    LOGITS: "the teachers' answers (which change the student and other clients' gradients)",
    COUNTS: "the clients' class counts",
    SCORES: "the discriminators' confidence in every image",
}
STUDENT = {LOGITS: "the teachers' answers that the student learns from"}
SILENT = {"class_weights": "uniform"}
NOISED = {"epsilon": 5.0}
TAUGHT = {"epsilon": 5.0, "teacher_dp": True}


def options(**settings):
    return IODOptions(**{"disc_weight": True, "batch": 8, "iterations": 5, **settings})


@pytest.mark.parametrize(
    ("settings", "covers", "leaves", "texts"),
    [
        ({**NOISED, "shards": 50}, [THROUGH_D], [THROUGH_T, LOGITS, COUNTS], {}),
        ({**NOISED, "histogram_noise": 3.0}, [THROUGH_D, COUNTS], [THROUGH_T, LOGITS], {}),
        ({**NOISED, **SILENT}, [THROUGH_D], [THROUGH_T, LOGITS], {}),
        # Private teachers, with a loss that asks no discriminators, with counts, and with all that there is.
        ({**TAUGHT, "w_real": 0.0, **SILENT}, [THROUGH_T, LOGITS], [], STUDENT),
        (TAUGHT, [THROUGH_D, THROUGH_T, LOGITS], [COUNTS], STUDENT),
        ({**TAUGHT, "histogram_noise": 3.0}, [THROUGH_D, THROUGH_T, LOGITS, COUNTS], [], STUDENT),
        ({**TAUGHT, "mode": "public", **SILENT}, [LOGITS], [], STUDENT),
        # Counts alone: the discriminators' confidence is told.
        ({"histogram_noise": 3.0}, [COUNTS], [THROUGH_D, THROUGH_T, LOGITS, SCORES], {}),
        ({"histogram_noise": 3.0, "disc_weight": False}, [COUNTS], [THROUGH_D, THROUGH_T, LOGITS], {}),
        ({"histogram_noise": 3.0, "mode": "public"}, [COUNTS], [LOGITS], STUDENT),
    ],
)
def test_every_release_is_covered_or_listed(settings, covers, leaves, texts):
    told = options(**settings).guarantee()
    assert told.to_dict() == {"covers": covers, "leaves_uncovered": leaves}
    assert {**told.covers, **told.leaves} == {name: {**TEXTS, **texts}[name] for name in (*covers, *leaves)}
    assert told.figure == ("epsilon_covered" if leaves else "epsilon")
    assert told.with_records().to_dict() == {"covers": covers, "leaves_uncovered": [*leaves, "records"]}
    assert told.with_records().figure == "epsilon_covered"
    assert told.delta == 1e-5


def test_nothing_is_promised_where_nothing_is_private():
    for settings in ({}, {"histogram_noise": 3.0, **SILENT}):  # noise on counts that nobody is told
        assert options(**settings).guarantee() is None
        server = SimpleNamespace(state={}, warn=None)
        privacy.prepare(server, options(**settings))
        assert server.state == {}


@needs_accounting
def test_the_noise_is_settled_before_the_first_round():
    for settings, is_noised in (({"histogram_noise": 3.0}, False), (NOISED, True)):
        server = SimpleNamespace(state={}, federation=Federation(2, (50, 50), 10), warn=None)
        privacy.prepare(server, options(**settings))
        assert server.state["privacy"]["steps"] == 10
        assert (server.state["privacy"]["sigma_d"] > 0) == is_noised


def test_the_warning_names_what_is_covered_what_is_not_and_the_way_out():
    told = options(**NOISED, histogram_noise=3.0).guarantee()
    assert told.warning() == (
        f"The whole release has no epsilon: what is told as epsilon_covered covers {TEXTS[THROUGH_D]} and "
        f"{TEXTS[COUNTS]}, not {TEXTS[THROUGH_T]} and {TEXTS[LOGITS]}; teacher_dp=true covers what comes from the "
        "teachers."
    )
    assert "teacher_dp" not in options(**TAUGHT).guarantee().warning()


def test_records_are_private_where_an_option_asks_for_privacy():
    kind = METHODS["fediod"]
    for settings in (NOISED, TAUGHT, {"histogram_noise": 1.0}):
        assert kind.is_private(IODOptions(**settings))
        assert RunConfig.make("fediod", options=settings).records == "private"
    assert not kind.is_private(IODOptions())
    assert RunConfig.make("fediod").records == RunConfig.make("fedavg").records == "all"


def test_confidence_travels_where_nobody_withholds_it():
    assert options().tells_scores
    for settings in (NOISED, {"disc_weight": False}, {"mode": "public"}):
        assert not options(**settings).tells_scores


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_dp": True}, '"teacher_dp" needs a target'),
        ({"epsilon": 1.0, "mode": "public"}, '"mode" = public sends no gradients'),
        ({"shards": 5}, '"shards" is for the gradients'),
        ({"shards": 5, **TAUGHT, "mode": "public"}, '"shards" is for the gradients'),
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"clip_d": 0.0}, "clip_d"),
    ],
)
def test_options_that_promise_nothing_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        options(**settings)
