"""Times and contents of checkpoints, without a run."""

import math
from types import SimpleNamespace

import pytest
from torch import nn

from fedkern.engine.parts.checkpointing import Checkpointing
from fedkern.engine.parts.part import Stop, Summary
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import Timing
from fedkern.engine.store.checkpoints import checksum
from fedkern.engine.store.record_files import SUMMARY
from fedkern.methods.base import Round
from python_tests.stand_ins import Context, record, run_objects


class Checkpoints:
    """A store that notes the checkpoints."""

    def __init__(self, calls):
        self._calls, self.commits, self.info = calls, [], None

    @property
    def entries(self):
        return [{"plan": commit["plan"]} for commit in self.commits][-2:]

    def commit(self, *, before, **given):
        self._calls.append("commit")
        before()
        self.commits.append(given)

    def amend(self, info):
        self.info = info


class Bench:
    """The checkpointing part with stand-ins for its run."""

    def __init__(self, out, interval=3, releases=False):
        self.calls, self.progress, self.timing = [], Progress(), Timing()
        self.checkpoints, self.server = Checkpoints(self.calls), SimpleNamespace(state={"x": 1})
        forget = SimpleNamespace(forget=lambda plan: self.calls.append(f"forget {plan}"))
        self.run = run_objects(
            Context(checkpoint_every=interval), out=out, checkpoints=self.checkpoints, facts={"data": 7},
            part_states=lambda: {"parts": {"server": {"spread": math.nan}}}, server=self.server,
            participation=SimpleNamespace(state=lambda: {"clock": 7.0}, in_flight=lambda: {4: {0: {}}}),
            progress=self.progress, timing=self.timing,
            ledger=SimpleNamespace(changed_rows=lambda: {1: [8, 0, 0, 0]}),
            metrics=SimpleNamespace(sync=lambda: self.calls.append("sync")),
            releases=forget if releases else None, check_lock=lambda: self.calls.append("alone"),
        )  # fmt: skip
        self.part = Checkpointing(self.run)

    def round(self, number=1, rounds=10, stop=None):
        """Play a round of the plan, and return whether a checkpoint was made."""
        made = len(self.checkpoints.commits)
        noted = record(number, rounds, Round(one_off=number < 0), stop=stop)
        self.part.before_round(noted)
        self.progress.planned += 1
        self.progress.done += number > 0
        self.part.round_end(noted)
        return len(self.checkpoints.commits) > made


def test_after_every_set_up_round_and_every_few_others_and_the_last(tmp_path):
    bench = Bench(tmp_path)
    made = [number for number in (-1, 1, -3, *range(2, 9)) if bench.round(number, rounds=8)]
    assert made == [-1, -3, 3, 6, 8]
    assert [commit["round"] for commit in bench.checkpoints.commits] == [0, 1, 3, 6, 8]
    assert [commit["plan"] for commit in bench.checkpoints.commits] == [1, 3, 5, 8, 10]


def test_after_a_round_that_the_run_ends_with(tmp_path):
    bench = Bench(tmp_path)
    assert not bench.round(1)
    assert bench.round(2, stop=Stop("enough", "It is enough."))


def test_what_stands_in_a_checkpoint(tmp_path):
    bench = Bench(tmp_path, interval=1)
    assert bench.round(1)
    (commit,) = bench.checkpoints.commits
    assert commit["server"] is bench.server.state
    assert commit["participation"] == {"clock": 7.0}
    assert commit["messages"] == {4: {0: {}}}
    assert commit["booked"] == {1: [8, 0, 0, 0]}
    assert commit["info"] == {"data": 7, "parts": {"server": {"spread": None}}, "finished": False}  # as JSON has it
    assert bench.timing.phases["checkpoint"] > 0


def test_the_folder_is_the_runs_own_before_a_round_and_before_a_checkpoint(tmp_path):
    bench = Bench(tmp_path, interval=2)
    bench.round(1)
    assert bench.calls == ["alone"]
    bench.round(2)
    assert bench.calls[1:] == ["alone", "alone", "commit", "sync"]

    def fail_as_taken():
        raise RuntimeError("taken over")

    bench.run.store.check_lock = fail_as_taken
    with pytest.raises(RuntimeError, match="taken over"):
        bench.part.round_end(record(4))
    assert len(bench.checkpoints.commits) == 1


def test_digests_are_kept_as_long_as_a_checkpoint_may_replay_them(tmp_path):
    bench = Bench(tmp_path, interval=1, releases=True)
    for number in (1, 2, 3):
        bench.round(number)
    assert [call for call in bench.calls if call.startswith("forget")] == ["forget 1", "forget 1", "forget 2"]


def test_the_last_checkpoint_says_that_the_run_is_finished_and_with_which_files(tmp_path):
    bench = Bench(tmp_path)
    (tmp_path / SUMMARY).write_text("{}")
    bench.part.finish(Summary(nn.Identity()))
    assert bench.checkpoints.info == {
        "data": 7, "parts": {"server": {"spread": None}}, "finished": True,
        "results": {SUMMARY: checksum(tmp_path / SUMMARY)},
    }  # fmt: skip
