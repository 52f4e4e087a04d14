"""Tests of containers of batches and outputs: rebuilt in their own type, or passed on where nothing changes."""

import argparse
import collections
import dataclasses
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from fedkern.errors import UserError
from fedkern.messages.leaves import join_batches, leaves, map_leaves, move_to_device, split_targets


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
