"""Tests of states on disk, of fingerprints that see every change, and of containers of batches and outputs."""

import argparse
import collections
import dataclasses
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

from fedkern.errors import UserError
from fedkern.messages import states
from fedkern.messages.leaves import join_batches, leaves, map_leaves, move_to_device, split_targets
from fedkern.messages.states import Fingerprint

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


leaf = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(DTYPES).map(lambda d: (torch.arange(6) % 2).reshape(2, 3).to(d)),
)  # fmt: skip
tree = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=6), st.integers(-5, 5)), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=6), tree, max_size=4))
def test_any_state_round_trips(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("state") / "x.safetensors"
    states.save(path, content)
    assert same(states.load(path), content)


def test_awkward_tensors_round_trip(tmp_path):
    base = torch.arange(240.0).reshape(2, 4, 5, 6)
    content = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "strided": base[:, ::2, :, 1:4],
        "view": base[0, 0, 0, :2],
        "shared": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "grad": torch.ones(3, requires_grad=True),
        "array": np.arange(4),
        "backwards": np.arange(4)[::-1],
        "dict": {"$tensor": 1, "tensor": "t0", 3: {"dict": []}},
    }
    states.save(tmp_path / "x.safetensors", content)
    back = states.load(tmp_path / "x.safetensors")
    assert same({**content, "grad": content["grad"].detach()}, back)
    assert (tmp_path / "x.safetensors").stat().st_size < 6000  # the small view did not drag its base along


def test_same_state_same_bytes(tmp_path):
    content = {"b": torch.ones(3), "a": {"x": 1, "y": torch.zeros(2)}}
    states.save(tmp_path / "1", content)
    states.save(tmp_path / "2", content)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    "bad",
    [
        {"x": object()}, {"x": {1.5: 2}}, {"x": [{True: 1}]}, {"x": {1, 2}}, {"x": torch.eye(2).to_sparse()},
        {"x": torch.ones(1, dtype=torch.complex64)}, {"x": [torch.empty(1, device="meta")]},
        {"x": np.array([set()])}, {"x": np.zeros(2, ">f4")},
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_named(bad, tmp_path):
    with pytest.raises(TypeError, match=r"state\['x'\]"):
        states.save(tmp_path / "x", bad)
    assert not list(tmp_path.iterdir())


def test_damaged_state(tmp_path):
    states.save(tmp_path / "x", {"a": torch.ones(100)})
    content = (tmp_path / "x").read_bytes()
    for cut in (b"", content[:50], b"\xff" * 100):
        (tmp_path / "x").write_bytes(cut)
        with pytest.raises(ValueError, match="missing or damaged"):
            states.load(tmp_path / "x")
    with pytest.raises(ValueError, match="missing or damaged"):
        states.load(tmp_path / "y")


def test_a_state_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "FORMAT", states.FORMAT + 1)
    states.save(tmp_path / "x", {"a": torch.ones(1)})
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"x has format 2, and this version of fedkern reads format {states.FORMAT}:"):
        states.load(tmp_path / "x")


def test_a_fingerprint_sees_every_change():
    content = {"a": torch.zeros(3), "n": 1, "d": {"x": [1.5, torch.ones(2)]}, "w": np.zeros(2), "t": (torch.ones(4),)}
    assert Fingerprint(content).matches(content)
    for change in (
        lambda: content["a"].add_(1),
        lambda: content.update(n=2),
        lambda: content["d"]["x"].append(0),
        lambda: content.update(a=torch.zeros(3)),
        lambda: content["w"].__setitem__(0, 1),
        lambda: content.pop("n"),
        # Without a new version or address:
        lambda: content["a"].data.add_(1),
        lambda: content["d"]["x"][1].numpy().__setitem__(1, 5),
        lambda: content.update(a=torch.from_numpy(content["a"].numpy().__iadd__(1))),
        lambda: torch._foreach_add_([content["t"][0].data], 1),
    ):
        before = Fingerprint(content)
        assert before.matches(content)
        change()
        assert not before.matches(content)


