"""aggregate: weighted averages of flat model vectors, all at once or one upload at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# 1. What it computes.


def weighted_mean_reference(vectors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float]) -> Tensor:
    """The specification of :func:`weighted_mean`: the sum in fp64, in the order given, divided by the weights' sum."""
    rows = list(vectors)
    values = torch.as_tensor(weights, dtype=torch.float64, device=rows[0].device)
    total = torch.zeros_like(rows[0], dtype=torch.float64)
    for row, value in zip(rows, values, strict=True):
        # A client of weight zero does not count, whatever it sent.
        total = torch.where(value == 0, total, total + row.double() * value)
    return (total / values.sum()).to(rows[0].dtype)


# 2. The public functions.


def weighted_mean(
    vectors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float], out: Tensor | None = None
) -> Tensor:
    rows = list(vectors)
    values = (
        check_weights(weights, len(rows)) if not isinstance(weights, Tensor) or weights.device.type == "cpu" else None
    )
    result = weighted_mean_reference(rows, values if values is not None else weights)
    if out is None:
        return result
    with torch.no_grad():
        return out.copy_(result)


def check_weights(weights: Tensor | Sequence[float], count: int) -> list[float]:
    values = [float(value) for value in (weights.tolist() if isinstance(weights, Tensor) else weights)]
    if len(values) != count:
        raise ValueError(f"weights must have one value for each of the {count} vectors, not {len(values)}")
    for position, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weights must be finite and not negative; weights[{position}] is {value}")
    total = sum(values)
    if not 0 < total < math.inf:
        raise ValueError(f"weights must have a positive, finite sum, not {total}")
    return values


class Accumulator:
    """The running weighted mean of vectors that arrive one after another, in O(P) memory."""

    def __init__(self, size: int, exact: bool = False, *, device: torch.device | str | None = None) -> None:
        self.size = size
        self.exact = exact
        self.count = 0
        self._dtype: torch.dtype | None = None
        self._weight = 0.0
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)

    @property
    def weight(self) -> float:
        """The sum of the weights so far."""
        return self._weight

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        value = float(weight)
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight must be finite and not negative, not {value}")
        if not isinstance(vector, Tensor) or vector.dtype not in FLOATS:
            raise TypeError("vector must be a floating-point tensor")
        if vector.shape != (self.size,):
            raise ValueError(f"vector must have shape [{self.size}], not {list(vector.shape)}")
        if value:
            self._sum += vector.detach().double() * value
        self._weight += value
        self.count += 1
        self._dtype = vector.dtype if self._dtype is None else torch.promote_types(self._dtype, vector.dtype)

    def mean(self, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the mean ``[P]`` in ``dtype`` (default: that of the vectors), or writes it into ``out``."""
        if not self._weight > 0:
            raise ValueError("the accumulator is empty: add a vector with a positive weight before asking for the mean")
        result = (self._sum / self._weight).to(dtype or self._dtype or torch.float32)
        if out is None:
            return result
        with torch.no_grad():
            return out.copy_(result)

    def reset(self) -> None:
        """Forgets everything added."""
        self._sum.zero_()
        self._weight, self.count, self._dtype = 0.0, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and numbers from which :meth:`load_state_dict` continues bit for bit."""
        return {"sum": self._sum.clone(), "weight": self._weight, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state made by :meth:`state_dict`."""
        self._sum.copy_(state["sum"])
        self._weight, self.count = float(state["weight"]), int(state["count"])
