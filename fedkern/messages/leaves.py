"""Leaves: the tensors in nested containers such as batches and network outputs."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedkern.errors import UserError, describe_error
from fedkern.ops._core.private_torch import PYTREE_NODES, REGISTER_NODE

TARGETS = ("labels", "targets", "label")
"""Keys under which a mapping may hold a batch's targets."""


Parts = dict[Any, Any]
T = TypeVar("T")


def _parts(value: object) -> Parts | None:
    """Return the parts of a container by key, index or name, None for a leaf."""
    if isinstance(value, Tensor):
        return None
    if (node := PYTREE_NODES.get(type(value))) is not None:
        children = node.flatten_fn(value)[0]
        keys = value if isinstance(value, Mapping) and len(value) == len(children) else range(len(children))
        return dict(zip(keys, children, strict=True))
    if isinstance(value, Mapping):
        return {key: value[key] for key in value}
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    return _attributes(value)


def _attributes(value: object) -> Parts | None:
    if isinstance(value, (SimpleNamespace, Namespace)):
        return vars(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _remade(value: Any, parts: Parts) -> object:
    """Rebuild a container of the type of ``value`` from other parts, without calling its constructor."""
    kind: Any = type(value)
    try:
        if (node := PYTREE_NODES.get(kind)) is not None:
            return node.unflatten_fn([*parts.values()], node.flatten_fn(value)[1])
        if isinstance(value, tuple):
            return tuple.__new__(kind, parts.values())
        twin, before = kind.__new__(kind), _parts(value) or {}
        # A mapping may have its entries as attributes too, or in a dict that is an attribute.
        for name, attribute in getattr(value, "__dict__", {}).items():
            inside = attribute if type(attribute) is dict else {name: attribute}
            inside = {key: parts[key] if key in parts and part is before[key] else part for key, part in inside.items()}
            vars(twin)[name] = inside if type(attribute) is dict else inside[name]
        if isinstance(value, list):
            list.extend(twin, parts.values())
        for key, part in parts.items() if not isinstance(value, list) else ():
            if isinstance(value, dict):
                (OrderedDict if isinstance(value, OrderedDict) else dict).__setitem__(twin, key, part)
            elif not isinstance(value, Mapping):
                object.__setattr__(twin, key, part)  # of a frozen dataclass too
        if any(part is not parts[key] for key, part in (_parts(twin) or {}).items()):
            raise TypeError("its entries are not where a dict has them")
    except Exception as error:  # a user's class may raise anything
        raise UserError(
            f"An object of type {kind.__name__} cannot be made again with other tensors ({describe_error(error)}): "
            f"register the type with {REGISTER_NODE}, or give a dict, tuple or dataclass."
        ) from error
    return twin


def map_leaves(change: Callable[[Any], object], value: object, is_leaf: Callable[[object], bool] | None = None) -> Any:
    """Apply ``change`` to every leaf and return the same nesting of the same types.

    A container whose leaves all stay the same is returned itself. Containers are nodes of torch's pytree, mappings,
    tuples, lists, dataclasses and namespaces.
    """
    parts = None if is_leaf is not None and is_leaf(value) else _parts(value)
    if parts is None:
        return change(value)
    changed = {key: map_leaves(change, part, is_leaf) for key, part in parts.items()}
    return value if all(changed[key] is part for key, part in parts.items()) else _remade(value, changed)


def leaves(value: object) -> Iterator[Any]:
    parts = _parts(value)
    if parts is None:
        yield value
    else:
        for part in parts.values():
            yield from leaves(part)


def join_batches(values: list[Any], sizes: list[int]) -> Any:
    """Join the values of batches with ``sizes`` samples: concatenate tensors, stack numbers, list other leaves.

    None in all batches stays None. A list holds a value for every sample, or tensors ``[B, ...]`` as torch's collation
    makes them of tuples.

    Raises:
        RuntimeError: tensors cannot be concatenated, or containers have different parts.
    """
    example = values[0]
    if all(value is None for value in values):
        return None
    if isinstance(example, Tensor):
        return torch.cat([value.reshape(1) if value.dim() == 0 else value for value in values])
    parts = [_parts(value) or {} for value in values]
    if _parts(example) is None or (isinstance(example, list) and not _positions(values, sizes)):
        return [part for value in values for part in (value if isinstance(value, list) else [value])]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise RuntimeError(f"batches give a {type(example).__name__} of other parts")
    return _remade(example, {key: join_batches([part[key] for part in parts], sizes) for key in parts[0]})


def _positions(values: list[Any], sizes: list[int]) -> bool:
    per_sample = all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size
        for leaves_of_batch, size in zip(values, sizes, strict=True)
        for leaf in leaves_of_batch
    )
    return per_sample and len({len(value) for value in values}) == 1


def move_to_device(value: T, device: torch.device) -> T:
    """Move every leaf that has a ``to`` (tensors, batches of other libraries) to a device, keeping the nesting."""
    if (
        device.type == "cpu"
        and isinstance(value, list)
        and type(value) is list
        and all(type(part) is Tensor and part.is_cpu for part in value)
    ):
        return value

    def move_leaf(leaf: Any) -> object:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    result: T = map_leaves(move_leaf, value, lambda part: callable(getattr(part, "to", None)))
    return result


class Positional(tuple[Any, ...]):
    """Several positional inputs of a network."""


class Keywords(dict[str, Any]):
    """Inputs of a network by argument name."""


def split_targets(batch: object) -> tuple[Any, Any]:
    """Split a batch into inputs and targets: a tuple's last part, or a mapping's entry of `TARGETS`.

    A dataclass or namespace is its own input, and an attribute of `TARGETS` holds the targets. Targets are None where
    no part can be identified as targets.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, targets = batch
        return inputs[0] if len(inputs) == 1 else Positional(inputs), targets
    if isinstance(batch, Mapping):
        name = next((name for name in TARGETS if name in batch), None)
        if name is not None:
            return Keywords({key: value for key, value in batch.items() if key != name}), batch[name]
    names = _attributes(batch) or {}
    return batch, next((names[name] for name in TARGETS if name in names), None)
