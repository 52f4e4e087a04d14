"""Argument checks of contrastive."""

from __future__ import annotations

from torch import Tensor

from fedkern.ops._core.backend import eager
from fedkern.ops._core.checks import check_device, check_floating, check_number


def check_pair(x: Tensor, y: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        check_floating(tensor, name)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape [B, D], one embedding per row, but has {list(tensor.shape)}")
    if x.shape != y.shape:
        raise ValueError(f"y must have shape {list(x.shape)} like x, row for row, but has {list(y.shape)}")
    check_device(y, "y", x, "x")


def check_temperature(temperature: float | Tensor, x: Tensor) -> float | Tensor:
    """Return ``temperature`` as a float above 0, or unchanged if it is a tensor."""
    if isinstance(temperature, Tensor):
        check_floating(temperature, "temperature")
        if temperature.dim() != 0:
            raise ValueError(
                f"temperature must be a number or a tensor without dimensions, but has shape {list(temperature.shape)}"
            )
        check_device(temperature, "temperature", x, "x")
        # Reading a GPU tensor would synchronise: there a value that is not above 0 gives what the formula says.
        if temperature.is_cpu and eager(temperature):
            check_number(temperature.item(), "temperature", above=True)
        return temperature
    return check_number(temperature, "temperature", above=True)
