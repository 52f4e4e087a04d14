"""Tests of TensorBoard event files: their contents, for any method, also after a kill and a resume."""

import sys

import pytest

from fedkern.cli.command_parser import parse_words, play_request
from fedkern.cli.commands import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.listeners.tensorboard import FOLDER, TensorBoard, scalars
from python_tests.interrupted import Kill, KillAt

RECORD = {
    "round": 3, "rounds": 9, "name": "train", "seconds": 2.0, "bytes_up": 7, "evaluated": True, "loss": 0.5,
    "id_accuracy": 0.75, "validation_loss": 1.5, "epsilon": None, "phases": {"train": 1.0}, "dropped": [],
    "clients": {"0": {"samples": 10, "loss": 0.25, "drift": 1.0}, "1": {"samples": 30, "loss": 0.75}},
}  # fmt: skip


def test_the_tags():
    assert scalars(RECORD) == {
        "loss": 0.5, "id/accuracy": 0.75, "validation/loss": 1.5, "run/seconds": 2.0, "run/bytes_up": 7.0,
        "clients/loss": 0.5, "clients/drift": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["validation_north", "id_ood", "_", "loss", "a_b"])
def test_a_set_of_any_name_has_a_group_of_its_own(name):
    record = {f"{name}_accuracy": 0.5, "validation_loss": 1.0, "a_loss": 2.0}
    assert scalars(record, ("a", name)) == {f"{name}/accuracy": 0.5, "validation/loss": 1.0, "a/loss": 2.0}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="need tensorboard: pip install "):
        TensorBoard()
    with pytest.raises(UserError, match="tensorboard"):
        play_request(parse_words(["fedavg", "--tensorboard"]))


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


WORDS = [
    "fedavg", "--data", "digits", "--train-samples", "60", "--clients", "2", "--rounds", "4", "--local-epochs", "1",
    "--width", "2", "--model", "cnn", "--grad-cam", "0", "--checkpoint-every", "2", "--quiet", "--tensorboard",
]  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize("last", [1, 3], ids=["before the first checkpoint", "after it"])
def test_every_round_of_a_run_stands_in_them(last, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    make = run.Listeners
    monkeypatch.setattr(run, "Listeners", lambda *listeners: make(*listeners, KillAt("round", round=last)))
    with pytest.raises(Kill):  # the last round is in the event files but in no checkpoint
        play_request(parse_words([*WORDS, "--out", str(out)]))
    monkeypatch.setattr(run, "Listeners", make)
    assert [step for step, _ in read(out / FOLDER)["loss"]] == list(range(1, last + 1))
    assert play_request(parse_words(["--resume", str(out), "--tensorboard", "--quiet"])) == 0
    found = read(out / FOLDER)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    for tag in ("accuracy", "validation/accuracy", "loss", "clients/drift", "run/bytes_up", "final/accuracy"):
        assert tag in found
    for record, (step, value) in zip(read_metrics(out), found["accuracy"], strict=True):
        assert (record["round"], record["accuracy"]) == (step, pytest.approx(value, rel=1e-6))
    assert capsys.readouterr().out.strip() == str(out)
