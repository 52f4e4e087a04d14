"""Tests of blend, boxes, contrastive, fuse and steps of optimisers on CUDA against references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops import blend, erase_boxes, keep_boxes
from fedkern.ops._blend.boxes import fill_boxes_reference
from fedkern.ops._core import backend
from fedkern.ops._fuse.reference import fuse_concat_reference, fuse_mean_reference
from python_tests.ops._blend.test_blend import check
from python_tests.ops._contrast.contrast_cases import AXES as CONTRAST_AXES
from python_tests.ops._contrast.contrast_cases import check as check_contrast
from python_tests.ops._contrast.contrast_cases import embeddings
from python_tests.ops.operator_cases import DTYPES, assert_close, describe, lay_out_map, move_to, pairwise

AXES: dict[str, Any] = {
    "rows": (0, 1, 5, 33),
    "size": (1, 7, 8, 129, 3202, 17000),
    "dtype": DTYPES,
    "index": ("identity", "permutation", "repeated", "one", "many"),
    "alpha": ("number", "zero", "one", "tensor", "double"),
    "layout": ("rows", "gaps", "offset", "channels_last"),
}
CASES = pairwise(AXES, seed=3)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return the same samples with other strides or at an odd address."""
    rows, size = x.shape
    if layout == "gaps":
        return x.new_zeros(rows, 2 * size + 3)[:, :size].copy_(x)
    if layout == "offset":
        return x.new_zeros(rows * size + 1)[1:].view(rows, size).copy_(x)
    if layout == "channels_last" and size % 8 == 0:
        return x.view(rows, 2, size // 8, 4).contiguous(memory_format=torch.channels_last)
    return x


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: describe(CASES[n]))
def test_blend(device: torch.device, number: int) -> None:
    case = CASES[number]
    shape, kinds = (case["rows"], case["size"]), (case["index"], case["alpha"])
    check("cuda", shape, case["dtype"], *kinds, number, lambda x: lay_out(x.to(device), case["layout"]))


def test_index_out_of_range_stops_the_kernel(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a device assertion ends the process's use of the GPU")
    x = torch.randn(3, 8, device=device)
    for wrong in (3, -1):
        with pytest.raises(RuntimeError, match="blend: index out of range"):
            blend(x, x, 0.5, index=torch.tensor([0, wrong, 1]))


BOX_AXES: dict[str, Any] = {
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool),
    "shape": ((2, 3, 5, 7), (1, 1, 1, 9), (3, 4, 16, 16), (2, 3, 17, 1), (0, 3, 4, 4), (2, 3, 32, 48), (1, 2, 0, 4)),
    "layout": ("contiguous", "channels_last", "crop", "transposed", "offset"),
    "boxes": (0, 1, 3, 70),
    "keep": (False, True),
    "fill": ("number", "channels"),
}
BOX_CASES = pairwise(BOX_AXES, seed=5)


@pytest.mark.parametrize("number", range(len(BOX_CASES)), ids=lambda n: describe(BOX_CASES[n]))
def test_boxes(device: torch.device, number: int) -> None:
    case = BOX_CASES[number]
    generator = torch.Generator().manual_seed(number)
    shape, dtype = case["shape"], case["dtype"]
    images = lay_out_map((torch.randn(shape, generator=generator) * 50).to(dtype), case["layout"])
    corners = torch.rand(shape[0], case["boxes"], 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    corners = corners * torch.tensor([shape[3], shape[2], shape[3], shape[2]])
    if case["boxes"]:
        corners[:, :, 2:] = corners[:, :, :2] + corners[:, :, 2:] / case["boxes"]
        corners[:, 0] = corners[:, 0].round() + 0.5  # edges on pixels' centres
    fill: Any = 1 if case["fill"] == "number" else [int(c % 2) for c in range(shape[1])]
    out = (keep_boxes if case["keep"] else erase_boxes)(move_to(images, device), corners.to(device), fill)
    values = torch.tensor([fill] if isinstance(fill, int) else fill).expand(shape[1])[None].to(dtype)
    assert torch.equal(out.cpu(), fill_boxes_reference(images, corners, values, case["keep"]))
    if case["layout"] == "channels_last" and images.numel():
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_box_with_nan_is_empty(gpu: torch.device) -> None:
    images = torch.ones(1, 1, 4, 4, device=gpu)
    for side in range(4):
        box = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]], device=gpu)
        box[0, 0, side] = torch.nan
        assert torch.equal(erase_boxes(images, box), images)


# -- cuda contrast -----------------------------------------------------------------------------------------------------


CONTRAST_CASES = [case for case in pairwise(CONTRAST_AXES) if case["way"] != "onednn"]


@pytest.mark.parametrize("case", CONTRAST_CASES, ids=describe)
def test_loss_and_gradients(device: torch.device, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_contrast(case, device, monkeypatch)


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


FUSE_AXES: dict[str, Any] = {
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
FUSE_CASES = pairwise(FUSE_AXES, seed=8)


@pytest.mark.parametrize("number", range(len(FUSE_CASES)), ids=lambda n: f"{n}-{describe(FUSE_CASES[n])}")
def test_fuse_against_float64(device: torch.device, number: int) -> None:
    case = FUSE_CASES[number]
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
