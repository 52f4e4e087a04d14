"""The command ``flower`` as it is typed: its flags, and what it says without Flower or with a wrong folder."""

from __future__ import annotations

import importlib.util

import pytest

from fedkern.cli import flower_runs
from fedkern.run import main

INSTALLED = importlib.util.find_spec("flwr") is not None


def test_flags_are_read():
    request = flower_runs.parse(
        ["flower", "project", "--nodes", "3", "--run-config", "rounds=2", "--run-config", "lr=0.1", "--out", "kept"]
    )
    assert str(request.folder) == "project"
    assert str(request.out) == "kept"
    assert request.arguments["nodes"] == 3
    assert request.arguments["run_config"] == ("rounds=2", "lr=0.1")
    assert flower_runs.parse(["report", "project"]) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs the folder of a Flower project."),
        (["p", "--nodes", "0"], '--nodes must be a whole number of at least 1, not "0".'),
        (["p", "--superlink", ""], "--superlink is given without a value"),
        (["p", "--insecure", "--root-certificates", "x"], "--insecure means that there is no certificate"),
        (["p", "--superlnk", "x"], 'does not take "--superlnk". Did you mean "--superlink"?'),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    assert main(["flower", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_help_shows_every_flag(capsys):
    assert main(["flower", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--superlink", "--nodes", "--run-config", "--out", "pip install 'fedkern[flower]'"):
        assert flag in shown


@pytest.mark.skipif(INSTALLED, reason="flwr is installed")
def test_without_flower_the_extra_is_named(tmp_path, capsys):
    assert main(["flower", str(tmp_path)]) == 2
    assert "needs Flower, which is not installed: pip install 'fedkern[flower]'." in capsys.readouterr().err


@pytest.mark.flower
@pytest.mark.skipif(not INSTALLED, reason="flwr is not installed: pip install 'fedkern[flower]'")
def test_flags_that_do_not_fit_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app]\npublisher = 'me'\n")
    for words, sentence in (
        (["--insecure"], "--insecure belongs to an address: give --superlink HOST:PORT with it."),
        (["--superlink", "h:1", "--nodes", "2"], "--nodes is for simulations: the SuperLink has the nodes"),
        (["--superlink", "hospital"], 'There is no SuperLink connection "hospital"'),
        (["--superlink", "h:1", "--root-certificates", "none.pem"], "none.pem is not a file"),
    ):
        assert main(["flower", str(tmp_path), *words]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "log.txt").touch()
    assert main(["flower", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "log.txt exists: name another folder with --out." in capsys.readouterr().err
