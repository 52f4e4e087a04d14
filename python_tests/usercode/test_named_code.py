"""Tests of names of code: their form, and the identity of the code that they name."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedkern.errors import UserError
from fedkern.usercode import named_code
from fedkern.usercode.named_code import Named, load, parse


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
    with pytest.raises(
        UserError, match=r'the code .*net.py:nat cannot be imported: .* has no "nat"\. Did you mean "net"'
    ):
        load(parse(f"{tmp_path}/net.py:nat"), "the code")
