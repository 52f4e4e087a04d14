"""Run folders are data: code runs only if it is given again, and figures are shown only if unchanged."""

import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedkern.downstream.membership_attack import attack
from fedkern.downstream.saved_network import read_model
from fedkern.downstream.tasks import TASKS
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings
from python_tests.interrupted import forget_results, undo_rounds

TINY = ["--train-samples", "40", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4",
        "--grad-cam", "0", "--data-option", "test_samples=20", "--data", "digits", "--partition", "iid"]  # fmt: skip
CODE = """\
import pathlib
with pathlib.Path({marker!r}).open("a") as file:
    file.write("ran\\n")
def teacher(images):
    return images.flatten(1)[:, :10]
"""
TEACHER = "foreign_code_of_a_test:teacher"


class Marker:
    """A module on disk that leaves a file when it is imported."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ran"
        (folder / "foreign_code_of_a_test.py").write_text(CODE.format(marker=str(self.path)))

    def ran(self) -> bool:
        return self.path.exists()

    def forget(self) -> None:
        sys.modules.pop("foreign_code_of_a_test", None)
        self.path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def run_with_teacher(tmp_path_factory):
    """Yield a finished run with a teacher that is imported, and the marker of that module."""
    base = tmp_path_factory.mktemp("elsewhere")
    marker = Marker(base)
    sys.path.insert(0, str(base))
    words = ["fedlpfm", *TINY, "--rounds", "1", "--method-option", f"teacher={TEACHER}", "--out", str(base / "run")]
    assert main([*words, "--quiet"]) == 0
    assert marker.ran()
    yield base / "run", marker
    sys.path.remove(str(base))
    marker.forget()


@pytest.fixture
def marker(run_with_teacher):
    run_with_teacher[1].forget()
    return run_with_teacher[1]


@pytest.fixture
def lpfm(run_with_teacher, tmp_path):
    return Path(shutil.copytree(run_with_teacher[0], tmp_path / "run"))


@pytest.mark.usefixtures("undrawn")
def test_resume_runs_no_code_that_the_folder_names(lpfm, marker, fails, capsys):
    undo_rounds(lpfm)
    said = fails("--resume", str(lpfm))
    assert f"{lpfm}/config.toml names code to run, {TEACHER}" in said
    assert f"--method-option teacher={TEACHER}" in said
    assert not marker.ran()
    assert [path.name for path in lpfm.iterdir()] == ["config.toml"]
    refusal = fails("--resume", str(lpfm), "--method-option", "teacher=other:teacher")
    assert "has other settings" in refusal
    assert "names code to run" in fails("--resume", str(lpfm), "--method-option", "lambda=0.9")
    assert not marker.ran()
    with pytest.raises(UserError, match="names code to run"):
        run(load_settings(lpfm), out=lpfm, resume=True)
    assert not marker.ran()
    assert main(["--resume", str(lpfm), "--method-option", f"teacher={TEACHER}", "--quiet"]) == 0
    assert marker.ran()
    assert (lpfm / "model.safetensors").exists()


def test_a_finished_run_is_looked_at_without_its_code(lpfm, marker, capsys):
    for words in (["--resume", str(lpfm), "--quiet"], ["attack", str(lpfm)]):
        assert main(words) == 0
        assert main([*words, "--method-option", f"teacher={TEACHER}"]) == 0
        assert main([*words, "--method-option", "teacher=other:teacher"]) == 2
    (lpfm / "pictures.json").unlink()
    assert main(["--resume", str(lpfm), "--quiet"]) == 0  # draws them again
    assert not marker.ran()


def rebuilt_by_its_method(out: Path) -> None:
    """Declare in model.safetensors that the method builds the module, as a sender could."""
    forget_results(out)
    path = out / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fedkern"])
    save_file(tensors, path, metadata={"fedkern": json.dumps({**about, "samples": [20, 20]})})


@pytest.mark.parametrize("words", [["attack"], *(["evaluate", "--task", task] for task in TASKS)])
def test_no_command_builds_a_method_that_names_code(lpfm, marker, fails, words, monkeypatch):
    rebuilt_by_its_method(lpfm)
    made = []
    kind = METHODS["fedlpfm"]
    before = kind.model
    monkeypatch.setattr(kind, "model", lambda self, server: made.append(self._install) or before(self, server))
    said = fails(*words, str(lpfm))
    assert "names code to run" in said
    assert f"--method-option teacher={TEACHER}" in said
    assert not made
    assert not marker.ran()
    # Given again it is built; a classifier is then none of the downstream commands' business.
    code = main([*words, str(lpfm), "--method-option", f"teacher={TEACHER}"])
    assert made
    assert code == (0 if words == ["attack"] else 2)


def test_the_library_asks_too(lpfm, marker):
    rebuilt_by_its_method(lpfm)
    for look in (attack, read_model):
        with pytest.raises(UserError, match="names code to run"):
            look(lpfm)
    assert read_model(lpfm, trusted=[TEACHER])
    assert attack(lpfm, trusted=[TEACHER], keep=False)["members"] > 0
    assert not marker.ran()


def test_every_option_that_imports_says_so():
    """An option that offers or takes MODULE:NAME is one that a stored run must confirm."""
    found = set()
    for name, kind in METHODS.items():
        for option in kind.Options.list_options():
            if "MODULE:NAME" in option.help or option.code is not None:
                assert option.code is not None, (name, option.name)
                found.add((name, option.name))
    assert found == {("fedlpfm", "teacher")}
    given = {"teacher": f"pretrained,{TEACHER},clip:x"}
    assert METHODS["fedlpfm"].Options.parse(given).code() == [("teacher", TEACHER)]
    assert METHODS["fedlpfm"].Options.parse({"lambda": 0.5}).code() == []


@pytest.mark.parametrize("name", [
    "config.toml", "model.safetensors", "metrics.jsonl", "summary.json", "checkpoints/manifest.json",
])  # fmt: skip
@pytest.mark.parametrize("command", [["--resume"], ["attack"], ["evaluate", "--task", "probe"]])
def test_pipes_in_a_run_folder_are_not_waited_for(tmp_path, name, command, capsys):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.toml").write_text(RunConfig.make("fedavg").to_toml())
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main([*command, str(out)])), daemon=True)
    thread.start()
    thread.join(30)
    assert codes == [2]
    assert re.search(rf"{name} is a named pipe, not a regular file", capsys.readouterr().err)


# -- damaged results ---------------------------------------------------------------------------------------------------


FINISHED = ["--data", "digits", "--train-samples", "80", "--clients", "2", "--model", "mlp", "--threads", "1",
            "--grad-cam", "0", "--local-steps", "2", "--workers", "1", "--rounds", "2", "--predictions",
            "--quiet"]  # fmt: skip
FILES = ("summary.json", "model.safetensors", "evaluation.csv", "confusion.json", "predictions.csv", "metrics.jsonl")


def flip_bit(content, _):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def two_rows_swapped(content, _):
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:-2], lines[-1], lines[-2]]) if len(lines) > 2 else content[::-1]


DAMAGES = {
    "flipped": flip_bit,
    "cut": lambda content, _: content[:-20],
    "lengthened": lambda content, _: content + content.splitlines(keepends=True)[-1],
    "swapped": two_rows_swapped,
    "another run's": lambda _, stranger: stranger,
    "empty": lambda content, _: b"",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, undrawing):
    from fedkern.run import main

    base = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        with undrawing():
            assert main(["fedavg", *FINISHED, "--seed", seed, "--out", str(base / seed)]) == 0
    return base / "0", base / "1"


@pytest.mark.sampled
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_changed_files_are_named(name, damage, runs, fails, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    content = DAMAGES[damage]((out / name).read_bytes(), (runs[1] / name).read_bytes())
    assert content != (out / name).read_bytes()
    (out / name).write_bytes(content)
    commands = [["report", str(out)], ["compare", str(out), str(runs[1]), "--out", str(tmp_path / "c")]]
    commands += [["evaluate", str(out)]] if name not in ("metrics.jsonl",) else []
    for command in commands:
        assert name in fails(*command)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FILES[1:5])
def test_what_was_damaged_or_deleted_is_made_again(name, runs, tmp_path):
    for damaged in (False, True):
        out = tmp_path / f"run{damaged}"
        shutil.copytree(runs[0], out)
        before = (out / name).read_bytes()
        (out / name).unlink()
        if damaged:
            (out / name).write_bytes(b"x")
        run(load_settings(out), out=out, resume=True, predictions=True)
        assert (out / name).read_bytes() == before


@pytest.mark.parametrize("name", ["summary.json", "confusion.json", "metrics.jsonl", "model.safetensors"])
def test_a_report_without_a_file_says_so(name, runs, fails, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    (out / name).unlink()
    command = "evaluate" if name == "model.safetensors" else "report"
    assert name in fails(command, str(out))


@pytest.mark.parametrize("command", ["report", "compare", "attack", "evaluate", "predict", "export"])
def test_settings_of_another_run_are_named(command, runs, fails, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs[0], out)
    shutil.copy(runs[1] / "config.toml", out / "config.toml")
    arguments = {"compare": [str(runs[1]), "--out", str(tmp_path / "c")], "predict": ["image.png"]}.get(command, [])
    assert "config.toml was changed after the run began (seed" in fails(command, str(out), *arguments)