def test_a_moved_version_is_a_change_without_a_look_at_the_contents(monkeypatch):
    content = {"a": torch.zeros(3)}
    before = Fingerprint(content)
    monkeypatch.setattr(states, "digest", lambda state: pytest.fail("the contents were read"))
    content["a"].add_(0)
    assert not before.matches(content)


def test_a_fingerprint_knows_a_tensor_in_the_memory_of_the_last():
    content = {"a": torch.zeros(20_000_000)}
    before, place = Fingerprint(content), content["a"].data_ptr()
    for _ in range(3):
        del content["a"]
        content["a"] = torch.zeros(20_000_000)
        assert content["a"].data_ptr() != place, "it may have the number and the version of the old one as well"
        assert not before.matches(content)


# -- leaves ------------------------------------------------------------------------------------------------------------


class Output(collections.OrderedDict[str, Any]):
    """Output like transformers' ModelOutput: entries by key and as attributes, and a constructor of its own."""

    def __init__(self, logits: Any, **entries: Any) -> None:
        super().__init__(logits=logits, **entries)
        self.__dict__.update(self)


class Encoding(collections.UserDict[str, Any]):
    pass


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Any
    labels: Any = None


@dataclasses.dataclass(slots=True)
class Slots:
    logits: Any


class Node:
    def __init__(self, logits: Any) -> None:
        self.logits = logits


class Computed(collections.UserDict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return self.data[key] + 0


_pytree.register_pytree_node(Node, lambda node: ([node.logits], None), lambda parts, _: Node(*parts))
Pair = collections.namedtuple("Pair", "logits states")
x = torch.arange(6.0).reshape(3, 2)
CONTAINERS: dict[str, Any] = {
    "model output": Output(x, states=(x, x), cache=object()), "mapping": Encoding({"logits": x, "states": [x]}),
    "frozen": Frozen(x), "slots": Slots(x), "node": Node(x), "named tuple": Pair(x, x), "deque": collections.deque([x]),
    "namespace": types.SimpleNamespace(logits=x), "arguments": argparse.Namespace(logits=x),
    "factory": collections.defaultdict(list, {"logits": x}),
}  # fmt: skip


def of_logits(value: Any) -> list[Tensor]:
    """Return the logits by key and as an attribute, where a container has both."""
    found = [value["logits"]] if isinstance(value, collections.abc.Mapping) else []
    return [*found, value.logits] if hasattr(value, "logits") else found


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_keep_their_types(kind: str) -> None:
    value = CONTAINERS[kind]
    assert map_leaves(lambda leaf: leaf, value) is value
    assert move_to_device(value, torch.device("cpu")) is value
    doubled = map_leaves(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, value)
    joined = join_batches([value, doubled], [3, 3])
    for made, expected in ((value, x), (doubled, 2 * x), (joined, torch.cat([x, 2 * x]))):
        assert type(made) is type(value)
        tensors = [leaf for leaf in leaves(made) if isinstance(leaf, Tensor)]
        assert tensors
        assert all(torch.equal(tensor, expected) for tensor in (*tensors, *of_logits(made)))


def test_containers_that_cannot_be_made_again_are_named() -> None:
    with pytest.raises(UserError, match=r"type Computed cannot be made again .*: register the type with torch\.utils"):
        map_leaves(lambda leaf: leaf * 2, Computed({"logits": x}))
    with pytest.raises(RuntimeError, match="batches give a dict of other parts"):
        join_batches([{"a": x}, {"b": x}], [3, 3])


def test_a_batch_with_attributes_is_its_own_input() -> None:
    for batch in (Frozen(x, labels=x + 1), types.SimpleNamespace(logits=x, targets=x + 1)):
        inputs, targets = split_targets(batch)
        assert inputs is batch
        assert torch.equal(targets, x + 1)
    packed = torch.nn.utils.rnn.pack_sequence([x])
    assert move_to_device(packed, torch.device("meta")).batch_sizes.device.type == "cpu"
