"""Leaves: the tensors in nested tuples, lists and mappings, as batches and outputs of networks are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TARGETS = ("labels", "targets")
"""Keys of a batch's targets, where it is a mapping."""


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting with every leaf changed; an object that is none of these counts as a leaf."""
    if isinstance(value, Mapping):
        result = {key: mapped(function, each) for key, each in value.items()}
        return Keywords(result) if isinstance(value, Keywords) else result
    if isinstance(value, (tuple, list)):
        parts = [mapped(function, each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """The leaves in order."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def together(values: list[Any], sizes: list[int]) -> Any:
    """Values of batches of so many samples as one: tensors are concatenated, numbers stacked, other leaves made a list.

    A list is a value for every sample, or tensors ``[B, ...]`` as torch's collation makes them of tuples.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {key: together([each[key] for each in values], sizes) for key in first}
    if isinstance(first, tuple) or (isinstance(first, list) and _positions(values, sizes)):
        result = [together(list(parts), sizes) for parts in zip(*values, strict=True)]
        return result if isinstance(first, list) else tuple(result)
    if isinstance(first, Tensor):
        return torch.cat([each.reshape(1) if each.dim() == 0 else each for each in values])
    return [part for each in values for part in (each if isinstance(each, list) else [each])]


def _positions(values: list[Any], sizes: list[int]) -> bool:
    """Whether lists of batches hold tensors of all samples, one behind another."""
    per_sample = all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size
        for each, size in zip(values, sizes, strict=True)
        for leaf in each
    )
    return per_sample and len({len(each) for each in values}) == 1


def sent(value: Any, device: torch.device) -> Any:
    """The same nesting with every leaf that can be moved (tensors, batches of other libraries) on a device."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return mapped(moved, value)


class Positional(tuple[Any, ...]):
    """Several inputs of a network, in order."""


class Keywords(dict[str, Any]):
    """Inputs of a network by the names of its arguments."""


def parted(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch: of a tuple the last part, of a mapping ``labels`` or ``targets`` are the targets.

    Targets are None where nothing says what they are.
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
    return batch, None
