"""Tests of the identity of code and objects: a table by path that shows every change, the same in every process."""

import collections
import datetime
import decimal
import enum
import fractions
import functools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.usercode import code_identity

FACTOR = 1


class Level(enum.Enum):
    LOW, HIGH = 1, 2


class Holder:
    def __init__(self, value):
        self._value = value


class Slots:
    __slots__ = ("__value",)

    def __init__(self, value):
        self.__value = value


class Members(set):
    """Set of objects that hash by address."""


def table(thing):
    return code_identity.identity_table({"x": thing})


def helper(value):
    return value * FACTOR


def module_of(value):
    module = types.ModuleType("settings_of_a_test")
    module.value = value
    return lambda: module.value


def run_code(text):
    scope = {}
    exec(text, scope)
    return scope["made"]


def with_global(value):
    globals()["FACTOR"] = value
    return lambda x: [helper(y) for y in x]


def with_decorator(value):
    @torch.no_grad()
    @functools.lru_cache
    def function(x):
        return x * value

    return function


def with_base(value):
    class Base:
        weight = value

    class Derived(Base):
        __slots__ = ()

    return Derived()


def with_metaclass(value):
    class Kind(type):
        weight = value

    return Kind("Made", (), {})()


def with_hook(value):
    network = nn.Sequential(nn.ReLU())
    network.register_forward_hook(lambda module, inputs, output: output * value)
    return network


def with_buffer(value):
    network = nn.Module()
    network.register_buffer("weight", torch.full((9,), float(value)), persistent=False)
    return network


