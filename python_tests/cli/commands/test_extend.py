"""extend: more rounds for a run, with the bits of a run that had them from the beginning."""

import json
import re
import shutil
import sys

import pytest
import torch

import fedkern
from fedkern.cli.command_parser import parse_words
from fedkern.cli.commands import extend
from fedkern.downstream.saved_network import read_model
from fedkern.engine.store.record_files import read_metrics
from fedkern.settings.config import load_settings
from python_tests.interrupted import killed_at_rename

TINY = ["--data", "digits", "--train-samples", "120", "--clients", "3", "--model", "mlp", "--threads", "1",
        "--grad-cam", "0", "--local-steps", "2", "--workers", "1", "--quiet"]  # fmt: skip


@pytest.fixture
def start(result):
    def run(method, rounds, out, *words):
        result(method, *TINY, "--rounds", str(rounds), "--out", out, *words)

    return run


def figures(out):
    """Return every record without times."""
    timed = ("seconds", "round_seconds", "phases")
    return [{name: value for name, value in row.items() if name not in timed} for row in read_metrics(out)]


def check_equal(left, right):
    networks = [read_model(out)[0].state_dict() for out in (left, right)]
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    without = [[{k: v for k, v in row.items() if k != "clients"} for row in figures(out)] for out in (left, right)]
    assert without[0] == without[1]
    summaries = [json.loads((out_folder / "summary.json").read_text()) for out_folder in (left, right)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert summaries[0]["bytes"] == summaries[1]["bytes"]
    assert summaries[0]["diagnostics"] == summaries[1]["diagnostics"]


@pytest.mark.parametrize("method", ["scaffold", pytest.param("fedavg", marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("undrawn")
def test_an_extended_run_is_the_longer_run(method, start, result, tmp_path):
    options = ("--lr-decay", "0.9", "--sample-fraction", "0.67")
    start(method, 5, "long", *options)
    start(method, 2, "short", *options)
    out, _ = result("extend", "short", "--rounds", "5", "--quiet")
    assert out.strip().splitlines()[-1] == "short"
    check_equal(tmp_path / "long", tmp_path / "short")
    assert load_settings("short", device="cpu").rounds == 5


@pytest.mark.exhaustive
@pytest.mark.usefixtures("undrawn")
def test_warnings_about_a_network_that_is_no_longer_the_last_one_go(start, result, tmp_path):
    start("fedavg", 1, "run", "--lr", "0.001", "--eval-every", "40")
    warned = json.loads((tmp_path / "run" / "summary.json").read_text())["diagnostics"]
    assert "collapsed-class" in warned
    result("extend", "run", "--rounds", "40", "--quiet")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] > 0.8
    assert "collapsed-class" not in summary["diagnostics"]


@pytest.mark.usefixtures("undrawn")
def test_an_extension_that_was_killed_at_a_write_is_finished(start, result, tmp_path):
    start("fedavg", 1, "start")
    start("fedavg", 2, "long")
    before = {path.name for path in (tmp_path / "start").iterdir()}
    for count in range(8):  # the manifest, results that are moved, config.toml, files of the new round
        out = shutil.copytree(tmp_path / "start", tmp_path / f"run{count}")
        with killed_at_rename(count, "before"):
            fedkern.load(out).extend(2, progress=False, pictures=False, workers=1)
        if not count:
            assert fedkern.load(out).model()
            assert {path.name for path in out.iterdir()} == before
        if load_settings(out).rounds == 1 or count == 1:
            result("extend", str(out), "--rounds", "2", "--quiet")
        else:
            result("--resume", str(out), "--quiet")
        check_equal(tmp_path / "long", out)
    assert load_settings(out).rounds == 2


@pytest.mark.exhaustive
def test_a_schedule_over_all_rounds_is_told(result):
    command = "fediod --data digits --train-samples 60 --clients 2 --model mlp --threads 1 --grad-cam 0 --rounds 1 "
    command += "--local-epochs 1 --quiet --out run --method-option iterations=2 --method-option batch=4"
    result(*command.split())
    out, err = result("extend", "run", "--rounds", "2")
    assert "the cosine schedules and the warm-up span all rounds" in " ".join((out + err).split())


@pytest.mark.parametrize("flags", [["--tensorboard"], ["--wandb", "a/b"], ["--wandb=p", "--mlflow=e", "--quiet"], []])
def test_the_trackers_of_a_run_follow_an_extended_one(flags, monkeypatch):
    given, played = parse_words(["extend", "run", "--rounds", "9", *flags, "--workers", "2"]), []
    monkeypatch.setattr(extend.run, "play", played.append)
    extend.play(given)
    plain = parse_words(["--resume", "run", *flags, "--workers", "2"])
    assert {**vars(played[0]), "predictions": False} == {**vars(plain), "arguments": {"rounds": 9}}


@pytest.mark.exhaustive
@pytest.mark.usefixtures("undrawn")
def test_an_extended_run_goes_on_with_its_event_files(start, result, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start("fedavg", 2, "run", "--tensorboard")
    result("extend", "run", "--rounds", "3", "--tensorboard", "--quiet")
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    seen.Reload()
    assert [event.step for event in seen.Scalars("accuracy")] == [1, 2, 3]


@pytest.mark.usefixtures("undrawn")
def test_mistakes_end_in_one_sentence_and_leave_the_run_as_it_was(start, fails, monkeypatch, tmp_path):
    start("fedavg", 2, "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "has 2 rounds: --rounds must be larger" in fails("extend", "run", "--rounds", "2")
    assert "needs --rounds R" in fails("extend", "run")
    assert "needs the folder" in fails("extend")
    assert "does not take" in fails("extend", "run", "--lr", "1")
    assert "--rounds" in fails("extend", "run", "--rounds", "many")
    assert "does not exist" in fails("extend", "absent", "--rounds", "3")
    for module, flags in {"torch.utils.tensorboard": ["--tensorboard"], "wandb": ["--wandb", "project"]}.items():
        monkeypatch.setitem(sys.modules, module, None)
        assert re.search(f"needs? {module.split('.')[-1]}", fails("extend", "run", "--rounds", "3", *flags))
    assert "--wandb is given without a value" in fails("extend", "run", "--rounds", "3", "--wandb", "")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("undrawn")
def test_runs_whose_plan_or_privacy_fixes_the_rounds_are_refused(result, fails):
    tiny = [word for word in TINY if word not in ("--local-steps", "2")]
    result("oneshot-fedavg", *tiny, "--local-epochs", "1", "--out", "once")
    assert "is a one-shot method" in fails("extend", "once", "--rounds", "3")


MADE = {
    "summary.json", "model.safetensors", "evaluation.csv", "confusion.json", "predictions.csv", "attack.json",
    "report.html", "evaluate.json", "evaluate-probe.json", "model.pt", "model.pt.json", "pictures.json", "accuracy.png",
}  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize("records", ["all", "private"])
def test_what_was_made_of_the_former_network_is_moved_aside(records, start, result, monkeypatch, tmp_path):
    monkeypatch.setattr("fedkern.report.figures.plots.to_svg", lambda figure, name: "<svg></svg>")
    run = tmp_path / "run"
    start("fedavg", 1, "run", "--records", records, *(["--predictions"] if records == "all" else []))
    for command in (["evaluate"], ["report"], ["attack"], ["export", "--format", "state-dict"]):
        result(command[0], "run", *command[1:])
    (run / "evaluate-probe.json").write_text("{}")
    (run / "picture.png").write_bytes(b"mine")
    (run / "notes.json").write_bytes(b"mine")
    made = {path.name for path in run.iterdir() if path.name in MADE}
    assert made | ({"attack.json", "confusion.json", "predictions.csv"} if records == "private" else set()) == MADE
    before = {name: (run / name).read_bytes() for name in made}
    out, err = result("extend", "run", "--rounds", "2")
    assert f"results of the former network: {run.name}/round-0001" in " ".join((out + err).split())
    assert {name: (run / "round-0001" / name).read_bytes() for name in made} == before
    assert (run / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert (
        not made
        & {"evaluate.json", "evaluate-probe.json", "model.pt", "model.pt.json", "attack.json"}
        & {path.name for path in run.iterdir()}
    )
    assert (run / "picture.png").read_bytes() == (run / "notes.json").read_bytes() == b"mine"
    if records == "private":
        assert (run / "round-0001" / "checkpoints" / "attack.json").exists()
        assert not (run / "checkpoints" / "attack.json").exists()
