"""Run folders on the command line: taken, returned, empty, misnamed, finished, not writable."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from fedkern.cli import command_parser, flags, request
from fedkern.cli.commands import run
from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.run import main

TINY = [
    "--train-samples", "60", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4", "--rounds", "1",
    "--grad-cam", "0", "--data-option", "test_samples=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def played_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("played") / "run"
    assert main(["fedavg", *TINY, "--quiet", "--buffers", "drop", "--out", str(out)]) == 0
    return out


@pytest.fixture
def finished_run(played_run, tmp_path):
    return Path(shutil.copytree(played_run, tmp_path / "probe"))


def test_two_runs_of_one_second_take_two_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    asked = flags.parse_run(["fedavg"])
    config = request.effective_config(asked)
    with run._folder(asked, config) as earlier, run._folder(asked, config) as second:
        assert (earlier.name, second.name) == (
            "fedavg-colordigits-20260101-000000",
            "fedavg-colordigits-20260101-000000-2",
        )
        assert earlier.is_dir()
        assert second.is_dir()
        (second / "config.toml").write_text("")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [second.name]  # the other stayed empty


def test_a_default_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "runs").symlink_to("nowhere")
    assert "cannot be made (File exists): name another run folder with --out" in fails("fedavg", *TINY)
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").write_text("")
    assert "cannot be made (Not a directory): name another run folder with --out" in fails("fedavg", *TINY)


def test_pictures_of_others_are_not_drawn_over(fails, tmp_path):
    (tmp_path / "accuracy.png").write_bytes(b"mine")
    assert "already holds accuracy.png, which a new run would write over" in fails("fedavg", *TINY, "--out", ".")
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.png"]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--resume", ""], "--resume is given without a value"),
        (["fedavg", "--out="], "--out is given without a value"),
        (["fedavg", "--data", "digits", "--data-root", ""], "--data-root is given without a value"),
        (["attack", ""], "attack needs the folder of a finished run"),
        (["fedavg", "--out", os.fsdecode(b"r\xe9sum")], r'the argument "r\xe9sum" has bytes that are not UTF-8'),
        (["--shots", "5", "evaluate", "x"], "Name evaluate first, then its flags: python -m fedkern.run evaluate DIR."),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_named(fails, tmp_path, argv, part):
    assert part in fails(*argv)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_like_a_command():
    for words in (["--resume", "attack"], ["fedavg", "--out", "evaluate"]):
        assert command_parser.find_command(words) == "run"
    assert command_parser.parse_words(["attack", "evaluate"]).command == "attack"
    assert flags.parse_run(["--resume", "attack"]).resume == Path("attack")
    asked = command_parser.parse_words(["--json", "evaluate", "evaluate", "--task", "probe", "--shots", "all"])
    assert (asked.command, asked.folder, asked.json) == ("evaluate", Path("evaluate"), True)


def test_a_finished_run_without_gradcam_keeps_its_pictures(result, fails, finished_run, monkeypatch):
    """Neither data nor a minute of drawing are needed again, and flags may repeat the run's settings."""
    names = json.loads((finished_run / "pictures.json").read_text())["pictures"]
    assert names == ["accuracy.png", "confusion.png", "partition.png"]
    before = (finished_run / "accuracy.png").stat().st_mtime_ns

    def fail_to_load(*_, **__):
        raise UserError("The data are gone.")

    monkeypatch.setattr("fedkern.settings.run_data.load_data", fail_to_load)
    out, _ = result("--resume", "probe", "--data-option", "test_samples=20", "--train-samples", "60")
    assert "pictures:   accuracy.png, confusion.png, partition.png" in out
    assert (finished_run / "accuracy.png").stat().st_mtime_ns == before
    assert "data_options.test_samples: 20 -> 21" in fails("--resume", "probe", "--data-option", "test_samples=21")


@pytest.mark.usefixtures("undrawn")
def test_predictions_of_a_new_run_and_of_a_finished_one(result, fails, finished_run):
    out, _ = result("fedavg", *TINY, "--buffers", "drop", "--predictions", "--out", "new")
    assert "answers:    predictions.csv" in out
    lines = Path("new/predictions.csv").read_text().splitlines()
    assert lines[0] == ",".join(["test_set", "sample", "true_class", "predicted_class", *(f"p_{c}" for c in range(10))])
    assert {line.partition(",")[0] for line in lines[1:]} == {"id", "ood", "validation"}
    assert not (finished_run / "predictions.csv").exists()
    assert "answers:    predictions.csv" in result("--resume", "probe", "--predictions")[0]
    assert (finished_run / "predictions.csv").read_text() == Path("new/predictions.csv").read_text()
    assert "predictions" not in (finished_run / "config.toml").read_text()  # it acts once
    Path("mine").mkdir()
    Path("mine/predictions.csv").write_text("mine")
    assert "already holds predictions.csv" in fails("fedavg", *TINY, "--out", "mine")


def test_predictions_are_for_classification(fails, tmp_path):
    words = ["--data", "segdigits", "--train-samples", "40", "--clients", "2", "--data-option", "test_samples=20"]
    sentence = fails("fedavg", *words, "--predictions", "--out", "run")
    assert "--predictions writes a class for every image, and these data are for" in sentence
    assert list(tmp_path.iterdir()) == []


def test_the_summary_comes_before_what_is_wrong_with_the_pictures(capsys, finished_run, monkeypatch):
    (finished_run / "accuracy.png").unlink()

    def full(*_, **__):
        raise UserError("The disk is full.")

    monkeypatch.setattr("fedkern.report.figures.pictures.read_run_folder", full)
    assert main(["--resume", "probe", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == 1
    assert "The run is complete, but not its pictures (The disk is full)" in err
    assert "--resume probe" in err


def test_a_run_of_a_gpu_goes_on_with_device_cpu(result, fails, finished_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = finished_run / "config.toml"
    path.write_text(path.read_text().replace('device = "cpu"', 'device = "cuda"'))
    (finished_run / "accuracy.png").unlink()
    assert "use --device cpu" in fails("--resume", "probe")
    result("--resume", "probe", "--device", "cpu")
    assert (finished_run / "accuracy.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_an_attack_is_told_before_it_cannot_be_written(capsys, finished_run, monkeypatch):
    def refuse(path, content):
        raise atomic.unwritable(path, PermissionError(errno.EACCES, "Permission denied"))

    monkeypatch.setattr(atomic, "write_bytes", refuse)
    assert main(["attack", "probe", "--json"]) == 2
    out, err = capsys.readouterr()
    assert 0 <= json.loads(out)["auc"] <= 1
    assert "attack.json cannot be written (Permission denied): put that right, then try again." in err
    assert "--out" not in err
