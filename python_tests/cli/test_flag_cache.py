"""Help, wrong flags and ``list`` without torch, once a command with torch has written the flags."""

import json
import os
import subprocess
import sys

import pytest

from fedkern.cli import flag_cache

COMMANDS = """
import contextlib, io, json, sys
class Refuse:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch is imported")
if sys.argv[2] == "refuse":
    sys.meta_path.insert(0, Refuse())
from fedkern.run import main
answers = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main(words)
        except ImportError as refused:
            code = str(refused)
    answers.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(answers))
"""
KEPT = [
    line.split()
    for line in (
        "list", "list --json", "list --jsn", "fedavg --help", "--help --quiet fediod", "--model fedavg fedprox -h",
        "fedprox --lrr 3 --data mnist", "fedavg --mu 1", "fedprox --mu=1", "fedavg moon", "fedavg list", "fedavgg",
        "fedavg --lr", "fedavg --out= --help", "", "doctor --help", "attack -h", "compare fedavg --help",
        "evaluate run --network x", "fedavgg --help",
    )
]  # fmt: skip
"""Commands that need no torch."""
OTHERS = [
    line.split()
    for line in (
        "fedavg --help --plugin x.py", "fedavg --help --config=x.toml", "--resume x --help", "list --plugin x.py",
        "fedavg --data x.py:data --help", "fedavg --data mnist --help", "fedavg --lr x", "attack", "doctor",
    )
]  # fmt: skip
"""Commands that need torch: user-defined code, values to convert, and defaults of a data set."""


def play(commands, folder, torch, **environment):
    """Return exit code, output and errors of every command, all in a new process that may refuse to import torch."""
    words = [sys.executable, "-P", "-c", COMMANDS, json.dumps(commands), torch]
    environment = {**os.environ, "FEDKERN_CACHE_DIR": str(folder), **environment}
    return json.loads(subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    """Return a cache folder, and what commands print with torch, the first of which fills the folder."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, play(KEPT, folder, "import")


def test_help_wrong_flags_and_list_need_no_torch(filled_cache):
    folder, with_torch = filled_cache
    assert play(KEPT, folder, "refuse") == with_torch
    assert {answer[0] for answer in with_torch} == {0, 2}
    assert with_torch[6][2].startswith('error: Unknown flag "--lrr". Did you mean "--lr"?')


def test_all_else_needs_torch(filled_cache, tmp_path):
    assert {answer[0] for answer in play(OTHERS, filled_cache[0], "refuse")} == {"torch is imported"}
    information = tmp_path / "site" / "extension-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: extension\nVersion: 1\n")
    paths = os.pathsep.join([str(information.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert play(KEPT[:1], filled_cache[0], "refuse", PYTHONPATH=paths)[0][0] == 0
    (information / "entry_points.txt").write_text(f"[{flag_cache.GROUP}]\nextension = extension\n")
    assert play(KEPT[:1], filled_cache[0], "refuse", PYTHONPATH=paths)[0][0] == "torch is imported"
    assert play(KEPT[:1], filled_cache[0], "refuse", TORCHELASTIC_RUN_ID="job")[0][0] == "torch is imported"


@pytest.fixture
def kept_file(tmp_path, monkeypatch):
    """Return the file of a cache folder that this process has filled."""
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(flag_cache, "_is_built_in", lambda words: True)
    answer, keep = flag_cache.consult(["list"])
    assert answer is None
    keep()
    assert "methods" in flag_cache.consult(["list", "--json"])[0]
    return tmp_path / "flags" / "flags.json"


@pytest.mark.parametrize("damage", [
    lambda content: content.replace(b"learning rate", b"learning-rate"), lambda content: content[:-1],
    lambda content: b"", lambda content: b"\xff" + content, lambda content: b"{}",
])  # fmt: skip
def test_a_damaged_file_is_written_anew(kept_file, damage):
    content = kept_file.read_bytes()
    kept_file.write_bytes(damage(content))
    assert kept_file.read_bytes() != content
    answer, keep = flag_cache.consult(["fedavg", "--help"])
    assert answer is None
    keep()
    assert kept_file.read_bytes() == content


def test_a_file_of_other_code_is_not_used(kept_file, monkeypatch):
    monkeypatch.setattr(flag_cache, "__version__", "another")
    answer, keep = flag_cache.consult(["fedavg", "--help"])
    assert answer is None
    content = kept_file.read_bytes()
    monkeypatch.setattr(flag_cache, "__version__", "code that changes while a command runs")
    keep()
    assert kept_file.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(flag_cache, "_is_built_in", lambda words: True)
    for _ in range(2):
        answer, keep = flag_cache.consult(["fedavg", "--help"])
        assert answer is None
        keep()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
