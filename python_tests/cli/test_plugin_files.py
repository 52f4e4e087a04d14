"""Files that a plugin imports from its own folder: no run folder executes them after a change."""

import hashlib
import json
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import fedkern
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.usercode import named_code, plugins
from fedkern.usercode.code_identity import content_hash
from python_tests.plugin_sources import Executed, begin, check_refused, no_plugins, unload_all  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_plugins")

OWN = '''\
from fedkern.methods import FedAvg, register
import helpers_of_a_test

@register("mine")
class Mine(FedAvg):
    """A method of a test."""
    weights = helpers_of_a_test.WEIGHTS
'''
HELPERS = """\
import pathlib
with pathlib.Path({marker!r}).open("a") as file:
    file.write("ran\\n")
WEIGHTS = {weights}
"""


class Pair(Executed):
    """A plugin and the module that it imports, which counts its executions."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.path, self.helpers, self.marker = folder / "own.py", folder / "helpers_of_a_test.py", folder / "ran"
        self.path.write_text(OWN)
        self.write(1)

    def write(self, weights: int) -> None:
        self.helpers.write_text(HELPERS.format(marker=str(self.marker), weights=weights))


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path / "plugin")


@pytest.fixture
def cut(pair, tmp_path):
    """Return the folder of a run that is killed after its first round."""
    return begin(pair, tmp_path / "run")


def check_untouched(fails, cut, pair, *parts):
    check_refused(fails, cut, [["--resume", str(cut)], ["attack", str(cut)]], parts)
    assert pair.runs == 1


# -- what a folder executes --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_an_unchanged_neighbour_goes_on(result, cut, pair):
    stored = tomllib.loads((cut / "config.toml").read_text())["plugins"][str(pair.path)]
    assert list(named_code.parse_identity(stored)) == ["", "helpers_of_a_test.py"]
    result("--resume", str(cut), "--quiet")
    assert pair.runs == 2
    assert "other-plugin" not in json.loads((cut / "summary.json").read_text())["diagnostics"]


def test_a_changed_neighbour_is_not_executed_unless_the_plugin_is_given_again(fails, result, cut, pair):
    pair.write(20)
    check_untouched(fails, cut, pair, f"The plugin {pair.path} has changed since", f"`{pair.helpers}` changed",
              f"--plugin {pair.path}")  # fmt: skip
    result("--resume", str(cut), "--plugin", str(pair.path), "--quiet")
    assert pair.runs == 2
    assert METHODS["mine"].weights == 20
    assert str(pair.path) in json.loads((cut / "summary.json").read_text())["diagnostics"]["other-plugin"]


def test_a_neighbour_that_is_gone_or_new_is_a_change(fails, cut, pair):
    kept = pair.helpers.rename(pair.helpers.with_suffix(".txt"))
    check_untouched(fails, cut, pair, "has changed since", f"`{pair.helpers}` is gone")
    kept.rename(pair.helpers)
    package = pair.helpers.with_suffix("")
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit\n")
    check_untouched(fails, cut, pair, f"`{package / '__init__.py'}` is new")


def test_a_folder_that_leaves_a_neighbour_out_is_refused(fails, cut, pair):
    config = cut / "config.toml"
    stored = named_code.parse_identity(tomllib.loads(config.read_text())["plugins"][str(pair.path)])
    identity = f"{stored['']}; helpers_of_a_test.py {stored['helpers_of_a_test.py']}"
    assert identity in config.read_text()
    for changed, said in (
        (stored[""], "has changed since"),
        (f"{identity}; ../../other.py {stored['']}", "is gone"),
        (f"{identity}; {pair.helpers} {stored['']}", "has changed since"),
        (f"helpers_of_a_test.py {stored['helpers_of_a_test.py']}", "has changed since"),
    ):
        text = config.read_text()
        config.write_text(text.replace(identity, changed))
        check_untouched(fails, cut, pair, said)
        config.write_text(text)


def test_another_process_executes_no_other_neighbour(pair):
    sent = plugins.sent_plugins(plugins.load_given([str(pair.path)]))
    unload_all()
    plugins.receive(sent)
    assert [plugin.identity for plugin in plugins.loaded_plugins()] == [sent[0].identity]
    unload_all()
    pair.write(20)
    with pytest.raises(UserError, match=r"has changed meanwhile \(`.*helpers_of_a_test\.py` changed"):
        plugins.receive(sent)
    assert pair.runs == 2


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_changed_neighbour_is_loaded_again(pair):
    before = plugins.load(str(pair.path))
    assert plugins.load(str(pair.path)).identity == before.identity
    assert (pair.runs, METHODS["mine"].weights) == (1, 1)
    pair.write(20)
    assert plugins.load(str(pair.path)).identity != before.identity
    assert (pair.runs, METHODS["mine"].weights) == (2, 20)
    assert plugins.load_given({str(pair.path): plugins.load(str(pair.path)).identity})
    with pytest.raises(UserError, match="is not the one that the settings name"):
        plugins.load_given({str(pair.path): before.identity})
    with pytest.raises(UserError, match="is not the one that the settings name"):
        plugins.load_given({str(pair.path): "anything"})
    unload_all()
    assert "helpers_of_a_test" not in sys.modules
    assert str(pair.path.parent) not in sys.path


def test_a_plugin_that_fails_leaves_no_module(pair):
    pair.path.write_text(OWN + "1 / 0\n")
    with pytest.raises(UserError, match=r"\(line 8\): ZeroDivisionError"):
        plugins.load(str(pair.path))
    assert "helpers_of_a_test" not in sys.modules


def test_plugins_of_two_folders_cannot_import_modules_of_one_name(pair, tmp_path):
    plugins.load(str(pair.path))
    namesake = Pair(tmp_path / "other")
    namesake.path.write_text(OWN.replace('"mine"', '"yours"'))
    with pytest.raises(UserError, match="imports helpers_of_a_test, and another helpers_of_a_test is loaded already"):
        plugins.load(str(namesake.path))
    assert "yours" not in METHODS
    beside = pair.path.with_name("beside.py")
    beside.write_text(OWN.replace('"mine"', '"beside"'))
    assert named_code.parse_identity(plugins.load(str(beside)).identity).keys() == {"", "helpers_of_a_test.py"}
    assert pair.runs == 1  # both share the module


def test_neighbours_are_found_from_import_to_import(tmp_path):
    files = {
        "own.py": OWN + "import parts_of_a_test.deep\ndef later():\n    from late_of_a_test import x\n",
        "helpers_of_a_test.py": "WEIGHTS = 3\n",
        "late_of_a_test.py": "x = 1\n",
        "unused.py": "",
        "parts_of_a_test/__init__.py": "",
        "parts_of_a_test/deep.py": "from . import sibling\nfrom .other import y\n",
        "parts_of_a_test/sibling.py": "import json\n",
        "parts_of_a_test/other.py": "y = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = named_code.parse_identity(plugins.load(str(tmp_path / "own.py")).identity)
    own = {name for name in files if name not in ("own.py", "unused.py")}
    assert found.keys() == {"", *own}
    for name in own:
        assert found[name] == f"sha256:{hashlib.sha256(files[name].encode()).hexdigest()}"


def test_installed_code_in_the_folder_is_no_neighbour(tmp_path, monkeypatch):
    root = Path(fedkern.__file__).resolve().parents[1]
    assert (
        named_code.imported_modules(root / "own.py", b"import fedkern.ops\nfrom fedkern.methods import FedAvg\n") == {}
    )
    for place in ("stdlib", "vendored"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.py").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "stdlib"))
    found = named_code.imported_modules(tmp_path / "own.py", b"import stdlib.x, vendored.x, json")
    assert found == {tmp_path / "vendored" / "x.py": "vendored.x"}


def test_an_identity_is_read_as_it_is_written():
    hashes = {"": content_hash(b"own"), "a file.py": content_hash(b"a")}
    text = named_code.CodeFile(b"own", hashes, ()).identity
    assert named_code.parse_identity(text) == hashes
    assert named_code.parse_identity(text.partition("; ")[2]) == {}
    for unreadable in ("", "sha256:12", "1.0, sha256:" + 64 * "a" + ", /a/file.py", text + "; x"):
        assert named_code.parse_identity(unreadable) == {}


def test_a_neighbour_that_cannot_be_read_leaves_nothing_registered(pair, monkeypatch):
    monkeypatch.setattr(named_code, "imported_modules", lambda *_: {pair.path.parent / "missing.py": "missing"})
    with pytest.raises(UserError, match=r"missing\.py, which a plugin imports, cannot be read"):
        plugins.load(str(pair.path))
    assert "mine" not in METHODS
    assert plugins.loaded_plugins() == ()


def test_a_stored_identity_without_its_plugin_is_not_there(fails, cut, pair):
    pair.path.unlink()
    check_untouched(fails, cut, pair, "needs a plugin that is not there")


@pytest.mark.parametrize("name", ["helpers_of_a_test.abi3.so", "helpers_of_a_test/__init__.py"])
def test_what_python_would_load_instead_of_a_neighbour_is_a_change(tmp_path, name):
    pair = Pair(tmp_path / "p")
    identity = plugins.load(str(pair.path)).identity
    assert plugins._differences(str(pair.path), pair.path, identity) == []
    file = pair.path.parent / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    assert plugins._differences(str(pair.path), pair.path, identity) == [f"`{file}` is new"]


def test_a_second_plugin_runs_what_its_identity_says(tmp_path):
    pair = Pair(tmp_path / "p")
    plugins.load(str(pair.path))
    second = pair.path.with_name("second.py")
    second.write_text(OWN.replace('"mine"', '"second"').replace("class Mine", "class Second"))
    plugins.load(str(second))
    assert pair.runs == 1  # unchanged, it is shared
    third = pair.path.with_name("third.py")
    third.write_text(OWN.replace('"mine"', '"third"').replace("class Mine", "class Third"))
    pair.write(22)  # of another length: Python takes bytecode of the same second and length for current
    found = plugins.load(str(third))
    assert METHODS["third"].weights == 22
    assert content_hash(pair.helpers.read_bytes()) in found.identity
