"""Tests of conv_pool: results and gradients against the reference in float64.

They also cover autograd, modes and refusals.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import ops
from fedkern.ops._conv.conv_norm import choose_pool_kernels
from python_tests.ops import differential
from python_tests.ops._conv import conv_cases
from python_tests.ops.operator_cases import using
from python_tests.ops.operator_runs import Named

POOL_LEAVES = ("x", "weight", "bias")
# One of each kernel: direct, of a few taps and of many; Winograd's; a bordered one.
FEW = ((3, 0, 3, 20, 9, 12), (3, 1, 16, 32, 9, 8), (5, 0, 6, 16, 14, 14), (5, 2, 16, 20, 9, 8))


def pool(given: dict[str, Any], grad: Tensor | None = None, **settings: Any) -> dict[str, Tensor]:
    return conv_cases.results(given, grad, call=ops.conv_pool, **settings)


# --- values and gradients


@pytest.mark.sampled(8)
@conv_cases.each_kernel
@pytest.mark.parametrize("layer", conv_cases.POOLED, ids=str)
def test_random_calls_agree_with_the_reference(name: str, layer: tuple[Any, ...]) -> None:
    with using(name):
        differential.agree("conv_pool", 20, cases=differential.pool_case(layer))


@pytest.mark.sampled(8)
@conv_cases.needs_core
@pytest.mark.parametrize("shape", conv_cases.POOLED, ids=str)
def test_these_shapes_are_served(shape: tuple[int, ...]) -> None:
    for batch, bias, last, weight_last in itertools.product((1, 5), *[(False, True)] * 3):
        assert (
            choose_pool_kernels(
                **conv_cases.pool_arguments(shape, batch, bias=bias, last=last, weight_last=weight_last)
            )
            is not None
        )


@conv_cases.each_kernel
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_only_the_gradients_that_are_asked_for(name: str, shape: tuple[int, ...], calls: conv_cases.Served) -> None:
    given = conv_cases.pool_arguments(shape, last=True)
    conv_cases.check_chosen_gradients(calls, name, given, conv_cases.pool_grad_for(given), 3, call=ops.conv_pool)


@conv_cases.each_kernel
@pytest.mark.parametrize("shape", [*FEW, (3, 1, 3, 32, 16, 17), (5, 2, 32, 64, 7, 6)], ids=str)
def test_bits_do_not_depend_on_threads(name: str, shape: tuple[int, ...]) -> None:
    given = conv_cases.pool_arguments(shape, 37)
    conv_cases.check_threads(name, (1, 2, 3), given, conv_cases.pool_grad_for(given), call=ops.conv_pool)


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=conv_cases.LAST),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 3), 7.0)[:, :, 1::2, 2:-1].copy_(x),
    "negated": lambda x: torch._neg_view(-x),
    "turned round": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@conv_cases.each_kernel
@pytest.mark.parametrize("shape", [*FEW, (3, 1, 16, 1, 9, 8), (3, 0, 3, 16, 4, 4)], ids=str)
def test_bits_do_not_depend_on_layouts(name: str, shape: tuple[int, ...]) -> None:
    """Layouts of the gradient, x and the weight vary.

    A kernel reads both layouts, and gradients of any strides.
    """
    for batch in (1, 3):
        given = conv_cases.pool_arguments(shape, batch)
        grad = conv_cases.pool_grad_for(given)
        with using(name):
            expected = pool(given, grad)
            for lay_out in LAID.values():
                conv_cases.assert_same(pool(given, lay_out(grad)), expected)
            for last, weight_last in itertools.product((False, True), repeat=2):
                laid = conv_cases.pool_arguments(shape, batch, last=last, weight_last=weight_last)
                for gradient in (grad, LAID["channels-last"](grad)):
                    found = pool(laid, gradient)
                    conv_cases.assert_same(found, expected)
                    assert all(found[f"gradient of {name}"].stride() == laid[name].stride() for name in POOL_LEAVES)
            expanded = pool(given, grad.flatten()[:1].view(1, 1, 1, 1).expand_as(grad))
            conv_cases.assert_same(expanded, pool(given, grad.flatten()[0] * torch.ones_like(grad)))


@conv_cases.each_kernel
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [*FEW, (3, 1, 1, 8, 2, 3), (5, 2, 1, 32, 13, 14)], ids=str)
def test_ties_go_to_the_first(name: str, shape: tuple[int, ...], relu: bool) -> None:
    """Whole numbers do not round, and many windows have several maxima, some of them 0."""
    for last in (False, True):
        given = conv_cases.pool_arguments(shape, 5, last=last)
        with torch.no_grad():
            for leaf in POOL_LEAVES:
                given[leaf].mul_(2 if leaf != "weight" else 2 * given["weight"][0].numel() ** 0.5).round_().clamp_(
                    -2, 2
                )
            given["weight"][::3] = 0
        grad = (4 * conv_cases.pool_grad_for(given, False)).round() + 1
        got, expected = conv_cases.serve_both(name, given, conv_cases.exact(given), grad, relu=relu, call=ops.conv_pool)
        conv_cases.assert_same({key: x.double() for key, x in got.items()}, expected)


@conv_cases.each_kernel
def test_no_worse_than_eager(name: str) -> None:
    for shape, mean in itertools.product(
        ((3, 1, 32, 64, 16, 16), (5, 2, 32, 64, 14, 14), (5, 0, 6, 16, 14, 14)), (0, 9)
    ):
        given = conv_cases.pool_arguments(shape, 8)
        with torch.no_grad():
            given["x"] += mean
        conv_cases.check_no_worse_than_eager(name, given, conv_cases.pool_grad_for(given), shape, call=ops.conv_pool)


# --- infinities and NaN


@conv_cases.each_kernel
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_what_is_not_finite_spreads_as_in_torch(name: str, shape: tuple[int, ...], relu: bool) -> None:
    places = {"x": (1, 2, 4, 3), "weight": (1, 2, 0, 0), "bias": (3,), "grad": (1, 4, 1, 1), "zero": (1, 2, 4, 3)}
    for (where, place), value in itertools.product(places.items(), (math.inf, -math.inf, math.nan)):
        given = conv_cases.pool_arguments(shape, 3, last=math.isnan(value))
        grad = conv_cases.pool_grad_for(given, relu)
        with torch.no_grad():
            if where == "zero":  # 0 times an infinity is NaN
                grad.zero_()
            {**given, "grad": grad}["x" if where == "zero" else where][place] = value
        got, evaluated, expected = conv_cases.check_spreading(
            name, given, grad, f"{where} {value}", ops.conv_pool, relu=relu
        )
        assert torch.equal(got["out"].nan_to_num(9), evaluated["out"].nan_to_num(9))
        assert where != "zero" or expected["gradient of weight"].isnan().any()


@conv_cases.each_kernel
def test_infinities_of_both_signs_that_meet_in_the_biass_gradient(name: str) -> None:
    given = conv_cases.pool_arguments()
    grad = conv_cases.pool_grad_for(given, False)
    grad[0, 2, 0, :2] = torch.tensor([math.inf, -math.inf])
    with using(name):
        got = pool(given, grad, relu=False)
    assert got["gradient of bias"][2].isnan()
    assert int((~got["gradient of bias"].isfinite()).sum()) == 1
    assert int((~got["gradient of weight"].isfinite()).flatten(1).any(1).sum()) == 1


@conv_cases.each_kernel
@pytest.mark.parametrize("relu", [True, False])
def test_a_window_with_nan_is_nan(name: str, relu: bool, calls: conv_cases.Served) -> None:
    """The kernel meets NaN in the bias.

    The gradient goes to the last NaN, as in torch.
    """
    given = conv_cases.pool_arguments()
    with torch.no_grad():
        given["bias"][3] = math.nan
    grad = conv_cases.pool_grad_for(given, relu)
    grad[:, 3] = 1
    got, expected = conv_cases.serve_both(name, given, given, grad, relu=relu, call=ops.conv_pool)
    assert calls == ["forward", "backward"]
    assert got["out"][:, 3].isnan().all()
    conv_cases.assert_near(
        {n: x.nan_to_num(9) for n, x in got.items()}, {n: x.nan_to_num(9).double() for n, x in expected.items()}
    )


@conv_cases.each_kernel
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_finite_values_that_overflow(name: str, shape: tuple[int, ...]) -> None:
    """Winograd's tiles go back to torch, and a window's first infinity has the gradient."""
    given = conv_cases.pool_arguments(shape, 3)
    middle = shape[0] // 2
    with torch.no_grad():
        given["x"].copy_(given["x"].sign() * 1e38)
        given["weight"].zero_()
        given["weight"][:, 0, middle, middle] = torch.linspace(-1, 10, shape[3])
    grad = torch.ones_like(ops.conv_pool(**given))
    got, expected = conv_cases.serve_both(name, given, given, grad, call=ops.conv_pool)
    assert expected["out"].isinf().any()
    assert expected["out"].isfinite().any()
    for key in ("out", "gradient of x", "gradient of bias"):
        torch.testing.assert_close(got[key], expected[key])


# --- where the kernel serves


@conv_cases.needs_core
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("out", [1, 8])
def test_strides_are_torchs(channels: int, out: int, calls: conv_cases.Served) -> None:
    """The result is channels-last where x or the weight is.

    With one channel the strides alone show it.
    """

    def lay_out(x: Tensor, last: bool) -> Tensor:
        return x.detach().movedim(1, -1).contiguous().movedim(-1, 1) if last else x.detach()

    for batch, last, weight_last in itertools.product((1, 2, 20), (False, True), (False, True)):
        given = conv_cases.pool_arguments((3, 1, channels, out, 8, 9), batch)
        given |= {"x": lay_out(given["x"], last), "weight": lay_out(given["weight"], weight_last)}
        calls.clear()
        got = ops.conv_pool(**given)
        assert calls
        with ops.use_backend("reference"):
            assert got.stride() == ops.conv_pool(**given).stride(), (batch, last, weight_last)


@conv_cases.needs_portable
def test_where_it_serves_and_that_asking_never_raises() -> None:
    given = conv_cases.pool_arguments()
    assert choose_pool_kernels(**given) is not None
    assert choose_pool_kernels(**{**given, "bias": None}) is not None
    for label, enter in conv_cases.SURROUNDINGS.items():
        with enter():
            assert choose_pool_kernels(**given) is None, label
    with ops.use_isa("portable"):
        assert choose_pool_kernels(**given) is None
    assert choose_pool_kernels(**given) is not None
    changed: dict[str, dict[str, Any]] = {
        "float64": conv_cases.exact(given),
        "bfloat16": conv_cases.pool_arguments(dtype=torch.bfloat16),
        "meta": {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in given.items()},
        "no samples": conv_cases.pool_arguments(batch=0),
        "no channels": {**given, "x": torch.randn(4, 0, 8, 8), "weight": torch.randn(8, 0, 3, 3)},
        "no results": {**given, "weight": torch.randn(0, 3, 3, 3), "bias": None},
        "a subclass": {**given, "x": given["x"].detach().as_subclass(Named)},
        "other strides": {**given, "x": given["x"].mT},
        "a negative view": {**given, "x": torch._neg_view(given["x"].detach())},
        "many channels": {**given, "x": torch.randn(4, 264, 8, 8), "weight": torch.randn(8, 264, 3, 3)},
        "many results at few windows": conv_cases.pool_arguments((3, 1, 64, 64, 2, 2)),
        "large maps": conv_cases.pool_arguments((3, 1, 1, 64, 64, 64), 1),
        "no window": conv_cases.pool_arguments((3, 0, 3, 8, 3, 8)),
        "a map below the kernel": conv_cases.pool_arguments((5, 0, 3, 8, 3, 3)),
        "other channels": {**given, "weight": torch.randn(8, 4, 3, 3)},
        "one tap": {**given, "weight": torch.randn(8, 3, 1, 1), "padding": 0},
        "a long kernel": {**given, "weight": torch.randn(8, 3, 3, 5)},
        "another padding": {**given, "padding": 2},
        "negative padding": {**given, "padding": -1},
        "a flag as padding": {**given, "padding": True},
        "padding beyond 64 bits": {**given, "padding": 10**30},
        "and below": {**given, "padding": -(10**30)},
        "padding in words": {**given, "padding": "same"},
        "two paddings": {**given, "padding": (1, 1)},
        "another bias": {**given, "bias": torch.randn(7)},
        "a bias of float64": {**given, "bias": torch.randn(8).double()},
        "a weight of float64": {**given, "weight": given["weight"].double()},
        "three axes": {**given, "x": given["x"][0]},
        "text": {**given, "x": "x"},
        "all text": {"x": "x", "weight": "weight", "bias": "bias", "padding": "padding"},
        "nothing": dict.fromkeys(given),
    }
    for label, call in changed.items():
        assert choose_pool_kernels(**call) is None, label


@conv_cases.needs_core
def test_asking_under_compilers_and_transforms() -> None:
    conv_cases.check_never_served(choose_pool_kernels, conv_cases.pool_arguments())


@conv_cases.needs_portable
def test_a_forced_kernel_that_does_not_fit_is_an_error() -> None:
    given, error = conv_cases.pool_arguments(), r"'cpu' was forced, but it has no kernel for conv_pool "
    with ops.use_backend("cpu"):
        ops.conv_pool(**given)
        for call in (
            conv_cases.pool_arguments(batch=0),
            conv_cases.pool_arguments((3, 1, 64, 64, 2, 2)),
            {**given, "x": given["x"].mT},
        ):
            with pytest.raises(RuntimeError, match=error + "of these sizes and strides, or at this ISA level"):
                ops.conv_pool(**call)
        with ops.use_isa("portable"), pytest.raises(RuntimeError, match=error + ".* or at this ISA level; allow"):
            ops.conv_pool(**given)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=error + "under autocast"):
            ops.conv_pool(**given)
        with pytest.raises(RuntimeError, match="'cpu' was forced, but it cannot serve conv_pool for dtype"):
            ops.conv_pool(**conv_cases.exact(given))
        with pytest.raises(RuntimeError, match=r"'cpu' was forced, but conv_pool runs .* reference under torch\.func"):
            torch.func.vmap(lambda x: ops.conv_pool(**{**given, "x": x}))(given["x"][None].detach())
    for name in ("triton", "cuda"):
        with ops.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was forced, but it does not impl"):
            ops.conv_pool(**given)


@conv_cases.needs_portable
def test_the_portable_level_has_no_kernel(calls: conv_cases.Served) -> None:
    with ops.use_isa("portable"):
        ops.conv_pool(**conv_cases.pool_arguments()).sum().backward()
    assert not calls


# --- autograd


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(relu: bool, bias: bool) -> None:
    given = conv_cases.pool_arguments(batch=2, bias=bias)
    conv_cases.check_second_derivatives(given, conv_cases.pool_grad_for(given, relu), ops.conv_pool, relu=relu)


def test_the_result_may_change() -> None:
    given = conv_cases.pool_arguments()
    grad = conv_cases.pool_grad_for(given)
    expected = torch.autograd.grad(ops.conv_pool(**given), [*conv_cases.leaves_of(given).values()], grad)
    out = ops.conv_pool(**given)
    out.detach().mul_(2)
    for x, y in zip(torch.autograd.grad(out, [*conv_cases.leaves_of(given).values()], grad), expected, strict=True):
        assert torch.equal(x, y)


# --- what the reference serves


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, calls: conv_cases.Served) -> None:
    given = conv_cases.pool_arguments(dtype=dtype)
    expected = F.max_pool2d(F.conv2d(given["x"], given["weight"], given["bias"], padding=1).relu(), 2)
    got = ops.conv_pool(**given)
    assert got.dtype is dtype
    assert torch.equal(got, expected)
    got.sum().backward()
    assert given["weight"].grad.dtype is dtype
    assert not calls


def test_autocast_runs_the_convolution_in_16_bits(calls: conv_cases.Served) -> None:
    given = conv_cases.pool_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.conv_pool(**given)
        assert ops.conv_pool(**{**given, "x": given["x"].bfloat16()}).dtype is torch.bfloat16
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert given["weight"].grad.dtype is torch.float32
    assert not calls


# --- what is refused

GIVEN = conv_cases.pool_arguments()
FIVE = {"weight": torch.randn(8, 3, 5, 5), "padding": 2}
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(3, 8, 8)}, ValueError, r"x must have shape \[B, in, H, W\], where only B.*has \[3, 8, 8\]"),
    ({"x": torch.randn(4, 3, 0, 8)}, ValueError, r"x must have shape .* where only B may be 0, but has \[4, 3, 0, 8\]"),
    ({"x": torch.randn(4, 0, 8, 8), "weight": torch.randn(8, 0, 3, 3)}, ValueError, "where only B may be 0"),
    ({"x": torch.randn(4, 2, 8, 8)}, ValueError, r"weight must have shape \[out, 2, 3, 3\] or \[out, 2, 5, 5\], but h"),
    ({"weight": torch.randn(8, 3, 1, 1)}, ValueError, r"weight must have shape .* but has \[8, 3, 1, 1\]"),
    ({"weight": torch.randn(8, 3, 3, 5)}, ValueError, r"weight must have shape .* but has \[8, 3, 3, 5\]"),
    ({"weight": torch.randn(8, 3, 3)}, ValueError, r"weight must have shape .* but has \[8, 3, 3\]"),
    ({"weight": torch.randn(0, 3, 3, 3), "bias": None}, ValueError, r"weight must have shape .* has \[0, 3, 3, 3\]"),
    ({"weight": GIVEN["weight"].double()}, TypeError, "weight must have dtype torch.float32 like x, but has torch.fl"),
    ({"weight": GIVEN["weight"].to("meta")}, ValueError, "weight must be on cpu like x, but is on meta"),
    ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \[8\], but has \[3\]"),
    ({"bias": torch.ones(8, 1)}, ValueError, r"bias must have shape \[8\], but has \[8, 1\]"),
    ({"bias": torch.ones(8).double()}, TypeError, "bias must have dtype torch.float32 like x, but has torch.float64"),
    ({"bias": torch.ones(8, device="meta")}, ValueError, "bias must be on cpu like x, but is on meta"),
    ({"padding": 2}, ValueError, "padding must be between 0 and 1, not 2"),
    ({"padding": 10**30}, ValueError, "padding must be between 0 and 1, not an integer of 100 bits"),
    ({**FIVE, "padding": 1}, ValueError, "padding must be 0 or 2, half of the kernel's side, but is 1"),
    ({"relu": torch.ones(2)}, TypeError, "relu must be True or False, not Tensor"),
]
SMALL = [(3, 0, 3, 4), (3, 1, 1, 2), (5, 0, 5, 6), (5, 2, 1, 2)]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.conv_pool(**{**GIVEN, **wrong})


@pytest.mark.parametrize(("side", "padding", "size", "smallest"), SMALL)
def test_maps_too_small(side: int, padding: int, size: int, smallest: int) -> None:
    for sizes in ((size, 9), (9, size)):
        with pytest.raises(ValueError, match=f"x must have at least {smallest} rows and columns to be pooled, but has"):
            ops.conv_pool(**conv_cases.pool_arguments((side, padding, 3, 8, *sizes)))
    assert ops.conv_pool(**conv_cases.pool_arguments((side, padding, 3, 8, smallest, smallest))).shape == (4, 8, 1, 1)
