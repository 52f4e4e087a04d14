"""Run folders are data: code that config.toml names runs only if the option is given again."""

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
from fedkern.settings.config import RunConfig
from fedkern.settings.stored import load_settings
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
