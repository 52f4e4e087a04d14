"""Tests of blend, boxes, contrastive, fuse and steps of optimisers on CUDA against references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops import blend, erase_boxes
from fedkern.ops._core import backend
from python_tests.ops import differential
from python_tests.ops._contrast.contrast_cases import choose, embeddings
from python_tests.ops.operator_cases import DTYPES, lay_out_map


def test_index_out_of_range_stops_the_kernel(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a device assertion ends the process's use of the GPU")
    x = torch.randn(3, 8, device=device)
    for wrong in (3, -1):
        with pytest.raises(RuntimeError, match="blend: index out of range"):
            blend(x, x, 0.5, index=torch.tensor([0, wrong, 1]))


@pytest.mark.gpu
def test_box_with_nan_is_empty(gpu: torch.device) -> None:
    images = torch.ones(1, 1, 4, 4, device=gpu)
    for side in range(4):
        box = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]], device=gpu)
        box[0, 0, side] = torch.nan
        assert torch.equal(erase_boxes(images, box), images)


# -- cuda contrast -----------------------------------------------------------------------------------------------------


def test_contrastive_in_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("tiles", monkeypatch)
    differential.agree("contrastive", 60, device)


def test_empty_and_single_batches(device: torch.device) -> None:
    for pairs in (0, 1):
        x = torch.ones(pairs, 4, device=device, requires_grad=True)
        loss = ops.contrastive(x, x.detach())
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()


def test_similarities_of_minus_infinity_count_nothing(device: torch.device) -> None:
    x = torch.tensor([[1e20, 0.0], [0.0, 1.0]], device=device)
    y = torch.tensor([[1e-20, 0.0], [-1e30, 1.0]], device=device)
    got = ops.contrastive(x, y, 0.5)
    with ops.use_backend("reference"):
        torch.testing.assert_close(got, ops.contrastive(x, y, 0.5))


def test_a_temperature_that_is_not_above_zero_is_not_looked_at(device: torch.device) -> None:
    """A GPU would have to wait for the check.

    On the CPU such a temperature is an error.
    """
    x, y = (t.float().to(device) for t in embeddings(5, 3))
    below = torch.tensor(0.0, device=device)
    if device.type == "cuda":
        assert not ops.contrastive(x, y, below).isfinite()
    else:
        with pytest.raises(ValueError, match="temperature must be greater than 0"):
            ops.contrastive(x, y, below)


# -- cuda fuse ---------------------------------------------------------------------------------------------------------


def test_too_many_maps(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="no kernel for fuse_mean of 50 maps"):
        ops.fuse_mean([torch.ones(1, 2, device=device)] * 50)


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


# -- cuda optimise -----------------------------------------------------------------------------------------------------


def step(shape: tuple[int, ...], device: torch.device, adamw: bool, terms: bool) -> list[Tensor]:
    """Return the tensors that a step writes to, and its results."""
    draw = torch.Generator().manual_seed(0)
    theta, g, moment, second, anchor, total = (torch.randn(shape, generator=draw).to(device) for _ in range(6))
    settings: dict[str, Any] = {"lr": 0.1}
    if terms:
        rates = [0.1, 0.2, 0.3] if len(shape) == 2 else 1
        shared = anchor[0] if len(shape) == 2 else anchor
        settings = {"lr": rates, "anchor": shared, "proximal": 0.3, "correction": anchor, "gradient_sum": total}
        settings |= {"weight_decay": 0.01, "max_norm": 2.0, "zero": True}
    if adamw:
        found = ops.adamw_step(theta, g, moment, second.abs_(), 3, **settings)
    else:
        found = ops.sgd_step(theta, g, moment if terms else None, momentum=0.9 if terms else 0.0, **settings)
    return [theta, g, moment, second, total, *found]


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1024,), (1030,), (3, 1000), (3, 1030)], ids=str)
def test_both_ways_to_the_kernel(device, monkeypatch, shape, adamw, terms):
    found = [step(shape, device, adamw, terms)]  # the general way, which opens the short one
    check, launchers = backend._ordinary["optimise"]
    answers: list[int] = []
    monkeypatch.setitem(
        backend._ordinary, "optimise", (lambda *given: answers.append(check(*given)) or answers[-1], launchers)
    )
    found.append(step(shape, device, adamw, terms))
    assert len(answers) == 1
    assert launchers[answers[0]] is not None
    with ops.use_backend("reference"):
        expected = step(shape, device, adamw, terms)
    for results in found:
        torch.testing.assert_close(results, expected)
    assert all(left.equal(right) for left, right in zip(*found, strict=True))


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("size", [1000, 1030])
def test_rows_of_one_block_tell_what_is_not_finite(device: torch.device, size: int, max_norm: float | None) -> None:
    """A single block writes a row's results itself.

    Several blocks leave them to another kernel.
    """
    theta, g = torch.zeros(3, size, device=device), torch.full((3, size), 2.0, device=device)
    g[1, -1], theta[2, 0] = torch.inf, torch.nan
    found = ops.sgd_step(theta, g, lr=0.5, max_norm=max_norm)
    assert found.finite.tolist() == [True, False, False]
    assert found.squared_norm.tolist() == [4.0 * size, torch.inf, 4.0 * size]
    torch.testing.assert_close(theta[0], torch.full_like(theta[0], -1.0 if max_norm is None else -0.5 / size**0.5))


def test_rates_in_a_tensor(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    theta, g = (torch.randn(3, 40, generator=draw).to(device) for _ in range(2))
    expected = theta - torch.tensor([[0.1], [0.2], [0.3]], device=device) * g
    ops.sgd_step(theta, g, lr=torch.tensor([0.1, 0.2, 0.3], device=device))
    torch.testing.assert_close(theta, expected)
