"""Parts that write files: results, answers, artifacts, metrics.jsonl, and the trace of ``--profile``."""

import csv
import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedkern.engine.figures.final_figures import final_figures
from fedkern.engine.parts import trace
from fedkern.engine.parts.answers import Answers
from fedkern.engine.parts.method_artifacts import Artifacts
from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.records import Records
from fedkern.engine.parts.results import Results
from fedkern.engine.parts.trace import Trace
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import Timing
from fedkern.engine.run import run
from fedkern.engine.store import confusions
from fedkern.engine.store.artifacts import FILE
from fedkern.engine.store.record_files import Metrics
from fedkern.engine.store.run_folder import MODEL
from fedkern.errors import UserError
from fedkern.privacy.guarantee import About, Disclosure
from fedkern.tasks import CLASSIFICATION
from python_tests.engine.parts.judged import FORM, SETTINGS, Judged, Says, brightness_set
from python_tests.interrupted import outcome
from python_tests.stand_ins import PRIVATE, Context, about, record, round_trip, run_objects, values


@pytest.mark.parametrize("names", [None, ("x", "y")])
def test_the_files_of_a_run(names, tmp_path):
    context = Context(2, **SETTINGS)
    context.networks.model_name, context.task_facts = "cnn", {}
    facts = {"task": CLASSIFICATION, "form": FORM}
    vars(context.data).update(
        client_names=names, statistics=SimpleNamespace(held_out=("z", 3) if names else None), **facts
    )
    summary = Summary(
        Says(0.25), metrics={"accuracy": 0.5, "epsilon": 2.0}, of_tests={"accuracy": 0.5},
        of_clients={1: {"accuracy": None}}, client_set="own", entries={"bytes": {"total": 8}, "diagnostics": {}},
    )  # fmt: skip
    Results(run_objects(context, out=tmp_path, sets={"": None}, progress=Progress(done=2))).finish(summary)
    assert (tmp_path / "evaluation.csv").read_text().splitlines() == [
        "client,test_set,metric,value", ",test,accuracy,0.5", f"{'y' if names else 1},own,accuracy,",
    ]  # fmt: skip
    assert load_file(tmp_path / MODEL)["level"] == 0.25
    written = json.loads((tmp_path / "summary.json").read_text())
    named = {"client_names": ["x", "y"], "held_out_client_name": "z"} if names else {}
    head = {"method": "judged", "data": "tiny", "model": "cnn", "seed": 5, "rounds": 2, "clients": 2, **named}
    assert [*written] == [*head, "metrics", "bytes", "diagnostics", "seconds", "records", "versions"]
    assert written == {**summary.entries, **head}
    assert written["metrics"] == {"accuracy": 0.5, "epsilon": 2.0}


# -- answers -----------------------------------------------------------------------------------------------------------


def write_answers(out, *, keep=True, check_lock=lambda: None, counts=True, rows=True):
    """Write the answers to a test set of two images."""
    sets, network = {"id_": brightness_set([0.1, 0.9], [1, 1])}, Says(0.5)
    if keep:
        with sets["id_"].keeping():
            Judged().evaluate(network, sets["id_"])
    context = Context(disclosure=Disclosure(clients=counts), **SETTINGS)
    summary = Summary(network, final=final_figures(sets, ("cat", "dog")))
    run = run_objects(context, out=out, request={"predictions": rows}, sets=sets, check_lock=check_lock)
    Answers(run).finish(summary)
    return context.notices.warnings


def test_answers_are_written_as_counts_and_image_by_image(tmp_path):
    assert write_answers(tmp_path) == {}
    assert confusions.read(tmp_path).matrices["id"].tolist() == [[0, 0], [1, 1]]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test_set"], row["true_class"], row["predicted_class"]) for row in rows] == [
        ("id", "dog", "cat"), ("id", "dog", "dog"),
    ]  # fmt: skip


def test_answers_that_are_not_asked_for_may_not_be_told_or_are_not_there(tmp_path):
    assert write_answers(tmp_path, counts=False, rows=False) == {}
    assert [*write_answers(tmp_path, keep=False)] == ["no-predictions"]
    assert [*tmp_path.iterdir()] == []


