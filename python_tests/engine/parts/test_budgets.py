"""``--max-seconds`` and ``--max-bytes``: no round is begun that would pass the budget."""

import json
from types import SimpleNamespace

import pytest

from fedkern.engine.parts.budgets import MaxBytes, MaxSeconds
from fedkern.engine.parts.part import Record
from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.rounds.timing import Timing
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods.base import Phase, Round
from python_tests.interrupted import KillAt, kill_and_resume, outcome
from python_tests.stand_ins import run_objects


def record(entry=None):
    return Record(entry or Round(), 1, 9, [0])


def at_most_100(ledger):
    return MaxBytes(run_objects(SimpleNamespace(config=SimpleNamespace(max_bytes=100)), ledger=ledger))


def play_round(part, ledger, size, *, one_off=False):
    """Play a round in which a client is sent ``size`` bytes.

    Returns the reason to stop before the round, or None after playing it.
    """
    entry = Round(one_off=one_off)
    if (stop := part.before_round(record(entry))) is not None:
        return stop
    ledger.begin_round()
    ledger.book(0, "down", "x" * size, phase=None if one_off else Phase(0, "train", "update"))
    return part.round_end(record(entry))


def test_the_round_that_would_pass_the_bytes_is_not_begun():
    ledger = Ledger(1)
    part = at_most_100(ledger)
    assert [play_round(part, ledger, size) for size in (30, 40)] == [None] * 2
    stop = play_round(part, ledger, 1)  # 70 are spent, and a round took up to 40
    assert (stop.name, stop.reason) == (
        "max-bytes", "70 bytes are spent, and a round takes up to 40 (--max-bytes 100)",
    )  # fmt: skip
    assert ledger.total == 70


def test_a_round_that_fits_to_the_byte_is_begun():
    ledger = Ledger(1)
    part = at_most_100(ledger)
    assert [play_round(part, ledger, 50) for _ in range(2)] == [None] * 2
    assert play_round(part, ledger, 50) is not None


def test_set_up_rounds_are_spent_and_never_left_out():
    ledger = Ledger(1)
    part = at_most_100(ledger)
    assert play_round(part, ledger, 70, one_off=True) is None
    assert play_round(part, ledger, 30) is None
    assert play_round(part, ledger, 5, one_off=True) is None
    assert play_round(part, ledger, 1).name == "max-bytes"


def test_what_a_round_took_survives_a_checkpoint():
    ledger = Ledger(1)
    part, again = at_most_100(ledger), at_most_100(ledger)
    play_round(part, ledger, 60)
    assert again.before_round(record()) is None
    again.restore(json.loads(json.dumps(part.state())))
    assert again.before_round(record()) == part.before_round(record()) is not None


def test_seconds_are_those_of_work_over_all_resumptions():
    timing = Timing()
    part = MaxSeconds(run_objects(SimpleNamespace(config=SimpleNamespace(max_seconds=100.0)), timing=timing))
    timing.restore(60.0, {})
    assert part.before_round(record()) is None
    long = record()
    long.started -= 45.0
    part.round_end(long)
    stop = part.before_round(record())
    assert stop.name == "max-seconds"
    assert stop.reason == "60 seconds are spent, and a round takes up to 45 (--max-seconds 100)"


def test_a_run_keeps_to_its_bytes_and_goes_on_alike(make_data, make_config, tmp_path):
    data, config = make_data(), make_config("fedavg", rounds=9)
    unlimited = run(config.replace(rounds=3), out=tmp_path / "three", data=data)
    limited = config.replace(max_bytes=unlimited["bytes"]["total"] + 10.0)
    summary = run(limited, out=tmp_path / "limited", data=data)
    assert (summary["rounds"], summary["bytes"]["total"]) == (3, unlimited["bytes"]["total"])
    assert summary["stopped"]["by"] == "max-bytes"
    again = kill_and_resume(limited, out=tmp_path / "cut", data=data, at=KillAt("client", 5))
    assert again == outcome(tmp_path / "limited")


@pytest.mark.parametrize("given", [{"max_seconds": 0.0}, {"max_bytes": -1.0}, {"max_bytes": "much"}])
def test_budgets_are_positive_numbers(given, make_config):
    with pytest.raises(UserError, match=r"--max-(seconds|bytes) must be"):
        make_config("fedavg", **given)
