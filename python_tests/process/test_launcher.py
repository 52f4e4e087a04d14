"""Tests of torchrun's variables in a process that torchrun has not started."""

import json
import os
import subprocess
import sys

import pytest

from fedkern.process import launcher
from fedkern.run import main

RUN = ["fedavg", "--data", "digits", "--clients", "2", "--train-samples", "60", "--model", "mlp", "--local-steps", "1",
       "--rounds", "1", "--quiet", "--grad-cam", "0"]  # fmt: skip
LEFT = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
ONE_BY_ONE = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from fedkern.run import main
found = []
for words in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(words)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
OF_A_RANK = """
import json, os, subprocess, sys
import torch
rank = os.environ["RANK"]
for name, words in json.loads(sys.argv[1]).items():
    done = subprocess.run([sys.executable, "-m", "fedkern.run", *words], capture_output=True, text=True)
    with open(f"{name}{rank}.json", "w") as file:
        json.dump([done.returncode, done.stdout, done.stderr], file)
"""


def left_over(*words, cwd, **change):
    """Run Python with these arguments in a shell with the variables of a finished torchrun."""
    environment = {**os.environ, **LEFT, "OMP_NUM_THREADS": "1", **change}
    return subprocess.run(
        ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, *words], cwd=cwd, env=environment, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip


def test_a_run_with_leftover_variables_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in LEFT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "_started_by_launcher", lambda: False)
    assert main([*RUN, "--out", "run"]) == 2
    sentence = "error: torchrun's variables are set, but torchrun did not start this process"
    assert capsys.readouterr().err.startswith(sentence)
    assert not (tmp_path / "run").exists()
    assert main(["list"]) == 0
    assert "fedavg" in capsys.readouterr().out
    assert os.environ[launcher.JOB] == LEFT[launcher.JOB]


@pytest.mark.exhaustive
def test_a_shell_with_leftover_variables_is_no_launcher(tmp_path):
    done = left_over("-m", "fedkern.run", *RUN, "--out", "run", cwd=tmp_path, RANK="0", LOCAL_RANK="0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: torchrun's variables are set, but torchrun did not start this process")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_other_commands_and_mistakes_are_told(tmp_path):
    asked = json.dumps([["list", "--json"], ["fedavg", "--modle", "x"]])
    (_, listed, _), (code, _, said) = json.loads(left_over("-c", ONE_BY_ONE, asked, cwd=tmp_path).stdout)
    assert "fedavg" in json.loads(listed)["methods"]
    assert code == 2
    assert "--modle" in said


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["run", "list"])
def test_a_child_of_a_rank_is_no_rank(name, tmp_path):
    (tmp_path / "script.py").write_text(OF_A_RANK)
    asked = json.dumps({name: ["list", "--json"] if name == "list" else [*RUN, "--out", "run"]})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        [*launch, asked], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        code, out, err = json.loads((tmp_path / f"{name}{rank}.json").read_text())
        if name == "list":
            assert (code, "fedavg" in out) == (0, True)
        else:
            assert code == 2
            assert "unset TORCHELASTIC_RUN_ID" in err
