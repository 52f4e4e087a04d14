"""The command line, as a user meets it."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedkern.cli import flags
from fedkern.engine import RunConfig
from fedkern.methods import METHODS
from fedkern.report import plots, progress
from fedkern.run import main

SMALL = ["--train-samples", "60", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4"]
TINY = [*SMALL, "--rounds", "2", "--grad-cam", "8"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in an empty folder of its own, free of the caller's environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("FEDKERN_BACKEND", "FEDKERN_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def fails(capsys, *argv: str) -> str:
    """Runs a command that must end in one sentence and exit code 2, and returns the sentence."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert sentence.endswith((".", "?"))
    return sentence


def result(capsys, *argv: str) -> tuple[str, str]:
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    return out, err


# -- help, list, doctor ------------------------------------------------------------------------------------------------


def test_help_names_every_setting(capsys):
    text, _ = result(capsys, "--help")
    for knob in RunConfig.knobs():
        if knob.field != "method":
            assert re.search(rf"^  {flags.flag(knob.field)} ", text, re.MULTILINE), knob.field
    for name in (
        "--protocol F7|L7",
        "--detector PATH_OR_NAME",
        "--boxes FILE",
        "--method-option key=value",
        "--resume DIR",
    ):
        assert name in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_help_shows_the_defaults_of_the_data_set(capsys):
    for argv in (["fedavg", "--data", "nico", "--help"], ["fedavg", "--help", "--data=nico"]):
        text, _ = result(capsys, *argv)
        assert re.search(r"--model NAME .*default resnet18", text)
    assert re.search(r"--model NAME .*default cnn", result(capsys, "--help")[0])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_help_of_a_method_shows_its_options_with_ranges(capsys, method):
    text, _ = result(capsys, method, "--help")
    assert METHODS[method].description in text
    options = text[text.index("method options") :]
    flat = " ".join(options.split())
    for knob in METHODS[method].Options.knobs():
        assert re.search(rf"^  {knob.name} ", options, re.MULTILINE)
        assert knob.range in flat


def test_list_has_one_line_for_everything(capsys):
    text, _ = result(capsys, "list")
    for name in ("fedavg", "fedprox", "fedgid", "colordigits", "nico", "resnet18", "dirichlet:ALPHA", "classes:S"):
        assert re.search(rf"^  {re.escape(name)}", text, re.MULTILINE)
    found = json.loads(result(capsys, "list", "--json")[0])
    assert set(found) == {"methods", "data sets", "models", "partitioners"}
    assert all(text and "\n" not in text for entries in found.values() for text in entries.values())


