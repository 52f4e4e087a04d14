"""Paths, run folders and the file of ``--config`` on the command line: taken, returned, misnamed, not writable."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from fedkern.cli import command_parser, flags, request
from fedkern.cli.commands import run
from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings

TINY = ["--train-samples", "60", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4"]


def effective(*argv):
    return request.effective_config(flags.parse_run(list(argv)))


def test_paths_are_stored_absolute(tmp_path):
    config = effective("fedavg", "--data", "mnist", "--data-root=here", "--boxes=b.csv", "--detector-cache=~/c")
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
def test_the_home_of_somebody_unknown_and_bytes_that_are_no_text(fails, tmp_path, argv):
    sentence = fails(*argv)
    assert "~nosuchuser/x" in sentence
    assert "./~nosuchuser" in sentence
    sentence = fails(*(word.replace("~nosuchuser/x", "x\udcff") for word in argv))
    assert 'x\\xff" has bytes that are not UTF-8' in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_in_what_is_no_path_is_none(fails):
    assert 'partition "~nosuchuser"' in fails("fedavg", "--partition", "~nosuchuser")


def test_folders_of_runs_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert flags.parse_run(["fedavg", "--out=~/x"]).out == tmp_path / "x"
    assert flags.parse_run(["--resume=~/x"]).resume == tmp_path / "x"
    assert flags.parse_run(["fedavg", "--config=~/x"]).config == tmp_path / "x"
    assert command_parser.parse_words(["attack", "~/x"]).folder == tmp_path / "x"


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


# -- folders -----------------------------------------------------------------------------------------------------------


SHORT = [*TINY, "--rounds", "1", "--grad-cam", "0", "--data-option", "test_samples=20"]


@pytest.fixture(scope="module")
def played_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("played") / "run"
    assert main(["fedavg", *SHORT, "--quiet", "--buffers", "drop", "--out", str(out)]) == 0
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
    assert "cannot be made (File exists): name another run folder with --out" in fails("fedavg", *SHORT)
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").write_text("")
    assert "cannot be made (Not a directory): name another run folder with --out" in fails("fedavg", *SHORT)


def test_pictures_of_others_are_not_drawn_over(fails, tmp_path):
    (tmp_path / "accuracy.png").write_bytes(b"mine")
    assert "already holds accuracy.png, which a new run would write over" in fails("fedavg", *SHORT, "--out", ".")
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
    out, _ = result("fedavg", *SHORT, "--buffers", "drop", "--predictions", "--out", "new")
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
    assert "already holds predictions.csv" in fails("fedavg", *SHORT, "--out", "mine")


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


# -- config file -------------------------------------------------------------------------------------------------------


def test_a_config_file_with_a_mistake(fails, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("roundz = 3\n")
    assert '"roundz"' in (sentence := fails("fedavg", "--config", str(path)))
    assert 'Did you mean "rounds"' in sentence
    path.write_text("rounds = \n")
    assert "settings.toml" in fails("fedavg", "--config", str(path))
    path.write_text("[options]\nalpah = 0.5\n")
    assert '"alpah"' in fails("fedgid", "--config", str(path))
    path.write_bytes(b"\xff\xfe")
    assert "settings.toml" in fails("fedgid", "--config", str(path))


def test_flags_override_the_config_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('method = "fedgid"\nrounds = 7\nlr = 0.2\n[options]\nalpha = 0.9\ntemperature = 3.0\n')
    config = effective("--config", str(path), "--lr", "0.3", "--method-option", "alpha=0.8")
    assert (config.method, config.rounds, config.lr) == ("fedgid", 7, 0.3)
    assert (config.options["alpha"], config.options["temperature"]) == (0.8, 3)
    assert config.batch_size == RunConfig.make("fedgid").batch_size
    config = effective("fedavg", "--config", str(path))  # another method takes no options
    assert (config.method, config.rounds, config.lr) == ("fedavg", 7, 0.2)


def test_a_file_of_a_run_may_name_settings_without_effect(tmp_path):
    config = RunConfig.make("fedavg", optimizer="adamw", local_steps=2)
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert effective("--config", "config.toml") == config


def test_epochs_take_the_place_of_default_steps(tmp_path):
    assert RunConfig.make("feddra").local_steps == 20
    config = effective("feddra", "--local-epochs", "1")
    assert (config.local_epochs, config.local_steps) == (1, None)


def test_a_byte_order_mark_says_nothing(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('method = "fedavg"\nrounds = 7\n', encoding="utf-8-sig")
    config = effective("--config", str(path))
    assert config.rounds == 7
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.to_toml(), encoding="utf-8-sig")
    assert load_settings(tmp_path / "run") == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('method = ["fedavg"]', ["Unknown method", "settings.toml"]),
        ("method = 3", ["Unknown method", "settings.toml"]),
        ('method = "fedavg"\nmodel = ["cnn"]', ["--model", "a word"]),
        ('method = "fedavg"\ndata = ["digits"]', ["--data", "a word"]),
        ('method = "fedavg"\ndata_root = ["here"]', ["--data-root", "a word"]),
        ('method = "fedavg"\nlr = [0.1]', ["--lr", "a number"]),
        ("method = 'fedavg'\nlocal_epochs = 1" + "0" * 400, ["--local-epochs", "at most 2147483647"]),
        ("method = 'fedavg'\nlr_decay = 0.9\nlr-decay = 0.8", ["settings.toml", "lr_decay twice"]),
    ],
)
def test_a_value_of_another_kind_is_one_sentence(fails, tmp_path, text, parts):
    (tmp_path / "settings.toml").write_text(text)
    sentence = fails("--config", "settings.toml")
    for part in parts:
        assert part in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]
