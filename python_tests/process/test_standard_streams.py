"""Tests of commands with closed or full standard streams, and of torchrun's variables in other processes."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fedkern.process import launcher
from fedkern.process.standard_streams import print_result, results_alone
from fedkern.run import main
from python_tests.plugin_sources import unload_all

RUN = f"{sys.executable} -m fedkern.run"
TINY = ("fedavg --data digits --train-samples 60 --clients 2 --model mlp --threads 1 --grad-cam 0 --local-steps 1 "
        "--rounds 1")  # fmt: skip


def shell(words, folder):
    return subprocess.run(["bash", "-c", words], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("where", [
    "<&- >&- 2>&-",
    *(pytest.param(where, marks=pytest.mark.exhaustive)
      for where in (">/dev/full 2>/dev/full", ">&- 2>&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full")),
])  # fmt: skip
def test_a_run_goes_on(where, tmp_path):
    done = shell(f"{RUN} {TINY} --workers 2 --out run {where}", tmp_path)
    assert done.returncode == (">/dev/full" in where.split())
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full", ">&- 2>&-"])
@pytest.mark.parametrize("command", [
    "--version", *(pytest.param(command, marks=pytest.mark.exhaustive) for command in ("doctor", "no-such-command")),
])  # fmt: skip
def test_other_commands_neither(command, where, tmp_path):
    done = shell(f"{RUN} {command} {where}", tmp_path)
    assert done.returncode == (2 if command == "no-such-command" else where == ">/dev/full")
    assert "Traceback" not in done.stdout + done.stderr
    assert where != ">/dev/full" or command == "no-such-command" or "No space left" in done.stderr


def test_a_reader_that_has_gone_still_ends_a_command(tmp_path):
    done = shell(f"(sleep 0.2; exec {RUN} --version) | true; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def noise(how):
    """Print one line on standard output."""
    if how == "print":
        print("noise", flush=True)
    elif how == "descriptor":
        os.write(1, b"noise\n")
    elif how == "C":
        ctypes.CDLL(None).puts(b"noise")
    elif how == "child":
        subprocess.run(["echo", "noise"], check=True)
    elif how == "error":
        print("noise", flush=True)
        raise LookupError


@pytest.mark.parametrize("how", ["print", "descriptor", "C", "child", "error"])
def test_standard_output_takes_results_alone(how, capfd):
    with contextlib.suppress(LookupError), results_alone():
        noise(how if how != "error" else "print")
        print_result({"figures": [1, 0.5]})
        noise(how)
        print_result("a text")
        noise(how if how != "error" else "print")
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    expected = json.dumps({"figures": [1, 0.5]}, indent=2) + "\n"
    assert out == (expected if how == "error" else expected + "a text\n")
    assert err == "noise\n" * (2 if how == "error" else 3)
    noise("print" if how == "error" else how)
    ctypes.CDLL(None).fflush(None)
    print_result("outside")
    assert capfd.readouterr() == ("noise\noutside\n", "")


LOUD = '''\
import os, subprocess, torch
from torch import nn
import fedkern
from fedkern.data import Source, memory_pool
print("import")
os.write(1, b"import by descriptor\\n")


@fedkern.register_data("loud")
def loud(seed=0):
    """Data."""
    print("data")
    subprocess.run(["echo", "a child"])
    labels = torch.arange(24) % 2
    images = (labels * 200)[:, None, None, None].expand(24, 1, 8, 8).contiguous().to(torch.uint8)
    pool = memory_pool(images, labels, "train")
    return Source(classes=("a", "b"), train=pool, validation=memory_pool(images[:4], labels[:4], "validation"),
                  tests={"": memory_pool(images[:8], labels[:8], "test")}, mean=(0.5,), std=(0.5,), augment="none")


@fedkern.register_metric("noise")
def metric(logits, labels):
    """A share."""
    print("metric")
    return 0.5


@fedkern.register_model("talker")
class Net(nn.Module):
    """A network."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        print("forward")
        return self.head(x.flatten(1))
'''
RUNNING = ["--data", "loud", "--plugin", "loud.py", "--model", "talker", "--clients", "2", "--rounds", "1",
           "--local-epochs", "1", "--grad-cam", "0", "--threads", "1"]  # fmt: skip


def run_json(words, folder):
    """Return what a command prints as JSON, and on standard error."""
    done = subprocess.run([sys.executable, "-m", "fedkern.run", *words, "--json"], cwd=folder, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("words", [["list"], ["fedavg", "--help"]])
def test_a_plugin_that_prints_leaves_standard_output_alone(words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("loud.py").write_text(LOUD)
    try:
        assert main(["--json", *words, "--plugin", "loud.py"]) == 0
    finally:
        unload_all()
    out, err = capfd.readouterr()
    assert sorted(err.splitlines()) == ["import", "import by descriptor"]
    assert "--json" in out if "--help" in words else json.loads(out)["models"]["talker"] == "A network."


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_command_with_json_prints_json_alone(workers, tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    found, err = run_json(["fedavg", *RUNNING, "--workers", workers, "--out", "run"], tmp_path)
    assert found["method"] == "fedavg"
    for line in ("import", "import by descriptor", "data", "a child", "metric", "forward"):
        assert line in err.splitlines()
    image = tmp_path / "image.png"
    Image.new("L", (8, 8), 200).save(image)
    again = ["--plugin", "loud.py"]
    for words in (["evaluate", "run"], ["predict", "run", str(image)], ["attack", "run"], ["report", "run"],
                  ["export", "run", "--format", "state-dict"], ["extend", "run", "--rounds", "2"]):  # fmt: skip
        _, err = run_json([*words, *again], tmp_path)
        assert "import" in err.splitlines()
    found, err = run_json(
        ["compare", "fedavg", "fedprox", *RUNNING, "--workers", workers, "--seeds", "1", "--out", "both"], tmp_path
    )
    assert len(found["table"]) == 2
    assert "forward" in err.splitlines()


# -- launcher ----------------------------------------------------------------------------------------------------------


QUIET = ["fedavg", "--data", "digits", "--clients", "2", "--train-samples", "60", "--model", "mlp", "--local-steps",
         "1", "--rounds", "1", "--quiet", "--grad-cam", "0"]  # fmt: skip
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
    assert main([*QUIET, "--out", "run"]) == 2
    sentence = "error: torchrun's variables are set, but torchrun did not start this process"
    assert capsys.readouterr().err.startswith(sentence)
    assert not (tmp_path / "run").exists()
    assert main(["list"]) == 0
    assert "fedavg" in capsys.readouterr().out
    assert os.environ[launcher.JOB] == LEFT[launcher.JOB]


@pytest.mark.exhaustive
def test_a_shell_with_leftover_variables_is_no_launcher(tmp_path):
    done = left_over("-m", "fedkern.run", *QUIET, "--out", "run", cwd=tmp_path, RANK="0", LOCAL_RANK="0")
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
    asked = json.dumps({name: ["list", "--json"] if name == "list" else [*QUIET, "--out", "run"]})
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