def test_doctor(capsys):
    text, _ = result(capsys, "doctor")
    for word in ("torch", "processor", "threads", "GPU", "reference"):
        assert word in text
    report = json.loads(result(capsys, "doctor", "--json")[0])
    assert report["threads"]["torch"] == torch.get_num_threads()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["Which method", "fedgid"]),
        (["fedgidd"], ['"fedgidd"', 'Did you mean "fedgid"']),
        (["doctr"], ['Did you mean "doctor"']),
        (["fedgid", "--roundz", "3"], ['"--roundz"', 'Did you mean "--rounds"']),
        (["--roundz", "3"], ['"--roundz"', 'Did you mean "--rounds"']),
        (["--methodoption=alpha=1", "fedgid"], ['"--methodoption"', 'Did you mean "--method-option"']),
        (["fedgid", "more"], ['"more"']),
        (["fedgid", "--lr"], ["--lr"]),
        (["fedgid", "--rounds", "many"], ["--rounds", "integer", '"many"']),
        (["fedgid", "--rounds", "0"], ["--rounds", "at least 1"]),
        (["fedgid", "--sample-fraction", "1.5"], ["--sample-fraction"]),
        (["fedgid", "--correlation", "-0.1"], ["--correlation"]),
        (["fedgid", "--on-nan", "skipp"], ["--on-nan", 'Did you mean "skip"']),
        (["fedgid", "--buffers", "mean"], ["--buffers", "average, local, drop"]),
        (["fedgid", "--method-option", "alpah=1"], ['"alpah"', 'Did you mean "alpha"']),
        (["fedgid", "--method-option", "alpha=1.5"], ['"alpha"', "[0, 1]"]),
        (["fedgid", "--method-option", "alpha=-0.01"], ['"alpha"', "[0, 1]"]),
        (["fedgid", "--method-option", "alpha=nan"], ['"alpha"', "[0, 1]"]),
        (["fedgid", "--method-option", "alpha"], ["key=value"]),
        (["fedgid", "--data", "colourdigits"], ['"colourdigits"', 'Did you mean "colordigits"']),
        (["fedgid", "--data-option", "sise=3"], ['"sise"']),
        (["fedgid", "--protocol", "F7"], ["protocol"]),
        (["fedgid", "--model", "resnet-18"], ['"resnet-18"', 'Did you mean "resnet18"']),
        (["fedgid", "--partition", "dirichelt:1"], ['"dirichelt:1"', 'Did you mean "dirichlet"']),
        (["fedgid", "--partition", "dirichlet:0"], ["positive"]),
        (["fedgid", "--clients", "2000"], ["2000"]),
        (["fedgid", "--train-samples", "3", "--clients", "5"], ["5"]),
        (["fedavg", "--data", "mnist"], ["--data-root"]),
        (["fedavg", "--data", "mnist", "--data-root", "nowhere"], ["nowhere"]),
        (["fedgid", "--config", "none.toml"], ["none.toml"]),
        (["--resume", "nowhere"], ["nowhere", "config.toml"]),
        (["--resume", "nowhere", "--out", "there"], ["--out"]),
        (["list", "--rounds", "3"], ["list"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(capsys, tmp_path, argv, parts):
    sentence = fails(capsys, *argv)
    for part in parts:
        assert part in sentence
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_damaged_file_is_named(capsys, tmp_path):
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name in names:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x03 not an IDX file"))
    sentence = fails(capsys, "fedavg", "--data", "mnist", "--data-root", str(tmp_path))
    assert "idx" in sentence
    assert not (tmp_path / "runs").exists()


def test_a_config_file_with_a_mistake(capsys, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("roundz = 3\n")
    assert '"roundz"' in (sentence := fails(capsys, "fedavg", "--config", str(path)))
    assert 'Did you mean "rounds"' in sentence
    path.write_text("rounds = \n")
    assert "settings.toml" in fails(capsys, "fedavg", "--config", str(path))
    path.write_text("[options]\nalpah = 0.5\n")
    assert '"alpah"' in fails(capsys, "fedgid", "--config", str(path))
    path.write_bytes(b"\xff\xfe")
    assert "settings.toml" in fails(capsys, "fedgid", "--config", str(path))


@pytest.mark.parametrize(("name", "value"), [("FEDKERN_BACKEND", "tpu"), ("FEDKERN_CPU_ISA", "avx1024")])
def test_a_backend_that_does_not_exist(capsys, monkeypatch, name, value):
    from fedkern.ops import backend

    if name == "FEDKERN_CPU_ISA":
        pytest.importorskip("fedkern._cpu", reason="the compiled core is not built")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend, "_isa_applied", False)
    sentence = fails(capsys, "fedavg", *TINY)
    assert name in sentence
    assert value in sentence


# -- what is asked for is what runs ------------------------------------------------------------------------------------


def test_flags_override_the_config_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('method = "fedgid"\nrounds = 7\nlr = 0.2\n[options]\nalpha = 0.9\ngd_ramp = 3\n')
    config = flags.effective(flags.parse(["--config", str(path), "--lr", "0.3", "--method-option", "alpha=0.8"]))
    assert (config.method, config.rounds, config.lr) == ("fedgid", 7, 0.3)
    assert (config.options["alpha"], config.options["gd_ramp"]) == (0.8, 3)
    assert config.batch_size == RunConfig.make("fedgid").batch_size
    # Another method keeps the settings; the options were not meant for it.
    other = flags.effective(flags.parse(["fedavg", "--config", str(path)]))
    assert (other.method, other.rounds, other.lr) == ("fedavg", 7, 0.2)


def test_data_options_have_flags():
    request = flags.parse(["fedgid", "--data", "nico", "--protocol", "L7", "--data-option", "part=Animal"])
    assert request.data_options == {"protocol": "L7", "part": "Animal"}


@pytest.mark.parametrize(
    "argv",
    [
        ["fedgid"],
        ["fedgid", "--correlation", "0.8", "--seed", "3", "--clients", "4", "--train-samples", "500"],
        ["fedgid", "--data", "digits", "--partition", "dirichlet:0.3", "--rounds", "9", "--model", "resnet8"],
        ["fedprox", "--data", "nico", "--protocol", "L7", "--data-root", "a folder", "--method-option", "mu=0.5"],
        ["fedgid", "--lr", "0.123", "--data-option", "test_samples=50"],
    ],
)
def test_the_command_for_comparison_has_the_same_split_and_budget(argv):
    config = flags.effective(flags.parse(argv))
    command = flags.command_line("fedavg", config)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "fedkern.run", "fedavg"]
    other = flags.effective(flags.parse(words[3:]))
    assert other.method == "fedavg"
    own = RunConfig.make(config.method, data=config.data)
    for field in dataclasses.fields(RunConfig):
        same = getattr(config, field.name) == getattr(own, field.name)
        if field.name in ("method", "options") or (field.name in ("lr", "weight_decay", "momentum") and same):
            continue
        assert getattr(other, field.name) == getattr(config, field.name), field.name


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished FedGID run, its output and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "fedkern.run", "fedgid", *TINY, "--out", str(folder)],
        capture_output=True, text=True, timeout=120, check=False, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_a_run_leaves_its_folder_and_says_how_it_ended(finished):
    folder, out, err = finished
    assert {path.name for path in folder.iterdir()} >= {
        "config.toml", "metrics.jsonl", "summary.json", "model.safetensors",
        "accuracy.png", "partition.png", "gradcam.png",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    for part in ("accuracy", "in distribution", "out of distribution", "time per round", "Grad-CAM mass inside"):
        assert part in out
    assert f"{100 * summary['metrics']['ood_accuracy']:.1f} %" in out
    assert f"run folder: {folder}" in out
    (command,) = re.findall(r"python -m fedkern\.run fedavg .*", out)
    other = flags.effective(flags.parse(shlex.split(command)[3:]))
    assert (other.train_samples, other.clients, other.width, other.rounds) == (60, 2, 4, 2)
    assert "round 1/2" in err
    assert "\x1b" not in out + err  # no colours into a pipe
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert {"seconds", "bytes_up", "bytes_down", "id_accuracy", "ood_accuracy"} <= set(records[0])


def test_json_is_alone_on_standard_output(capsys, tmp_path):
    out, err = result(capsys, "fedavg", *TINY, "--json", "--out", "here")
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "here" / "summary.json").read_text())
    assert {"method", "data", "seed", "rounds", "metrics", "bytes", "seconds", "versions"} <= set(summary)
    assert "round" not in err.replace("background", "")