def test_answers_are_not_written_to_a_folder_that_was_taken_over(tmp_path):
    def fail_as_taken():
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        write_answers(tmp_path, check_lock=fail_as_taken)
    assert [*tmp_path.iterdir()] == []


# -- method artifacts --------------------------------------------------------------------------------------------------


def showing(out, told=True, done=0):
    server = SimpleNamespace(showing=None, artifacts={})
    context = Context(disclosure=Disclosure(server=told))
    return server, Artifacts(run_objects(context, out=out, server=server, rounds=16, progress=Progress(done=done)))


def test_which_rounds_the_server_shows(tmp_path):
    for told in (False, True):
        server, part = showing(tmp_path, told)
        seen = {}
        for number in (-1, 1, 2, 3):
            part.before_round(record(number))
            seen[number] = server.showing
        assert seen == {-1: False, 1: told, 2: told, 3: False}


def test_pictures_go_on_from_a_checkpoint(tmp_path):
    server, part = showing(tmp_path)
    for number in (1, 2):
        server.artifacts["weights"] = torch.full((2, 2), float(number)), ("client", "class")
        part.round_end(record(number))
        assert server.artifacts == {}
        if number == 1:
            state = round_trip(part.state())
    assert part.state() != state  # and writes the file with both
    _, again = showing(tmp_path, done=1)
    again.restore(state)
    assert again.state() == state
    _, resumed = showing(tmp_path, done=2)
    with pytest.raises(UserError, match=f"{FILE} is not what the run wrote"):
        resumed.restore(state)


# -- records -----------------------------------------------------------------------------------------------------------


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


# -- trace -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def profiles(monkeypatch):
    """Return the profilers that a part of traces makes."""
    made = []

    class Profile:
        def __init__(self, activities):
            self.calls = []
            made.append(self)

        def start(self):
            self.calls.append("start")

        def stop(self):
            self.calls.append("stop")

        def export_chrome_trace(self, path):
            with open(path, "w") as file:  # noqa: PTH123
                file.write(f"trace {len(made)}")

    monkeypatch.setattr(trace, "profile", Profile)
    return made


@pytest.mark.parametrize(("rounds", "traced"), [(4, 2), (1, 1)])
def test_the_second_round_is_traced_or_the_only_one(rounds, traced, profiles, tmp_path):
    part = Trace(run_objects(out=tmp_path))
    for number in (-1, *range(1, rounds + 1)):
        noted = record(number, rounds)
        part.before_round(noted)
        assert noted.in_server_process is (number == traced)  # an operator of another process would be missing
        part.round_end(noted)
        assert trace.TRACE in [path.name for path in tmp_path.iterdir()] or number < traced
    part.close()
    assert [profile.calls for profile in profiles] == [["start", "stop"]]
    assert gzip.decompress((tmp_path / trace.TRACE).read_bytes()) == b"trace 1"


def test_a_trace_ends_with_a_run_that_fails(profiles, tmp_path):
    part = Trace(run_objects(out=tmp_path))
    part.before_round(record(1, 1))
    part.close()
    part.close()
    assert [profile.calls for profile in profiles] == [["start", "stop"]]
    assert [*tmp_path.iterdir()] == []


def test_a_trace_of_one_round(make_config, make_data, tmp_path):
    config, data = make_config(rounds=2), make_data()
    run(config, out=tmp_path / "plain", data=data)
    run(config, out=tmp_path / "run", data=data, profile=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")
    with gzip.open(tmp_path / "run" / "profile.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    steps = sum(name == "aten::nll_loss_backward" for name in events)
    batches = sum(-(-len(split.labels) // config.batch_size) for split in data.clients)
    assert 0 < steps <= config.local_epochs * batches
    assert not (tmp_path / "plain" / "profile.json.gz").exists()


def test_private_records_have_no_trace(make_config, make_data, tmp_path):
    """A trace would show a client's number of steps."""
    with pytest.raises(UserError, match="--profile writes what every client computed"):
        run(make_config(rounds=1, records="private"), out=tmp_path / "run", data=make_data(), profile=True)
    assert not any((tmp_path / "run").glob("*"))
