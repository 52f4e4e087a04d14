"""Tests of loading plugins: files, modules, entry points, and mistakes of plugins."""

import sys
from importlib.metadata import EntryPoint

import pytest

from fedkern.cli import front_page
from fedkern.data import DATASETS
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.models import MODELS
from fedkern.usercode import named_code, plugins
from python_tests.plugin_sources import Marked, no_plugins, unload_all  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_plugins")


def write(folder, text, name="own.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def read_tables():
    return dict(METHODS), dict(DATASETS), dict(MODELS)


def test_a_file_is_executed_once_until_it_changes(tmp_path):
    marked = Marked(tmp_path)
    plugin = plugins.load(str(marked.path))
    assert (plugin.name, plugin.added) == (str(marked.path), {"method": ("mine",)})
    assert plugins.load(str(marked.path)).identity == plugin.identity
    assert marked.runs == 1
    former = METHODS["mine"]
    marked.change()
    assert plugins.load(str(marked.path)).identity != plugin.identity
    assert marked.runs == 2
    assert METHODS["mine"] is not former
    plugins.unload(plugin.name)
    assert "mine" not in METHODS
    assert plugins.loaded_plugins() == ()


def test_a_plugin_whose_code_is_also_named_is_executed_once(tmp_path):
    marked = Marked(tmp_path)
    plugins.load(str(marked.path))
    kind, _ = named_code.load(named_code.parse(f"{marked.path}:Mine"), "the model")
    assert kind is METHODS["mine"]
    assert marked.runs == 1


def test_two_paths_of_one_file_are_one_plugin(tmp_path, monkeypatch):
    marked = Marked(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(marked.path)
    names = {plugins.load(path).name for path in ("here/marked.py", "here/../here/marked.py", "link.py")}
    assert names == {str(marked.path)}
    assert marked.runs == 1


def test_a_module_is_identified_by_version_hash_and_origin(tmp_path, monkeypatch):
    marked = Marked(tmp_path / "package_of_a_test")
    (tmp_path / "package_of_a_test" / "__init__.py").write_text("raise SystemExit('imported too early')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="imported too early"):
        plugins.load("package_of_a_test.marked")
    assert marked.runs == 0
    (tmp_path / "package_of_a_test" / "__init__.py").write_text("")
    plugin = plugins.load("package_of_a_test.marked")
    assert plugin.identity.startswith("no version, sha256:")
    assert plugin.identity.endswith(f", {marked.path}")
    assert plugin.added == {"method": ("mine",)}
    plugins.unload(plugin.name)
    assert "package_of_a_test.marked" not in sys.modules


MISTAKES = {
    "syntax": ("def broken(:\n", r"cannot be loaded \(line 1\): SyntaxError"),
    "exception": ("x = 1\ny = x / 0\n", r"cannot be loaded \(line 2\): ZeroDivisionError: division by zero\.$"),
    "exit": ("raise SystemExit(3)\n", r"cannot be loaded \(line 1\): SystemExit: 3"),
    "zero bytes": ("a = '\0'\n", "cannot be loaded.*null bytes"),
    "nothing": ("x = 1\n", "registers nothing: put @fedkern.register"),
    "command": ("@register('list')\nclass A(FedAvg):\n    'One.'\n", '"list", which is the name of a command'),
    "taken": ("@register('fedavg')\nclass A(FedAvg):\n    'One.'\n", '"fedavg" is already registered'),
    "taken, same class": ("@register('fedavg')\nclass FedAvg(FedAvg):\n    'One.'\n", '"fedavg" is already registered'),
    "word": ("@register('a b')\nclass A(FedAvg):\n    'One.'\n", '"a b": a name has letters, digits'),
    "no docstring": ("@register('a')\nclass A(FedAvg): pass\n", "A needs a docstring"),
    "model": ("from fedkern.models import MODELS\nMODELS['cnn'] = MODELS['mlp']\n", 'the model "cnn", which is reg'),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, text, message):
    before, modules = read_tables(), set(sys.modules)
    path = write(tmp_path, text if "register" not in text else f"from fedkern.methods import FedAvg, register\n{text}")
    with pytest.raises(UserError, match=message) as told:
        plugins.load(path)
    assert path in str(told.value)
    assert read_tables() == before
    assert plugins.loaded_plugins() == ()
    assert not [name for name in set(sys.modules) - modules if name.startswith("fedkern_file")]


def test_an_exception_takes_back_what_was_registered_before(tmp_path):
    before = read_tables()
    text = "from fedkern.methods import FedAvg, register\n@register('first')\nclass A(FedAvg):\n    'One.'\n1 / 0\n"
    with pytest.raises(UserError, match=r"line 5"):
        plugins.load(write(tmp_path, text))
    assert read_tables() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/own.py", "cannot be read: No such file"),
        ("folder.py", "cannot be read: it is a folder"),
        ("no such-module", "must name a file FILE.py or a module"),
        ("", "must name a file FILE.py or a module"),
        ("module_that_is_not_there", "is no module that Python can import"),
        ("json.nothing", "is no module that Python can import"),
        ("own", r"is no module .*\(or --plugin own.py\)"),
    ],
)
def test_a_plugin_that_is_not_there(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "own.py").write_text("")
    with pytest.raises(UserError, match=message):
        plugins.load(name)


def test_two_plugins_cannot_have_one_name(tmp_path):
    plugin, second = Marked(tmp_path / "a"), Marked(tmp_path / "b")
    plugins.load(str(plugin.path))
    kept = METHODS["mine"]
    with pytest.raises(UserError, match=r'b/marked.py cannot be loaded \(line 6\): .* "mine" is already registered'):
        plugins.load(str(second.path))
    assert METHODS["mine"] is kept


def test_names_of_commands_are_those_of_the_command_line():
    assert set(plugins.COMMANDS) == {*front_page.COMMANDS, "help", "resume", "run"}


# -- entry points ------------------------------------------------------------------------------------------------------


@pytest.fixture
def points(monkeypatch, tmp_path):
    """Make entry points of modules in tmp_path."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*names):
        found = [EntryPoint(name, f"{name}_of_a_test", plugins.GROUP) for name in names]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if group == plugins.GROUP else [])
        monkeypatch.setattr(plugins, "_installed", False)

    return make


def test_entry_points_are_loaded_and_broken_ones_warn(points, tmp_path):
    write(tmp_path, Marked(tmp_path).path.read_text(), "good_of_a_test.py")
    write(tmp_path, "1 / 0\n", "broken_of_a_test.py")
    points("broken", "good", "missing")
    said = []
    plugins.load_installed(said.append)
    assert [plugin.name for plugin in plugins.loaded_plugins()] == ["good_of_a_test"]
    assert not plugins.loaded_plugins()[0].given
    assert len(said) == 2
    assert "broken of an installed package is left out: The plugin broken_of_a_test cannot be loaded" in said[0]
    assert "ZeroDivisionError" in said[0]
    assert "missing of an installed package is left out" in said[1]
    plugins.load_installed(said.append)
    assert len(said) == 2  # once in a process
    unload_all()
    points()
    plugins.load_installed(said.append)
    assert "mine" not in METHODS