def test_quiet_leaves_the_folder_and_its_default_name(capsys, tmp_path):
    out, _ = result(capsys, "fedavg", *TINY, "--quiet")
    assert re.fullmatch(r"runs/fedavg-colordigits-\d{8}-\d{6}\n", out)
    assert (tmp_path / out.strip() / "summary.json").exists()


def test_a_finished_run_resumes_to_the_same_summary(capsys, finished):
    folder, _, _ = finished
    before = (folder / "summary.json").read_bytes()
    (folder / "gradcam.png").unlink()
    out, _ = result(capsys, "--resume", str(folder))
    assert (folder / "summary.json").read_bytes() == before
    assert "time per round" in out
    assert (folder / "gradcam.png").exists()  # drawn again


def test_a_folder_of_another_configuration(capsys, finished):
    folder, _, _ = finished
    sentence = fails(capsys, "fedgid", "--lr", "0.01", "--resume", str(folder))
    assert "lr: 0.05 -> 0.01" in sentence
    assert "alpha" in fails(capsys, "--resume", str(folder), "--method-option", "alpha=0.1")
    assert "method: fedgid -> fedavg" in fails(capsys, "fedavg", "--resume", str(folder))
    assert "already holds a run" in fails(capsys, "fedavg", *TINY, "--out", str(folder))
    # Repeating what is stored is no mistake.
    result(capsys, "fedgid", "--rounds", "2", "--resume", str(folder))


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_in_one_line_that_says_how_to_resume(capsys, monkeypatch, tmp_path, number, code, word):
    on_round = progress.Lines.on_round

    def stop(self, record):
        on_round(self, record)
        if record["round"] == 1:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(progress.Lines, "on_round", stop)
    assert main(["fedavg", *TINY, "--out", "stopped"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"{word}; continue with: python -m fedkern.run --resume stopped"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "stopped", "--quiet"]) == 0


def test_ctrl_c_then_resume_gives_the_uninterrupted_run(capsys, tmp_path):
    argv = ["fedgid", *SMALL, "--rounds", "12", "--grad-cam", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkern.run", *argv, "--out", "stopped"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            metrics = Path("stopped/metrics.jsonl")
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("--resume stopped")
    _, err = result(capsys, "--resume", "stopped")
    assert "resumed after round" in err
    result(capsys, *argv, "--out", "whole", "--quiet")
    stopped, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_a_full_disk_is_one_sentence(capsys, monkeypatch, tmp_path):
    write_bytes = Path.write_bytes
    written = 0

    def full(self, content):
        nonlocal written
        if "full" in self.parts:
            written += 1
            if written > 2:
                write_bytes(self, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_bytes(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in fails(capsys, "fedavg", *TINY, "--out", "full")
    assert written > 2
    assert not list((tmp_path / "full").rglob("*.part"))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    result(capsys, "--resume", "full", "--quiet")


def test_a_disk_that_fills_up_while_drawing_keeps_the_run(capsys, monkeypatch, tmp_path):
    def full(self, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots.FigureCanvasAgg, "print_png", full)
        sentence = fails(capsys, "fedavg", *TINY, "--out", "full", "--quiet")
    assert "complete" in sentence
    assert "--resume full" in sentence
    assert not list((tmp_path / "full").glob("*.png"))
    result(capsys, "--resume", "full", "--quiet")
    assert len(list((tmp_path / "full").glob("*.png"))) == 3


def test_an_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, "fedavg", *TINY, "--out", "file/below")


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_told_otherwise(chosen):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-m", "fedkern.run", "doctor", "--json"],
        stdout=subprocess.PIPE, text=True, timeout=60, check=True,
        env={**environment, **({"OMP_WAIT_POLICY": chosen} if chosen else {})},
    )  # fmt: skip
    assert json.loads(done.stdout)["threads"]["OMP_WAIT_POLICY"] == (chosen or "PASSIVE")


def test_a_reader_that_leaves_gets_no_traceback():
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m fedkern.run doctor | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "141"
    assert done.stderr == ""
