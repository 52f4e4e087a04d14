"""Calls of conv_norm, and the same in float64 by the reference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from operator_cases import KERNELS
from torch import Tensor

from fedkern import ops

LAST = torch.channels_last
# At the portable ISA level there is no kernel.
CONV = [name for name in KERNELS if name != "cpu-portable"]
LEAVES = ("x", "weight", "scale", "shift", "bias", "residual")

# Of channels that no kernel takes: zeros fill them up to eights or sixteens.
FILLED = ((3, 7, 9, 8), (7, 7, 8, 8), (7, 14, 7, 9), (14, 28, 8, 8), (28, 16, 5, 3), (45, 90, 8, 8))

# In and out channels and sizes [H, W] that each kernel serves, direct ones and Winograd's; odd sizes and least ones.
SERVED = (
    (1, 8, 28, 28), (3, 8, 32, 32), (3, 40, 5, 7), (3, 16, 2, 4), (8, 16, 16, 16), (8, 24, 9, 13), (16, 32, 8, 8),
    (16, 8, 7, 6), (32, 64, 16, 16), (32, 48, 5, 3), (64, 64, 8, 8),
    *FILLED,
)  # fmt: skip

# The same with a stride of 2.
STRIDED = ((16, 32, 8, 8), (32, 64, 10, 13), (16, 16, 9, 11), (32, 48, 3, 8), (14, 28, 8, 9))

# Of kernels of one tap, with either stride.
POINTS = ((16, 32, 8, 8), (32, 64, 10, 13), (8, 8, 9, 7), (24, 40, 4, 16), (64, 16, 3, 9), (7, 14, 8, 9))

# (stride, side of the kernel, shape).
SHAPES = [
    *((1, 3, shape) for shape in SERVED),
    *((2, 3, shape) for shape in STRIDED),
    *((stride, 1, shape) for stride in (1, 2) for shape in POINTS),
]

# Those of a group norm, which knows no channels of zeros.
GROUPED = [case for case in SHAPES if case[2][1] % 8 == 0 and (case[2][0] % 8 == 0 or case[2][0] < 4)]


def arguments(
    batch: int = 4, channels: int = 8, out: int = 16, height: int = 8, width: int = 8, *, residual: bool = False,
    grouped: bool = False, stride: int = 1, side: int = 3, weight_last: bool = True, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Channels-last tensors for a call, all that have a gradient asking for it; ``grouped``: with groups."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    given = {
        "x": randn(batch, channels, height, width).contiguous(memory_format=LAST),
        "weight": randn(out, channels, side, side) / (side * channels**0.5),
        "scale": 1 + randn(out) / 4,
        "shift": randn(out) / 2,
        "mean": randn(out) / 4,
        "variance": 0.5 + randn(out).abs(),
        "bias": None,
        "residual": None,
    }
    if grouped:
        given |= {"mean": None, "variance": None, "bias": randn(out) / 2}
    if residual:
        rows, columns = -(-height // stride), -(-width // stride)
        given["residual"] = randn(batch, out, rows, columns).contiguous(memory_format=LAST)
    if weight_last:
        given["weight"] = given["weight"].contiguous(memory_format=LAST)
    for name in LEAVES:
        if given[name] is not None:
            given[name].requires_grad_()
    return given


def exact(given: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, as leaves of their own."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }


def grad_for(given: dict[str, Any], seed: int = 1, **settings: Any) -> Tensor:
    """A gradient of the result: 0 where rounding could decide what the ReLU or the maximum of a window passes on."""
    plain = {**settings, "relu": False, "pool": 1, "update": False}
    with torch.no_grad(), ops.use_backend("reference"):
        z = ops.conv_norm(**exact(given), **plain)
    clear = torch.ones_like(z, dtype=torch.bool)
    if settings.get("relu", True):
        clear, z = z.abs() > 1e-4, z.relu()
    if settings.get("pool", 1) == 2:
        height, width = (size // 2 * 2 for size in z.shape[2:])
        windows = z[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
        first, second = windows.topk(2, -1).values.unbind(-1)
        clear = (first - second > 1e-4) | (first == 0)  # a dead window passes nothing on
        if settings.get("relu", True):
            clear &= (first == 0) | (first > 1e-4)
    draw = torch.Generator().manual_seed(seed)
    grad = torch.randn(clear.shape, generator=draw).where(clear, 0)
    return grad.contiguous(memory_format=LAST)


def results(given: dict[str, Any], grad: Tensor | None = None, **settings: Any) -> dict[str, Tensor]:
    """The result, the running statistics after the call, and with ``grad`` the gradients, by name."""
    tensors = {**given, **{n: copy.deepcopy(given[n]) for n in ("mean", "variance")}}
    out = ops.conv_norm(**tensors, **settings)
    found = {"out": out.detach(), **{n: tensors[n] for n in ("mean", "variance") if tensors[n] is not None}}
    leaves = {name: given[name] for name in LEAVES if given[name] is not None and given[name].requires_grad}
    if grad is not None:
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5, what: str = "") -> None:
    """Compares with float64 results, relative to the largest value of each."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].shape == x.shape, f"{what} {name}"
        error = float((got[name].double() - x).abs().max())
        most = max(float(x.abs().max()), 1e-3)
        assert error <= tolerance * most, f"{what} {name}: off by {error:.2g}, the largest value is {most:.2g}"


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
    """The same bits."""
    for name in expected if names is None else names:
        assert torch.equal(got[name], expected[name]), name
