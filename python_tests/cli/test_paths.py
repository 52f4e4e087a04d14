"""Paths on the command line: home folders, relative paths, and names that only look like paths."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from fedkern.cli import command_parser, flags, request
from fedkern.run import main

TINY = ["--train-samples", "60", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4"]


def effective(*argv):
    return request.effective_config(flags.parse_run(list(argv)))


def test_paths_are_stored_absolute(tmp_path):
    argv = ["fedavg", "--data", "mnist", "--data-root", "here", "--boxes", "b.csv", "--detector-cache", "~/c"]
    config = request.effective_config(flags.parse_run(argv))
    assert config.data_root == str(tmp_path / "here")
    assert config.data_options["boxes"] == str(tmp_path / "b.csv")
    assert not config.data_options["detector_cache"].startswith("~")


@pytest.mark.parametrize(
    "argv",
    [
        ["fedavg", "--data-root", "~nosuchuser/x"],
        ["fedavg", "--out", "~nosuchuser/x"],
        ["--config", "~nosuchuser/x"],
        ["--resume", "~nosuchuser/x"],
        ["attack", "~nosuchuser/x"],
        ["evaluate", "--task", "probe", "~nosuchuser/x"],
        ["fedavg", "--boxes", "~nosuchuser/x"],
        ["fedavg", "--detector", "~nosuchuser/x"],
        ["feddra", "--data", "captions", "--image-encoder", "~nosuchuser/x"],
        ["ensemble", "--teachers", "~nosuchuser/x"],
        ["fedlpfm", "--method-option", "teacher_cache=~nosuchuser/x"],
        ["fedlpfm", "--method-option", "teacher=logits:~nosuchuser/x"],
        ["fedlpfm", "--method-option", "teacher=clip:m", "--method-option", "prompts=~nosuchuser/x"],
    ],
    ids=lambda argv: " ".join(argv[:-1]),
)
def test_the_home_of_somebody_unknown(fails, tmp_path, argv):
    sentence = fails(*argv)
    assert "~nosuchuser/x" in sentence
    assert "./~nosuchuser" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_in_what_is_no_path_is_none(fails):
    assert 'partition "~nosuchuser"' in fails("fedavg", "--partition", "~nosuchuser")


def test_folders_of_runs_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert flags.parse_run(["fedavg", "--out=~/x"]).out == tmp_path / "x"
    assert flags.parse_run(["--resume=~/x"]).resume == tmp_path / "x"
    assert flags.parse_run(["fedavg", "--config=~/x"]).config == tmp_path / "x"
    assert command_parser.parse_words(["attack", "~/x"]).folder == tmp_path / "x"


@pytest.mark.parametrize(
    "argv",
    [
        ["fedavg", "--data-root", "x\udcff"],
        ["fedavg", "--out", "x\udcff"],
        ["fedavg", "--boxes", "x\udcff"],
        ["fedlpfm", "--method-option", "teacher_cache=x\udcff"],
        ["attack", "x\udcff"],
    ],
)
def test_bytes_that_are_no_text(fails, tmp_path, argv):
    assert 'x\\xff" has bytes that are not UTF-8' in fails(*argv)
    assert list(tmp_path.iterdir()) == []


def test_method_options_that_are_paths_are_stored_absolute(tmp_path):
    (tmp_path / "clipfolder").mkdir()
    words = [
        "teacher=pretrained:cnn/64, clip:openai/clip,clip:clipfolder,clip:./other,logits:l.pt,a.b:c,own.py:net",
        "teacher_cache=cache",
        "prompts=my.txt",
    ]
    options = effective("fedlpfm", *(word for option in words for word in ("--method-option", option))).options
    folder = str(tmp_path)
    assert options["teacher"] == (
        f"pretrained:cnn/64,clip:openai/clip,clip:{folder}/clipfolder,clip:{folder}/other,logits:{folder}/l.pt,a.b:c,"
        f"{folder}/own.py:net"
    )
    assert options["teacher_cache"] == f"{folder}/cache"
    assert options["prompts"] == f"{folder}/my.txt"


def test_names_and_templates_stay_as_they_are(tmp_path):
    for name in ("conv", "cnn", "pretrained"):
        (tmp_path / name).mkdir()  # a folder of that name is not what is meant
    template = "clip:openai/clip", "a photo of ~{class}"
    options = effective("fedlpfm", "--method-option", f"teacher={template[0]}", "--method-option",
                        f"prompts={template[1]}").options  # fmt: skip
    assert (options["teacher"], options["prompts"], options["teacher_cache"]) == (*template, "")
    assert effective("fedlpfm").options["teacher"] == "pretrained"
    config = effective("feddra", "--data", "captions", "--image-encoder", "conv")
    assert config.image_encoder == "conv"
    assert effective("fedavg", "--model", "cnn", "--detector", "org/dino").data_options["detector"] == "org/dino"


@pytest.mark.usefixtures("undrawn")
def test_a_run_resumed_elsewhere_uses_the_same_cache(tmp_path, monkeypatch, result):
    argv = ["fedlpfm", *TINY, "--rounds", "1", "--grad-cam", "0", "--quiet", "--out", "run", "--partition", "iid"]
    argv += ["--data-option", "test_samples=20", "--method-option", "teacher=pretrained:cnn/8"]
    result(*argv, "--method-option", "pretrain_epochs=1", "--method-option", "teacher_cache=cache")
    assert any((tmp_path / "cache").iterdir())
    monkeypatch.chdir(tmp_path / "run")
    result("--resume", str(tmp_path / "run"), "--method-option", f"teacher_cache={tmp_path}/cache", "--quiet")
    assert not Path("cache").exists()
    assert main(["--resume", ".", "--method-option", "teacher_cache=cache"]) == 2  # another one, from here


def test_data_and_runs_may_lie_anywhere(tmp_path, result):
    """Folders' names have spaces, commas, quotes, letters beyond ASCII, and characters of TOML, globs and shells."""
    odd = tmp_path / 'it\'s a "ünüsual", [odd] #1 \\ folder'
    for part, count in (("train", 12), ("test", 4)):
        for label in ("a", "b"):
            images = odd / "data" / part / f"{label}, 'ö'"
            images.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (20 * i, 100 if label == "a" else 0, 0)).save(images / f'{i} "x".png')
    argv = ["fedavg", "--data", "folder", "--data-root", str(odd / "data"), "--clients", "2", "--partition", "iid"]
    argv += ["--local-epochs", "1", "--threads", "1", "--width", "4", "--rounds", "1", "--grad-cam", "0"]
    out, _ = result(*argv, "--out", str(odd / "run"))
    assert str(odd / "run") in out.replace("\n", "")
    about = json.loads(safe_open(odd / "run" / "model.safetensors", "pt").metadata()["fedkern"])
    assert about["classes"] == ["a, 'ö'", "b, 'ö'"]
    result("--resume", str(odd / "run"))
    result("attack", str(odd / "run"))


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 25)])
@pytest.mark.parametrize("words", [
    ["fedavg", "--data", "digits", "--train-samples", "60", "--clients", "2", "--out"], ["--resume"], ["report"],
    ["evaluate"], ["compare"],
])  # fmt: skip
def test_an_over_long_name_is_one_sentence(words, name, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "File name too long; choose a shorter name." in fails(*words, name)
    assert not list(tmp_path.iterdir())
