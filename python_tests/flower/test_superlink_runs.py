"""Connections, projects and logs of Flower's runs, without Flower; `flwr` itself is a script of the test's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedkern.errors import RunFailed, UserError
from fedkern.flower import superlink_runs
from fedkern.flower.local_superlink import end_all, processes_of
from fedkern.flower.superlink_runs import Connection, Submitted, own_connection, tracebacks

PROJECT = '[project]\nname = "p"\n\n[tool.flwr.app]\npublisher = "me"\n'
CONFIGURATION = """
[superlink]
default = "hospital"

[superlink.hospital]
address = "superlink.example:443"

[superlink.here]
address = ":local:"
"""
FLWR = """
import json, pathlib, sys
here = pathlib.Path(__file__)
calls = here.with_suffix("")
earlier = [json.loads(path.read_text()) for path in sorted(calls.iterdir())]
(calls / f"{len(earlier):03d}").write_text(json.dumps(sys.argv[1:]))
answers = json.loads(here.with_suffix(".json").read_text())[sys.argv[1]]
print(answers[sum(words[0] == sys.argv[1] for words in earlier)], end="")
"""
SLEEPS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={}, start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(folder))
    return folder


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """Lets a script stand in for ``flwr``: the functions that set its answers and tell what it was asked."""
    script = tmp_path / "flwr.py"
    script.write_text(FLWR)
    script.with_suffix("").mkdir()
    real = subprocess.Popen
    monkeypatch.setattr(
        superlink_runs.subprocess, "Popen",
        lambda command, **named: real([sys.executable, str(script), *command[4:]], **named),
    )  # fmt: skip
    monkeypatch.setattr(superlink_runs, "_PAUSE", 0.01)

    def answers(**by_command):
        texts = {
            name: [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
            for name, entries in by_command.items()
        }
        script.with_suffix(".json").write_text(json.dumps(texts))

    def asked():
        return [json.loads(path.read_text()) for path in sorted(script.with_suffix("").iterdir())]

    return answers, asked


def listed(status, details=""):
    return {"success": True, "runs": [{"run-id": "7", "status": status, "status-details": details}]}


def test_a_name_or_the_default_is_found_in_the_users_configuration(home):
    (home / "config.toml").write_text(CONFIGURATION)
    assert superlink_runs.find_connection(None) == Connection(home, "hospital", "superlink.example:443")
    here = superlink_runs.find_connection("here")
    assert here.simulated
    assert superlink_runs.find_connection("10.0.0.1:8000") is None
    with pytest.raises(
        UserError, match=r'no SuperLink connection "hospitl": .*config.toml has hospital, here. Did you'
    ):
        superlink_runs.find_connection("hospitl")


def test_without_a_configuration_there_is_no_default(home):
    assert superlink_runs.find_connection(None) is None
    with pytest.raises(UserError, match=r"has none\. Name one of them, or give the SuperLink's address as HOST:PORT"):
        superlink_runs.find_connection("hospital")


def test_a_damaged_configuration_is_named(home):
    (home / "config.toml").write_text("[superlink\n")
    with pytest.raises(UserError, match=r"config.toml is not a TOML file \(.*\): correct it"):
        superlink_runs.find_connection(None)


def test_a_configuration_of_ones_own_is_what_the_user_would_write(home, tmp_path):
    made = own_connection(home, "127.0.0.1:8000", insecure=True)
    assert superlink_runs.find_connection(None) == made
    assert "insecure = true" in (home / "config.toml").read_text()
    authority = tmp_path / "authority.pem"
    with pytest.raises(UserError, match=r"authority\.pem is not a file: give --root-certificates the authority's PEM"):
        own_connection(home, "127.0.0.1:8000", certificates=authority)
    authority.touch()
    own_connection(home, "127.0.0.1:8000", certificates=authority)
    assert f'root-certificates = "{authority}"' in (home / "config.toml").read_text()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is no Flower project, as it has no pyproject.toml"),
        ("[project", "is not a TOML file"),
        ('[project]\nname = "p"\n', r"has no section \[tool.flwr.app\]"),
        (f"{PROJECT}[tool.flwr.federations]\ndefault = 'x'\n", r"has the section \[tool.flwr.federations\]"),
    ],
)
def test_what_is_no_project_is_named(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        superlink_runs.check_project(tmp_path)


def test_a_fedkern_project_says_how_many_nodes_it_needs(tmp_path):
    whole = (
        f"{PROJECT}[tool.flwr.app.components]\nserverapp = 'fedkern.flower.server_app:app'\n[tool.flwr.app.config]\n"
    )
    for text, count in ((PROJECT, None), (f"{whole}clients = 3\n", 3), (f"{whole}clients = ''\n", 0)):
        (tmp_path / "pyproject.toml").write_text(text)
        assert superlink_runs.clients_of(superlink_runs.check_project(tmp_path)) == count


def test_a_run_is_followed_to_its_end_over_a_lost_connection(home, flwr, tmp_path):
    """The second stream begins with the first line again, and only what is new is shown."""
    answers, asked = flwr
    answers(
        run=[{"success": True, "run-id": "7"}],
        log=["Using SuperLink: x (y)\none\ntw", "Using SuperLink: x (y)\none\ntwo\nthree\n"],
        ls=[listed("running"), listed("finished:completed")],
    )
    connection = own_connection(home, "127.0.0.1:1", insecure=True)
    submitted = Submitted.start(connection, tmp_path, run_config=["rounds=3"], federation="@me/mine")
    shown = []
    outcome = submitted.follow(shown.append)
    assert "".join(shown) == outcome.log == "one\ntwo\nthree\n"
    assert outcome.completed
    assert asked()[0] == [
        "run", str(tmp_path), "fedkern", "--federation", "@me/mine", "--run-config", "rounds=3", "--format", "json",
    ]  # fmt: skip
    assert asked()[2] == ["ls", "fedkern", "--run-id", "7", "--format", "json"]


def test_a_run_that_flower_refuses_is_one_sentence(home, flwr, tmp_path):
    answers, _ = flwr
    refused = "Using SuperLink: x (y)\n\nConnection to the SuperLink is unavailable."
    answers(run=[{"success": False, "error-message": refused}])
    with pytest.raises(UserError, match=r"^Flower: Connection to the SuperLink is unavailable\.$"):
        Submitted.start(own_connection(home, "127.0.0.1:1"), tmp_path)


def test_a_superlink_that_has_gone_ends_the_wait(home, flwr):
    answers, asked = flwr
    answers(log=[""] * 9, ls=[{"success": False, "error-message": "gone"}] * 9)
    with pytest.raises(RunFailed, match="no longer tells how run 7 goes on: Flower: gone"):
        Submitted(own_connection(home, "127.0.0.1:1"), "7").follow(lambda line: None)
    assert sum(words[0] == "ls" for words in asked()) == 5


def test_tracebacks_are_found_in_a_log():
    log = (
        "\x1b[92mINFO \x1b[0m:      fine\n"
        "\x1b[93mWARNING \x1b[0m: the reply of node 5 is an error: <'Traceback (most recent call last):\n"
        '  File "client_app.py", line 3, in fit\n    1 / 0\nZeroDivisionError: division by zero\n\'>: left out.\n'
        "(ClientAppActor pid=12) Traceback (most recent call last):\n"
        '(ClientAppActor pid=12)   File "x.py", line 1, in f\n'
        "(ClientAppActor pid=12) KeyError: 'k'\n"
        "(ClientAppActor pid=12) \n"
        "(ClientAppActor pid=12) The above exception was the direct cause of the following exception:\n"
        "(ClientAppActor pid=12) \n"
        "(ClientAppActor pid=12) Traceback (most recent call last):\n"
        '(ClientAppActor pid=12)   File "x.py", line 2, in g\n'
        "(ClientAppActor pid=12) ValueError: no\n"
        "more\n"
    )
    first, second = tracebacks(log)
    assert first.startswith("Traceback (most recent call last):\n  File")
    assert first.endswith("ZeroDivisionError: division by zero")
    assert second.splitlines()[2] == "KeyError: 'k'"
    assert second.endswith("ValueError: no")
    assert tracebacks("no fault here\n") == []


def test_all_processes_of_a_folder_end_and_no_others(tmp_path):
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    mine, other = tmp_path / "mine", tmp_path / "mine-not"
    started = [
        subprocess.Popen([sys.executable, "-c", SLEEPS], env={**os.environ, "FLWR_HOME": str(folder)})
        for folder in (mine / "node", other)
    ]
    try:
        limit = time.monotonic() + 30
        while len(processes_of(mine)) < 2 or len(processes_of(other)) < 2:
            assert time.monotonic() < limit
            time.sleep(0.05)
        end_all(mine)
        assert processes_of(mine) == []
        assert len(processes_of(other)) == 2
    finally:
        end_all(mine)
        end_all(other)
        for process in started:
            process.wait()
