"""Complete runs from the command line: output, files, interruption and resumption."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkern.cli import flags, request
from fedkern.report.figures import pictures
from fedkern.report.live import progress_bar
from fedkern.run import main

SMALL = ["--train-samples", "60", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4"]
TINY = [*SMALL, "--rounds", "2", "--grad-cam", "8"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Return the folder of a finished FedGID run, its output and its errors."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert main(["fedgid", *TINY, "--out", str(folder)]) == 0
    return folder, out.getvalue(), err.getvalue()


def test_a_run_leaves_its_folder_and_says_how_it_ended(finished_run):
    folder, out, err = finished_run
    assert {path.name for path in folder.iterdir()} >= {
        "config.toml", "metrics.jsonl", "summary.json", "model.safetensors",
        "accuracy.png", "confusion.png", "confusion.json", "partition.png", "gradcam.png",
    }  # fmt: skip
    assert "predictions.csv" not in {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    for part in (
        "accuracy", "balanced accuracy", "AUROC", "lowest recall among 10 classes", "in distribution",
        "out of distribution", "time per round", "Grad-CAM mass inside",
    ):  # fmt: skip
        assert part in out
    assert f"{100 * summary['metrics']['ood_accuracy']:.1f} %" in out
    assert f"run folder: {folder}" in out
    (command,) = re.findall(r"python -m fedkern\.run fedavg .*", out)
    compared = request.effective_config(flags.parse_run(shlex.split(command)[3:]))
    assert (compared.train_samples, compared.clients, compared.width, compared.rounds) == (60, 2, 4, 2)
    assert "round 1/2" in err
    assert "\x1b" not in out + err  # no colours into a pipe
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert {"seconds", "bytes_up", "bytes_down", "id_accuracy", "ood_accuracy"} <= set(records[0])


@pytest.mark.usefixtures("undrawn")
def test_json_is_alone_on_standard_output(result, tmp_path):
    out, err = result("fedavg", *TINY, "--json", "--out", "here")
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "here" / "summary.json").read_text())
    assert {"method", "data", "seed", "rounds", "metrics", "bytes", "seconds", "versions"} <= set(summary)
    assert "round" not in err.replace("background", "")


@pytest.mark.usefixtures("undrawn")
def test_quiet_leaves_the_folder_and_its_default_name(result, tmp_path):
    out, _ = result("fedavg", *TINY, "--quiet")
    assert re.fullmatch(r"runs/fedavg-colordigits-\d{8}-\d{6}\n", out)
    assert (tmp_path / out.strip() / "summary.json").exists()


def test_a_finished_run_resumes_to_the_same_summary(result, finished_run):
    folder, _, _ = finished_run
    before = (folder / "summary.json").read_bytes()
    (folder / "gradcam.png").unlink()
    out, _ = result("--resume", str(folder))
    assert (folder / "summary.json").read_bytes() == before
    assert "time per round" in out
    assert (folder / "gradcam.png").exists()  # drawn again


def test_a_folder_of_another_configuration(fails, result, finished_run):
    folder, _, _ = finished_run
    sentence = fails("fedgid", "--lr", "0.01", "--resume", str(folder))
    assert "lr: 0.05 -> 0.01" in sentence
    assert "alpha" in fails("--resume", str(folder), "--method-option", "alpha=0.1")
    assert "method: fedgid -> fedavg" in fails("fedavg", "--resume", str(folder))
    assert "already holds a run" in fails("fedavg", *TINY, "--out", str(folder))
    # Repeating what is stored is no mistake.
    result("fedgid", "--rounds", "2", "--resume", str(folder))


@pytest.mark.usefixtures("undrawn")
def test_a_run_goes_on_from_another_folder_and_with_moved_data(result, fails, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 30)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / "files" / f"{name}-{kind}-ubyte"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes())
    words = [word for word in TINY if word not in ("--train-samples", "60")]
    out, _ = result("fedgid", "--data", "colormnist", "--data-root", "files", *words, "--out", "run")
    assert f"--data-root {tmp_path / 'files'}" in out  # the command for comparison works anywhere
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if killed before the first record
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "files").rename(tmp_path / "moved")
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    assert "files" in fails("--resume", "../run")
    result("--resume", "../run", "--data-root", "../moved", "--quiet")


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.exhaustive),
        (signal.SIGTERM, 143, "terminated"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_signal_ends_in_one_line_that_says_how_to_resume(capsys, monkeypatch, tmp_path, number, code, word):
    on_round = progress_bar.Lines.on_round

    def stop(self, record):
        on_round(self, record)
        if record["round"] == 1:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(progress_bar.Lines, "on_round", stop)
    assert main(["fedavg", *TINY, "--out", "stopped here"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"{word}; continue with: python -m fedkern.run --resume 'stopped here'"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "stopped here", "--quiet"]) == 0


def test_too_little_memory_is_one_sentence(fails, monkeypatch):
    def greedy():
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("fedkern.cli.commands.run.check_backend", greedy)
    assert "the machine has not enough memory; use a smaller --batch-size" in fails("fedavg", *TINY, "--out", "out")


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_one_sentence(fails, result, monkeypatch, tmp_path):
    write_bytes = Path.write_bytes
    written = 0

    def full(self, content):
        nonlocal written
        if "full" in self.parts:
            written += 1
            if written > 3:
                write_bytes(self, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_bytes(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "the disk is full" in fails("fedavg", *TINY, "--out", "full")
    assert written > 3
    assert not list((tmp_path / "full").rglob("*.part"))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    result("--resume", "full", "--quiet")


def test_a_disk_that_fills_up_while_drawing_keeps_the_run(capsys, result, monkeypatch, tmp_path):
    write_bytes = Path.write_bytes

    def full(self, content):
        if ".png" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert main(["fedavg", *SMALL, "--rounds", "1", "--grad-cam", "0", "--out", "full", "--quiet"]) == 2
    out, sentence = capsys.readouterr()
    assert out == "full\n"
    assert "complete" in sentence
    assert "--resume full" in sentence
    assert not list((tmp_path / "full").glob("*.png"))
    result("--resume", "full", "--quiet")
    assert len(list((tmp_path / "full").glob("*.png"))) == 3


def test_ctrl_c_while_drawing_comes_after_the_result(capsys, finished_run, monkeypatch):
    folder, _, _ = finished_run
    told = []

    def stop(*_):
        told.append(capsys.readouterr().out)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pictures, "find_pictures", lambda _: [])
    monkeypatch.setattr(pictures, "_draw", stop)
    assert main(["--resume", str(folder), "--quiet", "--report"]) == 130
    assert told == [f"{folder}\n"]
    out, err = capsys.readouterr()
    again = f"draw its pictures with: python -m fedkern.run --resume {folder} --report"
    assert (out, err.splitlines()[-1]) == ("", f"interrupted; the run is complete, {again}")


def test_an_unwritable_folder(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails("fedavg", *TINY, "--out", "file/below")
    assert "file is a file" in fails("fedavg", *TINY, "--out", "file")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, (None, "10000")), ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)), ({"GOMP_SPINCOUNT": "5"}, (None, "5"))],
)
def test_threads_spin_for_a_moment_unless_told_otherwise(chosen, expected):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-m", "fedkern.run", "doctor", "--json"],
        stdout=subprocess.PIPE, text=True, timeout=60, check=True, env={**environment, **chosen},
    )  # fmt: skip
    found = json.loads(done.stdout)["threads"]
    assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"]) == expected
