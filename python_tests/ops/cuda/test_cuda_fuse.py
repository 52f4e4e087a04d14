"""Tests of fuse_concat and fuse_mean on CUDA against the float64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._fuse.reference import fuse_concat_reference, fuse_mean_reference
from python_tests.ops.operator_cases import DTYPES, assert_close, describe, lay_out_map, pairwise

AXES: dict[str, Any] = {
    "operator": ("concat", "mean"),
    "count": (1, 2, 5, 50),
    "channels": (1, 3, 8, 16),
    "uneven": (False, True),
    "batch": (0, 1, 3),
    "positions": ((), (1, 1), (5, 7), (4, 8), (12,), (2, 0)),
    "dtype": DTYPES,
    "layout": ("contiguous", "channels_last", "crop", "offset", "transposed"),
    "vectors": ("both", "scale", "shift", "none", "double", "like"),
    "relu": (False, True),
    "needs": ("all", "maps", "vectors"),
    "grad": ("like", "expanded", "other"),
}
CASES = pairwise(AXES, seed=8)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{describe(CASES[n])}")
def test_against_float64(device: torch.device, number: int) -> None:
    case = CASES[number]
    generator = torch.Generator().manual_seed(number)
    dtype, count, mean = case["dtype"], case["count"], case["operator"] == "mean"
    uneven = case["uneven"] and not mean
    channels = [case["channels"] * (1 + m % 2 if uneven else 1) for m in range(count)]
    maps = [torch.randn(case["batch"], c, *case["positions"], generator=generator).to(dtype) for c in channels]
    leaves = [lay_out_map(x.to(device), case["layout"]).requires_grad_(case["needs"] != "vectors") for x in maps]
    vectors: list[Tensor | None] = [None, None]
    for i, kinds in enumerate((("both", "scale", "double", "like"), ("both", "shift", "double", "like"))):
        if case["vectors"] in kinds:
            values = torch.randn(sum(channels), generator=generator)
            values = values.to({"double": torch.float64, "like": dtype}.get(case["vectors"], torch.float32)).to(device)
            vectors[i] = values.requires_grad_(case["needs"] != "maps")
    inputs = [*leaves, *vectors]
    exact = [None if x is None else x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    activation = "relu" if case["relu"] else None
    if mean and count > 48:
        with pytest.raises(RuntimeError, match="no kernel for fuse_mean of 50 maps"):
            ops.fuse_mean(leaves, *vectors, activation)
        return
    out = (ops.fuse_mean if mean else ops.fuse_concat)(leaves, *vectors, activation)
    reference = fuse_mean_reference if mean else fuse_concat_reference
    expected = reference(exact[:count], *exact[count:], case["relu"])
    # What rounds to another side of ReLU's corner has another gradient; nothing is that close to it here.
    assert out.dtype == dtype
    assert_close("result", out.cpu(), expected, absolute=1e-6 * 4)
    if not expected.requires_grad:
        return
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    if case["grad"] == "expanded":
        grad = torch.full((), 3.0).to(dtype).expand(expected.shape)
    given = grad.to(device)
    if case["grad"] == "other" and grad.dim() > 2:
        given = lay_out_map(given, "contiguous" if case["layout"] == "channels_last" else "channels_last")
    out.backward(given)
    expected.backward(grad.double())
    terms = max(1, expected.numel() // max(1, expected.shape[1]))
    for i, (ours, theirs) in enumerate(zip(inputs, exact, strict=True)):
        if ours is None or theirs is None or not ours.requires_grad:
            continue
        assert theirs.grad is not None
        # Terms are computed in fp32 whatever the vectors' dtype.
        found = ours.grad.cpu()
        if i >= count and ours.dtype is torch.float64 and dtype is not torch.float64:
            found = found.float()
        assert_close(f"gradient {i}", found, theirs.grad, absolute=4e-6 * (terms if i >= count else 1))


def test_channels_last_stays(device: torch.device) -> None:
    maps = [torch.randn(2, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    leaves = [x.requires_grad_() for x in maps]
    out = ops.fuse_concat(leaves, activation="relu")
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert all(x.grad.is_contiguous(memory_format=torch.channels_last) for x in leaves if x.grad is not None)


def test_nan_passes_relu(device: torch.device) -> None:
    x = torch.tensor([[[torch.nan, -1.0, 0.0, 2.0]]], device=device, requires_grad=True)
    out = ops.fuse_concat([x], activation="relu")
    out.sum().backward()
    assert out.isnan().flatten().tolist() == [True, False, False, False]
    assert x.grad.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_map_without_channels_alone_wants_a_gradient(device: torch.device) -> None:
    empty = torch.empty(2, 0, 4, 4, device=device, requires_grad=True)
    ops.fuse_concat([empty, torch.randn(2, 8, 4, 4, device=device)]).sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 32])
def test_a_mean_is_the_sum_divided_by_the_count(device: torch.device, dtype: torch.dtype, count: int) -> None:
    """Equality is bit for bit, also where a product computes it, and among the smallest numbers."""
    generator = torch.Generator().manual_seed(count)
    maps = [torch.randn(2, 8, 4, 4, generator=generator).to(dtype) for _ in range(count)]
    for x in maps:
        x[0] *= 3 * torch.finfo(dtype).smallest_normal
    for layout in ("contiguous", "channels_last", "crop"):
        found = ops.fuse_mean([lay_out_map(x.to(device), layout) for x in maps]).cpu()
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        total = torch.zeros(2, 8, 4, 4, dtype=wide)
        for x in maps:
            total += x.to(wide)
        assert torch.equal(found, (total / count).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop", "offset"])
def test_channels_gradients_keep_their_digits(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    """A few products of 16-bit maps are added in fp32, where they are exact.

    The remaining products count too.
    """
    generator = torch.Generator().manual_seed(0)
    for positions in ((3, 5), (16, 16), (40, 33)):
        x, grad = (torch.randn(5, 8, *positions, generator=generator).to(dtype) for _ in range(2))
        vectors = [torch.ones(8, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
        out = ops.fuse_concat([lay_out_map(x.to(device), layout)], *vectors)
        out.backward(lay_out_map(grad.to(device), layout))
        terms = grad.double() * x.double(), grad.double()
        for vector, products in zip(vectors, terms, strict=True):
            error = (vector.grad.cpu() - products.sum((0, 2, 3))).abs()
            assert (error <= 2**-21 * products.abs().sum((0, 2, 3))).all()
