"""Tests of registries: who may have a name, and the description of an entry."""

from types import ModuleType

import pytest

from fedkern.usercode import registry
from fedkern.usercode.registry import Registry

CODE = "class Thing:\n    '''A thing.\n\n    More.\n    '''\nclass Bare: pass\n"


@pytest.fixture
def things(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRIES", {})
    return Registry("thing", {"shipped": object}, code=lambda entry: None if entry is object else entry)


@pytest.fixture
def load(monkeypatch):
    """Run code as a module, of a file or of a notebook."""

    def load_module(name, file=None):
        module = ModuleType(name)
        if file is not None:
            module.__file__ = file
        monkeypatch.setitem(registry.sys.modules, name, module)
        exec(compile(CODE, file or "<cell>", "exec"), module.__dict__)
        return module

    return load_module


def test_the_first_line_of_the_docstring_describes_an_entry(things, load):
    module = load("a", "/a.py")
    assert things.describe("x", module.Thing) == things.describe("x", module.Thing, "other words") == "A thing."
    assert things.describe("x", module.Bare, "other words") == "other words"
    with pytest.raises(TypeError, match=r"^Bare needs a docstring: its first line describes the thing to the user$"):
        things.describe("x", module.Bare)
    assert registry.REGISTRIES.pop("thing") is things


def test_a_name_stays_with_the_code_of_its_file_or_notebook(things, load):
    things["x"] = load("a", "/a.py").Thing
    assert things.takes("x", load("__main__", "/a.py").Thing)  # the file as a script, or after a change
    assert not things.takes("x", load("a", "/a.py").Bare)
    with pytest.raises(ValueError, match=r'^thing "x" is already registered by Thing$'):
        things.describe("x", load("b", "/b.py").Thing)
    with pytest.raises(ValueError, match=r'^thing "shipped" is already registered$'):
        things.describe("shipped", load("a", "/a.py").Thing)
    things["y"] = load("__main__").Thing
    assert things.takes("y", load("__main__").Thing)
    assert not things.takes("y", load("other").Thing)
