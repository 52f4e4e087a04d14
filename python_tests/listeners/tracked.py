"""Runs that report to a tracker, interrupted and resumed."""

import pytest

from fedkern.cli.command_parser import parse_words, play_request
from fedkern.cli.commands import run
from python_tests.interrupted import Kill, KillAt

WORDS = [
    "fedavg", "--data", "digits", "--train-samples", "60", "--clients", "2", "--rounds", "4", "--local-epochs", "1",
    "--width", "2", "--model", "cnn", "--grad-cam", "0", "--checkpoint-every", "2",
]  # fmt: skip


def cut(monkeypatch, last, *words):
    """Play a run that is killed after round ``last`` has reached every listener."""
    make = run.Listeners
    monkeypatch.setattr(run, "Listeners", lambda *listeners: make(*listeners, KillAt("round", round=last)))
    with pytest.raises(Kill):
        play_request(parse_words([*words, "--quiet"]))
    monkeypatch.setattr(run, "Listeners", make)


def resume(out, *words):
    assert play_request(parse_words(["--resume", str(out), "--quiet", *words])) == 0