def chain_of(value, depth=code_identity.DEEP // 2):
    for _ in range(depth):
        value = Holder(value)
    return value


def generator(value):
    return torch.Generator().manual_seed(value)


KINDS = {
    "closure": lambda v: lambda x: x * v, "default": lambda v: (lambda x, w=v: x), "global": with_global,
    "constant": lambda v: run_code(f"made = lambda x: x in {{'a', 'b', {v}}}"), "decorator": with_decorator,
    "exec": lambda v: run_code(f"W = {v}\ndef made(x):\n    return W"), "module": module_of, "slots": Slots,
    "class": lambda v: run_code(f"class made:\n    def f(self): return {v}"), "base": with_base,
    "metaclass": with_metaclass,
    "partial": lambda v: functools.partial(helper, v), "bound method": lambda v: Holder(v).__eq__, "hook": with_hook,
    "buffer": with_buffer, "private": Holder, "nested": chain_of, "enum": Level, "set": lambda v: {"a", "b", v},
    "set of objects": lambda v: Members({Holder(v), Holder("a"), Holder("b")}), "dict": lambda v: {Level.LOW: [v]},
    "deque": lambda v: collections.deque([v], maxlen=3), "named tuple": collections.namedtuple("Pair", "v"),
    "default dict": lambda v: collections.defaultdict(functools.partial(list, [v])), "range": range, "path": lambda v:
    pathlib.Path(f"p{v}"), "date": lambda v: datetime.date(2000 + v, 1, 1), "decimal": decimal.Decimal, "complex":
    lambda v: complex(1, v), "fraction": lambda v: fractions.Fraction(v, 7), "pattern": lambda v: re.compile("a" * v),
    "dtype": lambda v: (None, torch.float16, torch.bfloat16)[v], "bytes": lambda v: bytearray([v]), "random":
    random.Random, "numpy random": np.random.default_rng, "generator": generator, "long": lambda v: "a" * 999 + str(v),
    "array": lambda v: np.full((9, 2), v, np.float16)[::2], "objects": lambda v: np.array([Holder(v)], dtype=object),
    "masked": lambda v: np.ma.array(np.ones(9), mask=np.arange(9) == v), "sparse": lambda v:
    torch.eye(9).mul(v).to_sparse(),
    "strided": lambda v: torch.eye(9).mul(v).t()[1:], "bfloat16": lambda v: torch.full((9,), v, dtype=torch.bfloat16),
    "conjugate": lambda v: torch.full((9,), complex(1, v)).conj(), "subclass": lambda v: type("Own", (float,), {})(v),
    "descriptor": lambda v: type("Made", (), {"w": type("Own", (), {"__get__": lambda *_: v})()})(),
    "loss": lambda v: nn.SmoothL1Loss(beta=float(v)), "namespace": lambda v: types.SimpleNamespace(a=Holder(v)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_told_and_an_equal_object_is_equal(kind):
    make = KINDS[kind]
    before = table(make(1))
    assert table(make(1)) == before
    assert code_identity.find_changes(before, table(make(2)))
    assert code_identity.list_uncompared(before) == []


TOLD = """
import json
from python_tests.usercode.test_identity import KINDS, code_identity, table
print(json.dumps({kind: code_identity.digest(table(make(1))) for kind, make in KINDS.items()}))
"""


def test_a_table_is_the_same_in_another_process():
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run(
        [sys.executable, "-c", TOLD], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert json.loads(told) == {kind: code_identity.digest(table(make(1))) for kind, make in KINDS.items()}


def test_words_name_what_has_changed():
    words = code_identity.find_changes(table(Holder(2.0)), table(Holder(3.0)))
    assert words == ["`x._value` changed from 2.0 to 3.0"]
    before, second = (run_code(f"def made(a):\n    return a + {n}") for n in (1, 2))
    assert code_identity.find_changes(table(before), table(second)) == ["`x` changed"]
    assert code_identity.find_changes(table(Holder(1)), table(Holder(Holder(1)))) == [
        "`x._value` changed from 1 to Holder"
    ]
    assert code_identity.find_changes({"a": "1"}, {"b": "1"}) == ["`a` is gone", "`b` is new"]
    assert code_identity.find_changes(table(nn.ReLU()), table(before)) == [
        "`x` changed"
    ]  # not the Python of its bytecode


def test_lines_and_docstrings_of_classes_do_not_count():
    before = run_code("class made:\n    '''One.'''\n    def f(self): return 1")
    second = run_code("\n\nclass made:\n    '''Two.'''\n    # a comment\n    def f(self):\n        return 1")
    assert table(before) == table(second)
    f, two = (lambda a: a + 1), (lambda a: a + 1)
    assert table(f) == table(two) != table(lambda a: a + 2)


def test_modules_count_by_name_and_version():
    from torch.nn import functional

    def function(x):
        return functional.relu(torch.as_tensor(np.abs(x)))

    rows = table(function)
    assert rows["x.functional"] == "module torch.nn.functional"
    assert rows["x.np"] == f"module numpy (numpy {np.__version__})"
    assert len(rows) < 6


def test_a_module_that_code_imports_by_itself_counts_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "imported_inside_a_test.py"
    function = run_code("def made():\n    import imported_inside_a_test, torch, json")
    file.write_text("a = 1")
    before = table(function)
    assert before["x.imported_inside_a_test"].endswith(code_identity.content_hash(file.read_bytes()))
    file.write_text("a = 2")
    assert code_identity.find_changes(before, table(function))


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (threading.Lock(), "lock"),
        ([Holder(1), (x for x in ())], "generator"),
        (chain_of(1, code_identity.DEEP + 5), f"deeper than {code_identity.DEEP} levels"),
        (torch.zeros(code_identity.LIMIT), f"all after its first {code_identity.LIMIT:,} bytes"),
        ("a" * 2 * code_identity.LIMIT, f"all after its first {code_identity.LIMIT:,} bytes"),
        ([*range(code_identity.LIMIT)], f"all after its first {code_identity.LIMIT:,} bytes"),
        ([Holder(n) for n in range(code_identity.NODES)], f"this and all after {code_identity.NODES:,} values"),
        (os.environ, "environment of the process"),
        (random.random, "generator of the process"),
        (np.random.rand, "generator of the process"),
        (torch.default_generator, "generator of the process"),
    ],
    ids=range(11),
)
def test_what_is_not_compared_is_listed(thing, said):
    (listed,) = code_identity.list_uncompared(table(thing))
    assert said in listed


def test_an_object_that_raises_at_everything_is_walked():
    def fails(*arguments):
        raise RuntimeError

    names = ("eq", "hash", "repr", "len", "bool", "iter", "array", "reduce", "getattr")
    kind = type("Raising", (), {f"__{name}__": fails for name in names})
    things = kind(), kind()
    things[1].value = 2
    assert code_identity.find_changes(*map(table, things)) == ["`x.value` is new"]


def test_what_a_call_leaves_in_functools_and_in_modes_of_torch_does_not_count():
    mode, function = torch.autocast("cpu"), functools.singledispatch(helper)
    before = table([mode, torch.no_grad(), function])
    with mode:
        function(1)
    assert table([mode, torch.no_grad(), function]) == before


def test_cycles_end():
    holder, second = Holder(1), [1]
    holder._value = {"self": holder, "list": second}
    second.append(second)
    assert table(holder)["x._value['self']"] == "same as x"
    assert code_identity.list_uncompared(table(holder)) == []


def test_weights_and_code_can_be_left_out():
    layer, second = nn.Linear(3, 3), nn.Linear(3, 3)
    assert table(layer) != table(second)
    assert code_identity.identity_table({"x": layer}, weights=False) == code_identity.identity_table(
        {"x": second}, weights=False
    )
    small, two = (run_code(f"class made:\n    def f(self): return {n}")() for n in (1, 2))
    assert table(small) != table(two)
    assert code_identity.identity_table({"x": small}, code=False) == code_identity.identity_table(
        {"x": two}, code=False
    )


def test_a_large_table_is_stored_as_few_rows_that_tell_as_much():
    rows = table(nn.Sequential(*(nn.Sequential(nn.Dropout(0.1), nn.ReLU()) for _ in range(200))))
    second = {**rows, "x.150.0.p": "0.2"}
    assert len(rows) > 600
    assert len(code_identity.fold_table(rows, 250)) <= 250
    assert code_identity.find_changes(code_identity.fold_table(rows, 250), code_identity.fold_table(second, 250)) == [
        "`x.150` changed"
    ]
    assert code_identity.fold_table({"a": "1"}) == {"a": "1"}


def test_objects_that_a_run_has_changed_count_as_the_former_ones():
    before, after, last = (table(Holder(f"changed by a run of a test {n}")) for n in range(3))
    assert not code_identity.is_unchanged(code_identity.digest(before), code_identity.digest(after))
    code_identity.note_change(before, after)
    code_identity.note_change(after, last)
    assert code_identity.is_unchanged(code_identity.digest(before), code_identity.digest(after))
    assert code_identity.is_unchanged(code_identity.digest(before), code_identity.digest(last))
    assert not code_identity.is_unchanged(code_identity.digest(last), code_identity.digest(before))
