"""Tests of registries, names of code, and misspelt hooks of users' classes."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fedkern
from fedkern.engine.parts.part import PARTS
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.usercode import named_code, registry
from fedkern.usercode.named_code import Named, load, parse
from fedkern.usercode.registry import Registry

CODE = "class Thing:\n    '''A thing.\n\n    More.\n    '''\nclass Bare: pass\n"


@pytest.fixture
def things(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRIES", {})
    return Registry("thing", {"shipped": object}, code=lambda entry: None if entry is object else entry)


@pytest.fixture
def load_entry(monkeypatch):
    """Run code as a module, of a file or of a notebook."""

    def load_module(name, file=None):
        module = ModuleType(name)
        if file is not None:
            module.__file__ = file
        monkeypatch.setitem(registry.sys.modules, name, module)
        exec(compile(CODE, file or "<cell>", "exec"), module.__dict__)
        return module

    return load_module


def test_the_first_line_of_the_docstring_describes_an_entry(things, load_entry):
    module = load_entry("a", "/a.py")
    assert things.describe("x", module.Thing) == things.describe("x", module.Thing, "other words") == "A thing."
    assert things.describe("x", module.Bare, "other words") == "other words"
    with pytest.raises(TypeError, match=r"^Bare needs a docstring: its first line describes the thing to the user$"):
        things.describe("x", module.Bare)
    assert registry.REGISTRIES.pop("thing") is things


def test_a_name_stays_with_the_code_of_its_file_or_notebook(things, load_entry):
    things["x"] = load_entry("a", "/a.py").Thing
    assert things.takes("x", load_entry("__main__", "/a.py").Thing)  # the file as a script, or after a change
    assert not things.takes("x", load_entry("a", "/a.py").Bare)
    with pytest.raises(ValueError, match=r'^thing "x" is already registered by Thing$'):
        things.describe("x", load_entry("b", "/b.py").Thing)
    with pytest.raises(ValueError, match=r'^thing "shipped" is already registered$'):
        things.describe("shipped", load_entry("a", "/a.py").Thing)
    things["y"] = load_entry("__main__").Thing
    assert things.takes("y", load_entry("__main__").Thing)
    assert not things.takes("y", load_entry("other").Thing)


# -- hooks -------------------------------------------------------------------------------------------------------------


class Helped(FedAvg):
    """Method with names like those of hooks, which the class or its user calls."""

    losses = evaluate_all = classmethod(len)

    def weights(self, factor):
        return factor

    def server_update(self, server, exchange, uploads):
        self.terms_of = self.weights(2)
        super().server_update(server, exchange, uploads)


def wrong(self, *values):
    super(type(self), self).server_udpate(*values)


@pytest.mark.parametrize(
    ("base", "members", "hook"),
    [
        (FedAvg, {"server_udpate": wrong}, "server_update"),
        (Helped, {"client_updates": staticmethod(wrong)}, "client_update"),
        (FedAvg, {"losss": wrong}, "loss"),
        (FedAvg, {"stateles": True}, "stateless"),
        (FedAvg, {"Option": FedAvg.Options}, "Options"),
        (Listener, {"on_round_ended": wrong}, "on_round"),
        (Listener, {"on_train_begin": wrong}, "on_start"),
        (fedkern.Part, {"rounds_end": wrong}, "round_end"),
    ],
)
def test_a_misspelt_hook_is_named(base, members, hook, tmp_path):
    kind = type("Mine", (base,), {**members, "__doc__": "A class of a script."})
    run = {"data": "digits", "rounds": 1, "out": tmp_path / "run", "progress": False}
    doors = {
        fedkern.Part: fedkern.register_part("mine"),
        Listener: lambda kind: fedkern.simulate("fedavg", listener=kind(), **run),
    }
    with pytest.raises(fedkern.UserError, match=f'^Mine has "{next(iter(members))}", .* Did you mean "{hook}"'):
        doors.get(base, lambda kind: fedkern.simulate(kind, **run))(kind)
    assert not [*tmp_path.iterdir()]
    assert "mine" not in PARTS


def test_a_helper_is_no_hook(tmp_path):
    given = {"data": "digits", "train_samples": 60, "model": "mlp", "rounds": 1, "local_steps": 1, "clients": 2}
    given |= {"listener": type("Mine", (Listener,), {"on_message": wrong})(), "out": tmp_path / "run"}
    run = fedkern.simulate(Helped, **given, workers=1, threads=1, progress=False, pictures=False)
    assert run.summary["rounds"] == 1


# -- named code --------------------------------------------------------------------------------------------------------


def test_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse("net.py:Net") == Named("Net", file=str(tmp_path / "net.py"))
    assert parse("package.module:Net") == Named("Net", module="package.module")
    assert str(parse("net.py:Net")) == f"{tmp_path}/net.py:Net"
    assert str(parse("package.module:Net")) == "package.module:Net"
    assert named_code.short_name("package.module:Net") == "Net"


@pytest.mark.parametrize("text", ["cnn", "resnet:18", "clip:openai/clip", ".math:floor", ":f", "a:b:c", "module:Net"])
def test_other_words_name_no_code(text):
    assert parse(text) is None
    assert named_code.absolute(text) == named_code.short_name(text) == text


def identity(text):
    return load(parse(text), "the code")[1]


def test_identity_of_a_file_counts_what_it_imports(monkeypatch, tmp_path):
    net, beside = tmp_path / "net_of_a_test.py", tmp_path / "imported_by_a_test.py"
    net.write_text("import imported_by_a_test\n\ndef make():\n    return imported_by_a_test.VALUE\n")
    beside.write_text("VALUE = 1\n")
    make, before = load(parse(f"{net}:make"), "the code")
    assert load(parse(f"{net}:make"), "the code") == (make, before)
    beside.write_text("VALUE = 22\n")  # in a notebook, whose process has loaded the former one
    after, hash_after = load(parse(f"{net}:make"), "the code")
    assert hash_after != before
    assert (make(), after()) == (1, 22)


def test_identity_of_a_module_is_that_of_its_distribution():
    assert identity("numpy:mean").startswith(np.__version__)
    assert identity("numpy:mean").endswith(str(Path("numpy") / "__init__.py"))


def test_a_module_may_have_another_name_than_it_is_imported_by(monkeypatch):
    assert identity("os.path:join") == identity(f"{os.path.__name__}:join")
    main = ModuleType("main_of_a_test")
    main.__spec__ = find_spec("wave")  # as of python -m wave
    main.make = len
    monkeypatch.setitem(sys.modules, "main_of_a_test", main)
    assert identity("main_of_a_test:make") == identity("wave:open")


def test_code_of_a_running_script_has_its_own(monkeypatch):
    main = ModuleType("main_of_a_test")
    exec("def make():\n    return 1\n", vars(main))
    monkeypatch.setitem(sys.modules, "main_of_a_test", main)
    before = identity("main_of_a_test:make")
    exec("def make():\n    return 2\n", vars(main))
    assert identity("main_of_a_test:make") != before


def test_what_a_file_lacks(tmp_path):
    (tmp_path / "net.py").write_text("def net(): pass\n")
    with pytest.raises(UserError, match=r'the code .*net.py:nat cannot be imported: .* has no "nat"\. Did you mean "'):
        load(parse(f"{tmp_path}/net.py:nat"), "the code")
