"""Declarations of client uploads, and the check of an upload.

A declaration has the keys of the expected message. Each value is a tensor (for its shape and dtype), `Values`, a
`Number`, a `Maybe` of one of these, or another dict. Every tensor and number must be finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Declaration = Mapping[Any, Any]
Cache = dict[Any, Any]
"""Cache of a client or the server for a round, by name."""
T = TypeVar("T")
LONGEST = 80
"""Most characters shown of a name in an upload, because clients choose these names."""


@dataclass(frozen=True)
class Values:
    """Declaration of a tensor.

    Attributes:
        shape: sizes; a name stands for any size, and equal names for equal sizes within one upload.
        dtype: element type.
        low, high: smallest and largest element allowed; None for any.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Number:
    """Declaration of a Python number, an integer if ``integer``.

    ``low`` and ``high`` bound the number as in `Values`.
    """

    low: float | None = None
    high: float | None = None
    integer: bool = False


@dataclass(frozen=True)
class Maybe:
    """Declaration of an optional entry of an upload."""

    of: Tensor | Values | Number | Declaration


Due = Tensor | Values | Number | Maybe | Declaration
"""Declaration of one entry of an upload."""


def like(value: Tensor | Mapping[str, object]) -> Any:
    """Return the declaration with the shapes and dtypes of ``value``, a tensor or nested dicts of tensors."""
    if isinstance(value, Tensor):
        return Values(tuple(value.shape), value.dtype)
    return {name: like(entry) for name, entry in value.items() if isinstance(entry, (Tensor, Mapping))}


def is_alike(value: Tensor, tensor: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and layout."""
    alike = value.shape == tensor.shape and value.dtype == tensor.dtype
    return alike and value.device == tensor.device and value.layout is tensor.layout


def make_once(round_cache: Cache, key: str, make: Callable[[], T]) -> T:
    """Return the result of ``make()``, computed once a round."""
    name = ("declared", key)
    if name not in round_cache:
        round_cache[name] = make()
    made: T = round_cache[name]
    return made


def needs_something(declared: Declaration) -> bool:
    """Return whether an entry is required, so that an empty upload does not fit."""
    return any(needs_something(entry) if isinstance(entry, Mapping) else not isinstance(entry, Maybe)
               for entry in declared.values())  # fmt: skip


def why_refused(message: object, declared: Declaration, known_finite: Tensor | None = None) -> str:
    """Return why an upload does not fit its declaration, as the end of a sentence, or ""."""
    return next(_faults(message, declared, "", {}, known_finite), "")


def _faults(came: object, due: Due, name: str, sizes: dict[str, int], finite: Tensor | None) -> Iterator[str]:
    if isinstance(due, Maybe):
        due = due.of
    if not isinstance(due, Mapping):
        yield from _number(came, due, name) if isinstance(due, Number) else _tensor(came, due, name, sizes, finite)
        return
    if not isinstance(came, Mapping):
        yield (
            f"has {type(came).__name__} {name} where a dict is expected"
            if name
            else (f"is {type(came).__name__} where a dict of named tensors and numbers is expected")
        )
        return
    if not came and not name and needs_something(due):
        yield "is empty"
    for key, entry in due.items():
        if key in came:
            yield from _faults(came[key], entry, _join_names(name, key), sizes, finite)
        elif not isinstance(entry, Maybe) and not (isinstance(entry, Mapping) and not needs_something(entry)):
            yield f"lacks {_join_names(name, key)}"
    for key in came:
        if key not in due:
            yield f"should not hold {_join_names(name, key)}"


def _join_names(name: str, key: object) -> str:
    text = f"{name}.{key}" if name else str(key)
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def _tensor(
    came: object, due: Tensor | Values, name: str, sizes: dict[str, int], finite: Tensor | None
) -> Iterator[str]:
    if not isinstance(came, Tensor):
        yield f"has {type(came).__name__} {name} where a tensor is expected"
        return
    if came.layout is not torch.strided or came.is_meta:
        yield f"has {name} as a {'meta' if came.is_meta else came.layout} tensor where an ordinary one is expected"
        return
    shape = due.shape
    fits = came.dim() == len(shape) and all(
        size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
        for size, axis in zip(came.shape, shape, strict=True)
    )
    if not fits or came.dtype != due.dtype:
        expected = ", ".join(str(sizes.get(size, size) if isinstance(size, str) else size) for size in shape)
        kind = f"shape {list(came.shape)} and {came.dtype}"
        yield f"has {name} of {kind} where shape [{expected}] and {due.dtype} are expected"
        return
    if came is not finite and not all_finite(came) and not infinite_as_sent(came, due):
        yield f"holds NaN or infinite values in {name}"
        return
    low, high = (due.low, due.high) if isinstance(due, Values) else (None, None)
    if came.numel() and low is not None and float(came.min()) < low:
        yield f"has {name} with {float(came.min()):g} where {low:g} is the least"
    if came.numel() and high is not None and float(came.max()) > high:
        yield f"has {name} with {float(came.max()):g} where {high:g} is the largest"


def infinite_as_sent(came: Tensor, due: Tensor | Values) -> bool:
    """Return whether all infinities were sent so, such as a causal mask of -inf."""
    if not isinstance(due, Tensor) or due.is_meta:
        return False
    return bool((came.isfinite() | (came == due.to(came.device))).all())


def _number(came: object, due: Number, name: str) -> Iterator[str]:
    if isinstance(came, bool) or not isinstance(came, (int, float)) or (due.integer and isinstance(came, float)):
        yield f"has {type(came).__name__} {name} where {'an integer' if due.integer else 'a number'} is expected"
    elif not -math.inf < came < math.inf:
        yield f"has {name} {came} where a finite number is expected"
    elif (due.low is not None and came < due.low) or (due.high is not None and came > due.high):
        low, high = ("any" if end is None else f"{end:g}" for end in (due.low, due.high))
        yield f"has {name} {came:.6g} where a number from {low} to {high} is expected"


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, in one pass that writes nothing (unless the sum overflows)."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    tensor = tensor.detach()
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
