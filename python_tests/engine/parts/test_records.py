"""The part that writes metrics.jsonl."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.records import Records
from fedkern.engine.rounds.timing import Timing
from fedkern.engine.store.record_files import Metrics
from fedkern.errors import UserError
from fedkern.privacy.disclosure import About
from python_tests.stand_ins import PRIVATE, Context, about, record, round_trip, run_objects, values


class Noted:
    """The part of records with stand-ins for its run."""

    def __init__(self, out, **context):
        self.context, self.log, self.timing = Context(**context), SimpleNamespace(dropped=[]), Timing()
        self.metrics = Metrics(out)
        run = run_objects(self.context, metrics=self.metrics, log=self.log, timing=self.timing)
        self.part = Records(run)

    def round(self, number, **given):
        """Play a round and return its record."""
        played = record(number, seconds={"train": 2.0}, clients={"1": {"loss": 0.5}}, **given)
        self.part.before_round(played)
        self.part.round_end(played)
        return played

    def lines(self):
        return [json.loads(line) for line in self.metrics.path.read_text().splitlines()]


@pytest.mark.parametrize("private", [False, True])
def test_a_record_says_what_may_be_told(private, tmp_path):
    noted = Noted(tmp_path, disclosure=PRIVATE if private else None)
    noted.context.data.client_names = ("x", "y")
    noted.part.begin(resumed=False)
    noted.log.dropped = [{"round": 1, "client": 0}]
    entry = noted.round(1, due=True)
    assert about(entry, About.CLIENTS) == {"clients"}
    assert values(entry)["clients"] == {"1": {"name": "y", "loss": 0.5}}
    assert ("clients" in entry.public) is not private
    assert (entry.public["round"], entry.public["rounds"], entry.public["evaluated"], entry.public["name"]) == (
        1,
        3,
        True,
        "train",
    )
    assert entry.public["dropped"] == [{"round": 1, "client": 0}]
    (line,) = noted.lines()
    assert line.keys() == entry.public.keys() - {"rounds", "evaluated"}
    assert line["phases"] == {"train": 2.0}
    assert 0 <= line["round_seconds"] <= line["seconds"] + 1
    assert line["seconds"] > 0
    assert noted.round(-1).entries == {}  # which is no communication round
    assert "dropped" not in noted.round(2).public  # told once
    assert [line["round"] for line in noted.lines()] == [1, 2]
    assert noted.timing.phases == {"train": 4.0}


def test_what_records_do_at_the_end_of_a_run(tmp_path):
    noted = Noted(tmp_path)
    noted.round(1)
    noted.log.dropped = [{"round": 1, "client": 0}]
    summary = Summary(nn.Identity())
    noted.part.finish(summary)
    assert summary.entries == {"phases": {"train": 2.0}, "dropped": [{"round": 1, "client": 0}]}


def test_records_go_on_from_a_checkpoint(tmp_path):
    noted = Noted(tmp_path)
    noted.part.begin(resumed=False)
    noted.round(1)
    noted.log.dropped = [{"round": -1, "client": 2}]
    state = round_trip(noted.part.state())
    noted.round(2)  # after the checkpoint
    state["seconds"] = 1000.0
    again = Noted(tmp_path)
    again.part.restore(state)
    again.part.begin(resumed=True)
    assert [line["round"] for line in again.lines()] == [1]
    assert again.log.dropped == [{"round": -1, "client": 2}]
    assert again.timing.seconds() >= 1000
    assert again.part.state()["sha256"] == state["sha256"]
    again.round(2)
    assert [line["round"] for line in again.lines()] == [1, 2]
    assert again.timing.phases == {"train": 4.0}
    again.part.begin(resumed=False)  # a run that begins anew
    assert again.lines() == []
    with pytest.raises(UserError, match="has lost rounds that the checkpoint has"):
        again.part.restore(state)
