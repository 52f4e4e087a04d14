"""The command line under Python's options, terminal variables, and in a deleted folder."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.exhaustive  # every test is two or three whole commands

RUN = ["fedavg", "--data", "digits", "--clients", "3", "--train-samples", "90", "--model", "mlp", "--local-steps", "1",
       "--rounds", "2", "--grad-cam", "0"]  # fmt: skip


def call(*words, python=(), cwd=None, shell="", **variables):
    command = [sys.executable, *python, "-m", "fedkern.run", *map(str, words)]
    if shell:
        command = ["sh", "-c", f'{shell}; exec "$0" "$@"', *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )


@pytest.mark.parametrize("python", [("-OO", "-I"), ("-OO",), ("-O",), ("-I",)], ids=" ".join)
def test_optimised_and_isolated_python(python, tmp_path):
    listed, plain = call("list", python=python, cwd=tmp_path), call("list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == plain.stdout


def test_a_script_without_docstrings_and_its_workers(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('a module that hides a standard one')\n")
    script = (
        "import fedkern\n"
        "run = fedkern.simulate('scaffold', data='digits', clients=3, train_samples=90, model='mlp', rounds=2,\n"
        "    local_steps=1, workers=2, out='run', progress=False, pictures=False)\n"
        "print(sorted(run.summary['diagnostics']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-OO", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "workers" not in done.stdout
    assert "hides" not in done.stderr


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_cursor_moves_in_a_file(name, monkeypatch, result):
    monkeypatch.setenv(name, "1")
    written = "".join(result(*RUN, "--out", "run"))
    assert "\r" not in written
    assert "\x1b" not in written


@pytest.mark.parametrize("words", [["list"], [*RUN, "--quiet"], ["compare", *RUN]], ids=lambda words: words[0])
def test_a_deleted_working_folder_is_one_sentence(words, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = call(*words, "--out", tmp_path / "out", cwd=gone, shell=f"rmdir {gone}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: The working folder has been deleted")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("call", ["simulate('fedavg', out=OUT)", "compare(['fedavg'], seeds=1, out=OUT)"])
def test_a_script_in_a_deleted_working_folder_is_told(call, tmp_path):
    script = (
        "import os, sys, tempfile; gone = tempfile.mkdtemp(); os.chdir(gone); sys.path.insert(0, ''); import fedkern\n"
        f"OUT = {str(tmp_path / 'out')!r}; os.rmdir(gone); fedkern.{call}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "UserError: The working folder has been deleted" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_locale_that_cannot_read_a_name_is_told(tmp_path):
    variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = call(*RUN, "--out", tmp_path / "r\u00fcn", cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert "set PYTHONUTF8=1" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_standard_output_cannot_show_are_escaped(encoding, tmp_path):
    rng = np.random.default_rng(0)
    for site, kind in itertools.product(("Charit\u00e9", "\u65e5\u672c"), ("na\u00efve", "\u03b2")):
        folder = tmp_path / "data" / site / kind
        folder.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"\u00e9{i}.png")
    data = ["--data", "folder", "--data-root", "data", "--data-option", "size=8", "--data-option", "layout=sites"]
    run = ["fedavg", *data, "--rounds", "1", "--model", "mlp", "--grad-cam", "0"]
    commands = [
        [*run, "--out", "r\u00fcn"], ["evaluate", "r\u00fcn", "--json"], ["report", "r\u00fcn"],
        ["export", "r\u00fcn", "--format", "state-dict"], ["compare", "r\u00fcn"], ["evaluate", "\u65e5"],
    ]  # fmt: skip
    script = (
        "import json, sys; from fedkern.run import main; codes = []\n"
        "for words in json.loads(sys.argv[1]): sys.argv = ['fedkern', *words]; codes.append(main())\n"
        "sys.exit(str(codes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}, check=False, errors="replace",
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0, 0, 2]", done.stderr


@pytest.mark.parametrize(("delta", "told"), [("0.34", True), ("0.01", False)])
def test_a_delta_of_one_in_the_clients_is_told(delta, told, tmp_path, result):
    _, err = result(*RUN, "--dp-clip", "0.5", "--dp-noise", "8", "--dp-delta", delta, "--out", str(tmp_path / "run"))
    assert ("one in the number of clients (3)" in " ".join(err.split())) == told
