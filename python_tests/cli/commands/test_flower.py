"""The command ``flower``, and its reading of answers of ``flwr``, which a script replaces."""

import importlib.util
import json

import pytest

from fedkern.cli.command_parser import parse_words
from fedkern.cli.commands import flower
from fedkern.errors import RunFailed, UserError
from fedkern.run import main

INSTALLED = importlib.util.find_spec("flwr") is not None
FLWR = """
import os, pathlib, signal, sys
here = pathlib.Path(__file__)
calls = here.with_suffix("")
number = len(list(calls.iterdir()))
(calls / f"{number:03d}").write_text(" ".join(sys.argv[1:]))
if here.with_suffix(".interrupts").exists() and sys.argv[1] == "run":
    os.kill(os.getppid(), signal.SIGINT)
print((here.parent / f"{sys.argv[1]}-{number}.txt").read_text(), end="")
"""


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """Replace ``flwr`` by a script, and return functions that set its answers and list its calls."""
    script = tmp_path / "flwr.py"
    script.write_text(FLWR)
    script.with_suffix("").mkdir()
    monkeypatch.setattr(flower, "_FLWR", (str(script),))

    def answers(*given):
        for number, (name, text) in enumerate(given):
            (tmp_path / f"{name}-{number}.txt").write_text(text, encoding="utf-8")

    def questions():
        return [path.read_text() for path in sorted(script.with_suffix("").iterdir())]

    return answers, questions


def list_run(status, details="N/A"):
    return "Using SuperLink\n" + json.dumps({"success": True, "runs": [{"status": status, "status-details": details}]})


def test_flags_are_read():
    request = parse_words(
        ["flower", "project", "--run-config", "rounds=2", "--run-config", "lr=0.1", "--superlink", "hospital"]
    )
    assert str(request.folder) == "project"
    assert request.arguments["superlink"] == "hospital"
    assert request.arguments["run_config"] == ["rounds=2", "lr=0.1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs the folder of a Flower project."),
        (["p", "--superlink", ""], "--superlink is given without a value"),
        (["p", "--superlnk", "x"], 'does not take "--superlnk". Did you mean "--superlink"?'),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    assert main(["flower", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_help_shows_every_flag(capsys):
    assert main(["flower", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--superlink", "--federation-config", "--run-config", "pip install 'flwr>="):
        assert flag in shown


@pytest.mark.skipif(INSTALLED, reason="flwr is installed")
def test_without_flower_the_extra_is_named(tmp_path, capsys):
    assert main(["flower", str(tmp_path)]) == 2
    assert "needs Flower, which is not installed: pip install 'flwr>=" in capsys.readouterr().err


def test_a_run_whose_log_ends_early_is_waited_for(flwr, capsys):
    answers, asked = flwr
    answers(
        ("run", "Using SuperLink: x (y)\nSuccessfully started run 7\n\x1b[92mINFO\x1b[0m one\n\x1b]0;title\x07two\n"),
        ("ls", list_run("running")),
        ("ls", list_run("finished:completed")),
    )
    flower._play(["project", "hospital", "--run-config", "rounds=3"], ["hospital"])
    assert capsys.readouterr().out == "INFO one\n\\x1b]0;title\\x07two\n"
    assert asked() == [
        "run --stream project hospital --run-config rounds=3",
        "ls hospital --run-id 7 --format json",
        "ls hospital --run-id 7 --format json",
    ]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (list_run("finished:failed", "no reply counts"), "^Run 7 failed: no reply counts$"),
        (list_run("finished:stopped", "by user"), "^Run 7 stopped: by user$"),
        ("Connection to the SuperLink is unavailable.", "does not tell how run 7 goes on"),
    ],
)
def test_a_run_that_is_not_completed_has_failed(flwr, answer, sentence):
    answers, _ = flwr
    answers(("run", "Successfully started run 7\n"), ("ls", answer))
    with pytest.raises(RunFailed, match=sentence) as caught:
        flower._play(["project"], [])
    assert caught.value.exit_code == 1


def test_what_flower_refuses_is_one_sentence(flwr):
    answers, _ = flwr
    answers(
        ("run", "Using SuperLink: x (y)\n╭─ Error ───────╮\n│ The SuperLink │\n│ is away.      │\n╰───────────────╯\n")
    )
    with pytest.raises(UserError, match=r"^Flower: The SuperLink is away\.$") as caught:
        flower._play(["project"], [])
    assert caught.value.exit_code == 2


def test_ctrl_c_before_flower_has_answered_stops_the_run_all_the_same(flwr, tmp_path):
    answers, asked = flwr
    (tmp_path / "flwr.interrupts").touch()
    answers(("run", "Successfully started run 7\n"), ("stop", "{}"))
    with pytest.raises(KeyboardInterrupt):
        flower._play(["project", "hospital"], ["hospital"])
    assert asked()[1:] == ["stop 7 hospital"]


@pytest.mark.parametrize(
    ("configuration", "name", "simulated"),
    [
        (None, None, True),
        (None, "local", True),
        ('default = "here"\n[superlink.here]\naddress = ":local:"', "unknown", False),
        ('default = "here"\n[superlink.here]\naddress = ":local:"', None, True),
        ('default = "far"\n[superlink.far]\naddress = "h:1"', None, False),
        ('default = "here"\n[superlink.here]\naddress = ":local:"\n[superlink.far]\naddress = "h:1"', "far", False),
        (
            'default = "far"\n[superlink.far]\naddress = "h:1"\n[superlink.here]\noptions.num-supernodes = 3',
            "here",
            True,
        ),
    ],
)
def test_what_is_simulated_is_said_by_flowers_configuration(tmp_path, monkeypatch, configuration, name, simulated):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    if configuration is not None:
        (tmp_path / "config.toml").write_text(f"[superlink]\n{configuration}\n")
    assert flower._is_simulation(name) is simulated


@pytest.mark.flower
@pytest.mark.skipif(not INSTALLED, reason="flwr is not installed: pip install '.[flower]'")
def test_settings_of_a_simulation_do_not_go_to_a_superlink(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.far]\naddress = "h:1"\n')
    assert main(["flower", "p", "--superlink", "far", "--federation-config", "num-supernodes=3"]) == 2
    assert "--federation-config is for simulations: a SuperLink has the nodes" in capsys.readouterr().err
