"""Tests of conv_norm under autograd, transforms, compilers and modes.

They also cover refusals, and the calls that its kernel serves.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core import backend
from python_tests.ops._conv import conv_cases
from python_tests.ops.operator_cases import using
from python_tests.ops.operator_runs import Named

# How a call ends, with what its gradient must know.
ENDS: list[dict[str, Any]] = [
    {"pool": 2},
    {"pool": 2, "training": False},
    {"residual": True},
    {"residual": True, "training": False},
    {"residual": True, "relu": False},
    {"relu": False, "pool": 2},
    {"relu": False, "side": 1, "stride": 2},
    {"groups": 4, "residual": True},
    {"groups": 2, "pool": 2, "training": False},
    {"groups": 16, "relu": False, "side": 1, "stride": 2},
]


NORMS = pytest.mark.parametrize("norm", [{"training": True}, {"training": False}, {"groups": 2}], ids=str)


def split(end: dict[str, Any], **shape: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    shape |= {name: end[name] for name in ("residual", "side", "stride") if name in end}
    return conv_cases.arguments(**shape, grouped="groups" in end), {
        name: value for name, value in end.items() if name not in ("residual", "side")
    }


# --- where the kernel serves


@conv_cases.needs_core
@pytest.mark.parametrize(("residual", "side"), [(False, 3), (True, 3), (False, 1)])
def test_the_result_is_channels_last_where_x_or_the_weight_is(
    calls: conv_cases.Served, residual: bool, side: int
) -> None:
    """Torch's result is the same.

    The kernel rearranges maps only where the weight alone is channels-last, and leaves other cases to the reference.

    A weight of one tap may be both, and goes to the reference.
    """
    for last in itertools.product((True, False), repeat=3 if residual else 2):
        given = conv_cases.arguments(residual=residual, side=side)
        for name, is_last in zip(("x", "weight", "residual"), last, strict=False):
            if not is_last:
                given[name] = given[name].detach().contiguous().requires_grad_()
        grad = conv_cases.grad_for(given)
        calls.clear()
        out = ops.conv_norm(**{**given, "update": False})
        got = torch.autograd.grad(out, [*conv_cases.leaves_of(given).values()], grad)
        assert bool(calls) == (last[0] or (last[1] and side == 3))
        with ops.use_backend("reference"):
            expected = ops.conv_norm(**{**given, "update": False})
        assert out.stride() == expected.stride()
        assert got[1].stride() == given["weight"].stride() or not calls
        assert (conv_cases.serving(**given) is not None) == bool(calls)
        with ops.use_backend("cpu"):
            if calls:
                ops.conv_norm(**{**given, "update": False})
            else:
                with pytest.raises(RuntimeError, match="'cpu' was forced, but it has no kernel for conv_norm of these"):
                    ops.conv_norm(**{**given, "update": False})


def test_gradients_of_any_strides() -> None:
    given = conv_cases.arguments(residual=True)
    grad = conv_cases.grad_for(given)
    with ops.use_backend("reference"):
        expected = conv_cases.results(conv_cases.exact(given), grad)
    for lay_out in (
        lambda x: x.mT.contiguous().mT,
        lambda x: x.new_full((*x.shape[:2], 17, 11), 7.0)[:, :, 1::2, 2:10].copy_(x),
        lambda x: torch._neg_view(-x),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        conv_cases.assert_near(conv_cases.results(given, lay_out(grad)), expected)


@conv_cases.needs_core
def test_fits_is_where_the_kernel_serves_and_never_raises() -> None:
    given, grouped = conv_cases.arguments(), conv_cases.arguments(grouped=True)
    assert conv_cases.serving(**given) is not None
    assert conv_cases.serving(**{**given, "mean": None, "variance": None}) is not None
    assert conv_cases.serving(**grouped, groups=4) is not None
    for label, enter in conv_cases.SURROUNDINGS.items():
        with enter():
            assert conv_cases.serving(**given) is None, label
    assert conv_cases.serving(**given) is not None
    changed: dict[str, dict[str, Any]] = {
        "float64": conv_cases.exact(given),
        "bfloat16": conv_cases.arguments(dtype=torch.bfloat16),
        "meta": {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in given.items()},
        "empty": conv_cases.arguments(0),
        "a subclass": {**given, "x": given["x"].detach().as_subclass(Named)},
        "no affine norm": {**given, "scale": None, "shift": None},
        "one statistic": {**given, "variance": None},
        "a gradient of a statistic": {**given, "mean": given["mean"].requires_grad_()},
        "another stride": {**given, "stride": 3},
        "another pooling": {**given, "pool": 3},
        "pooled residual": {**conv_cases.arguments(residual=True), "pool": 2},
        "one position": conv_cases.arguments(1, 16, 16, 1, 1),
        "no window": {**conv_cases.arguments(4, 16, 16, 1, 8), "pool": 2},
        "other channels": {**given, "weight": torch.randn(16, 4, 3, 3)},
        "other taps": {**given, "weight": torch.randn(16, 8, 5, 5)},
        "three axes": {**given, "x": given["x"][0]},
        "groups and statistics": {**given, "groups": 4},
        "a bias alone": {**given, "bias": torch.ones(16)},
        "groups that do not divide": {**grouped, "groups": 3},
        "groups below 0": {**grouped, "groups": -1},
        "many groups": {**grouped, "groups": 10**30},
        "groups of another type": {**grouped, "groups": 4.0},
        "a short bias": {**grouped, "groups": 4, "bias": torch.ones(8)},
        "one tap of many weights": {**conv_cases.arguments(1, 256, 256, side=1, grouped=True), "groups": 4},
        "channels of zeros": {**conv_cases.arguments(out=12, grouped=True), "groups": 4},
        "text": {**given, "x": "x"},
        "beyond 64 bits": {**given, "stride": -(10**30), "pool": 10**30},
    }
    for label, call in changed.items():
        assert conv_cases.serving(**call) is None, label


@conv_cases.needs_core
def test_fits_under_compilers_and_transforms() -> None:
    conv_cases.check_never_served(conv_cases.serving, conv_cases.arguments())


@conv_cases.needs_core
def test_fits_does_not_raise_for_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given = conv_cases.arguments()
    monkeypatch.setenv("FEDKERN_BACKEND", "nope")
    backend._forget()
    try:
        assert conv_cases.serving(**given) is None
        with pytest.raises(ValueError, match="FEDKERN_BACKEND is 'nope'"):
            ops.conv_norm(**given)
    finally:
        backend._forget()


@conv_cases.needs_portable
def test_the_portable_level_has_no_kernel(calls: conv_cases.Served) -> None:
    given = conv_cases.arguments()
    with ops.use_isa("portable"):
        assert conv_cases.serving(**given) is None
        ops.conv_norm(**given)
        assert not calls
        with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="or at this ISA level; allow another"):
            ops.conv_norm(**given)


@conv_cases.needs_core
@pytest.mark.parametrize(
    ("label", "given", "match"),
    [
        (
            "float64",
            conv_cases.arguments(dtype=torch.float64),
            "'cpu' was forced, but it cannot serve conv_norm for dtype",
        ),
        ("size", conv_cases.arguments(4, 5, 9), "'cpu' was forced, but it has no kernel for conv_norm of these sizes"),
        (
            "zeros",
            {**conv_cases.arguments(4, 8, 12, grouped=True), "groups": 4},
            "'cpu' was forced, but it has no kernel for conv_no",
        ),
        ("empty", conv_cases.arguments(0), "'cpu' was forced, but it has no kernel for conv_norm of these sizes"),
    ],
)
def test_a_forced_kernel_that_does_not_fit_is_an_error(label: str, given: dict[str, Any], match: str) -> None:
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=match):
        ops.conv_norm(**given)


@conv_cases.needs_core
def test_a_forced_kernel_knows_no_autocast_and_no_transforms() -> None:
    given = conv_cases.arguments()
    given |= {"mean": None, "variance": None}
    with ops.use_backend("cpu"):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="no kernel for conv_norm under"):
            ops.conv_norm(**given)
        with pytest.raises(RuntimeError, match=r"'cpu' was forced, but conv_norm runs .* reference under torch\.func"):
            torch.func.vmap(lambda x: ops.conv_norm(**{**given, "x": x}))(given["x"][None].detach())
        torch._dynamo.reset()
        with pytest.raises(RuntimeError):
            torch.compile(lambda x: ops.conv_norm(**{**given, "x": x}), backend="eager", fullgraph=True)(given["x"])
    for name in ("triton", "cuda"):
        with ops.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was forced, but it does not impl"):
            ops.conv_norm(**given)


# --- autograd


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_second_derivatives(end: dict[str, Any]) -> None:
    given, settings = split(end, batch=2, height=5, width=6)
    conv_cases.check_second_derivatives(
        given, conv_cases.grad_for(given, **settings), ops.conv_norm, **settings, update=False
    )


@pytest.mark.parametrize("name", conv_cases.CONV)
@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_frozen_convolution_keeps_neither_map_nor_weight(end: dict[str, Any], channels: int, name: str) -> None:
    """Map and weight may change before the backward pass, even to infinities or NaN, as in torch's layers."""
    given, settings = split(end, batch=3, channels=channels, height=5, width=8)
    for frozen in ("x", "weight", "bias"):
        given[frozen] = None if given[frozen] is None else given[frozen].detach()
    leaves = [*conv_cases.leaves_of(given).values()]
    grad = conv_cases.grad_for(given, **settings)
    bad = grad.clone()
    bad[1, 3, 1, 2] = math.inf
    found = []
    for backend_name in ("reference", name):
        copied = [n for n in ("x", "weight", "mean", "variance") if given[n] is not None]
        tensors = given | {n: given[n].clone() for n in copied}
        with using(backend_name):
            out = ops.conv_norm(**tensors, **settings)
            for frozen in ("x", "weight"):
                tensors[frozen].fill_(math.nan)
            along = grad.clone().requires_grad_()
            gradients = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            recorded = torch.autograd.grad(out, leaves, along, create_graph=True)
            spread = torch.autograd.grad(out, leaves, bad, retain_graph=True)
            loss = torch.stack([x.square().sum() for x in recorded]).sum()
            second = torch.autograd.grad(loss, [*leaves, along], materialize_grads=True)
        found.append([*gradients, *recorded, *second, *spread])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@conv_cases.needs_core
def test_a_residual_and_statistics_may_change() -> None:
    """The values of residual and statistics do not matter to the gradients."""
    given = conv_cases.arguments(residual=True)
    for training in (True, False):
        grad = conv_cases.grad_for(given, training=training)
        expected = conv_cases.results(given, grad, training=training)
        out = ops.conv_norm(**given, training=training, update=False)
        with torch.no_grad():
            given["residual"].mul_(2)
            given["mean"].add_(1)
            given["variance"].mul_(3)
        leaves = [*conv_cases.leaves_of(given)]
        gradients = torch.autograd.grad(out, [given[name] for name in leaves], grad, retain_graph=True)
        conv_cases.assert_same(dict(zip([f"gradient of {name}" for name in leaves], gradients, strict=True)),
                    {name: x for name, x in expected.items() if name.startswith("gradient")})  # fmt: skip
        recorded = torch.autograd.grad(out, [given[name] for name in leaves], grad, create_graph=True)
        for x, y in zip(recorded, gradients, strict=True):
            torch.testing.assert_close(x.detach(), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
        given = conv_cases.arguments(residual=True)


@conv_cases.needs_core
def test_autograd_counts_no_change_of_the_statistics_as_in_torch(calls: conv_cases.Served) -> None:
    given = conv_cases.arguments()
    statistics = given["mean"], given["variance"]
    by_torch = torch.nn.functional.batch_norm(torch.randn(2, 16, 4, 4), *statistics, given["scale"], training=True)
    (by_torch.square().sum() + ops.conv_norm(**given).square().sum()).backward()
    assert calls == ["forward", "backward"]
    assert [tensor._version for tensor in statistics] == [0, 0]


def test_one_tensor_as_x_and_residual() -> None:
    given = conv_cases.arguments(out=8, weight_last=False)
    grad = conv_cases.grad_for({**given, "residual": given["x"]})
    with ops.use_backend("reference"):
        wide = conv_cases.exact(given)
        out = ops.conv_norm(**{**wide, "residual": wide["x"]}, update=False)
        (expected,) = torch.autograd.grad(out, wide["x"], grad.double())
    out = ops.conv_norm(**{**given, "residual": given["x"]}, update=False)
    conv_cases.assert_near({"x": torch.autograd.grad(out, given["x"], grad)[0]}, {"x": expected})


def test_gradients_accumulate_as_those_of_layers() -> None:
    given = conv_cases.arguments()
    for _ in range(2):
        ops.conv_norm(**given, update=False).sum().backward()
    assert given["weight"].grad.stride() == given["weight"].stride()
    once = torch.autograd.grad(ops.conv_norm(**given, update=False).sum(), given["shift"])[0]
    torch.testing.assert_close(given["shift"].grad, 2 * once)


# --- what the reference serves


@NORMS
def test_autocast_runs_the_convolution_in_16_bits(norm: dict[str, int]) -> None:
    given = conv_cases.arguments(residual=True, grouped="groups" in norm)
    given["residual"] = given["residual"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.conv_norm(**given, **norm, update=False)
        layers = torch.nn.functional.conv2d(given["x"], given["weight"], padding=1)
    assert out.dtype is layers.dtype is torch.bfloat16
    out.sum().backward()
    assert given["weight"].grad.dtype is torch.float32
    mixed = conv_cases.arguments(grouped="groups" in norm, dtype=torch.bfloat16)
    mixed |= {name: given[name] for name in ("scale", "shift", "mean", "variance")}
    assert ops.conv_norm(**mixed, **norm).dtype is torch.bfloat16


@pytest.mark.exhaustive
def test_compiled() -> None:
    """The graph does not break, statistics and gradients included.

    The compiler sees the reference's own layers.
    """
    for norm in ({"training": True}, {"training": False}, {"groups": 4}):
        given = conv_cases.arguments(grouped="groups" in norm)
        grad = conv_cases.grad_for(given, pool=2, **norm)
        with ops.use_backend("reference"):
            expected = conv_cases.results(given, grad, pool=2, **norm)
        torch._dynamo.reset()
        compiled = torch.compile(ops.conv_norm, backend="aot_eager", fullgraph=True)
        statistics = {name: given[name].clone() for name in ("mean", "variance") if given[name] is not None}
        out = compiled(**{**given, **statistics}, pool=2, **norm)
        leaves = [*conv_cases.leaves_of(given)]
        gradients = torch.autograd.grad(out, [given[name] for name in leaves], grad)
        got = {"out": out.detach(), **statistics}
        got |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x)


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_no_samples(end: dict[str, Any]) -> None:
    given, settings = split(end, batch=0)
    before = {name: given[name].clone() for name in ("mean", "variance") if given[name] is not None}
    out = ops.conv_norm(**given, **settings)
    size = 8 // settings.get("pool", 1) // settings.get("stride", 1)
    assert out.shape == (0, 16, size, size)
    out.sum().backward()
    assert not any(x.grad.any() for x in conv_cases.leaves_of(given).values())
    conv_cases.assert_same(given, before)


# --- what is refused

GIVEN = conv_cases.arguments(residual=True)
GROUPED = {"mean": None, "variance": None, "groups": 4}
WRONG: dict[type[Exception], list[tuple[dict[str, Any], str]]] = {
    ValueError: [
        ({"x": torch.randn(8, 8, 8)}, r"x must have shape \[B, in, H, W\].*has \[8, 8, 8\]"),
        ({"x": torch.randn(4, 8, 0, 8)}, r"x must have shape .* where only B may be 0, but has \[4, 8, 0, 8\]"),
        ({"x": torch.randn(4, 3, 8, 8)}, r"weight must have shape \[out, 3, 3, 3\].*has \[16, 8, 3, 3\]"),
        ({"weight": torch.randn(16, 8, 5, 5)}, r"weight must have shape .* but has \[16, 8, 5, 5\]"),
        ({"weight": torch.randn(0, 8, 3, 3)}, r"weight must have shape .* but has \[0, 8, 3, 3\]"),
        ({"scale": torch.ones(8)}, r"scale must have shape \[16\], a value per channel of the result, but has"),
        ({"shift": torch.ones(16, 1)}, r"shift must have shape \[16\]"),
        ({"mean": torch.ones(3)}, r"mean must have shape \[16\]"),
        ({"mean": None}, "mean and variance must both be given, or both be None"),
        ({"mean": None, "variance": None, "training": False}, "mean and variance must be given with training=F"),
        ({"mean": torch.ones(16, requires_grad=True)}, "mean must not require a gradient"),
        ({"residual": torch.randn(4, 8, 8, 8)}, r"residual must have shape \[4, 16, 8, 8\], but has \[4, 8, 8"),
        ({"residual": GIVEN["residual"].to("meta")}, "residual must be on cpu like x, but is on meta"),
        ({"stride": 3}, "stride must be between 1 and 2, not 3"),
        ({"pool": 3}, "pool must be between 1 and 2, not 3"),
        ({"momentum": 1.5}, "momentum must be at least 0 and at most 1, not 1.5"),
        ({"eps": 0.0}, "eps must be greater than 0, not 0"),
        ({"groups": 4}, "mean and variance must be None with groups"),
        ({"groups": 3}, "groups must divide the 16 channels of the result, but is 3"),
        ({"groups": 32}, "groups must divide the 16 channels of the result, but is 32"),
        ({"bias": torch.ones(16)}, "bias must be None without groups"),
        (
            {**GROUPED, "bias": torch.ones(8)},
            r"bias must have shape \[16\], a value per channel of the result, but has \[8\]",
        ),
    ],
    TypeError: [
        ({"weight": GIVEN["weight"].double()}, "weight must have dtype torch.float32 like x, but has torch.fl"),
        ({"scale": torch.ones(16).double()}, "scale must have dtype torch.float32 like x, but has torch.float64"),
        ({"variance": torch.ones(16).bfloat16()}, "variance must have dtype torch.float32 like x, but has"),
        ({"residual": torch.randn(4, 16, 8, 8).half()}, "residual must have dtype torch.float32 like x"),
        (
            {**GROUPED, "bias": torch.ones(16).double()},
            "bias must have dtype torch.float32 like x, but has torch.float64",
        ),
    ],
}


@pytest.mark.parametrize(
    ("error", "wrong", "match"), [(error, *case) for error, cases in WRONG.items() for case in cases]
)
def test_wrong_arguments(error: type[Exception], wrong: dict[str, Any], match: str) -> None:
    before = GIVEN["mean"].clone()
    with pytest.raises(error, match=match):
        ops.conv_norm(**{**GIVEN, **wrong})
    assert torch.equal(GIVEN["mean"], before)


def test_maps_too_small() -> None:
    for channels in (3, 16):
        with pytest.raises(ValueError, match=r"x must have more than 1 value per channel in training"):
            ops.conv_norm(**conv_cases.arguments(1, channels, 16, 1, 1))
        ops.conv_norm(**conv_cases.arguments(1, channels, 16, 1, 1), training=False)
        grouped = conv_cases.arguments(1, channels, 16, 1, 1, grouped=True)
        with pytest.raises(ValueError, match=r"x must have more than 1 value per group, but has shape \[1, "):
            ops.conv_norm(**grouped, groups=16)
        ops.conv_norm(**grouped, groups=8)
        for height, width in ((1, 8), (8, 1)):
            with pytest.raises(ValueError, match="x must have at least 2 rows and columns with pool=2"):
                ops.conv_norm(**conv_cases.arguments(4, channels, 16, height, width), pool=2)
        with pytest.raises(ValueError, match="x must have at least 3 rows and columns with pool=2"):
            ops.conv_norm(**conv_cases.arguments(4, channels, 16, 2, 8), pool=2, stride=2)


@pytest.mark.parametrize("name", conv_cases.CONV)
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_only_the_gradients_that_are_asked_for(end: dict[str, Any], name: str, calls: conv_cases.Served) -> None:
    """Images need no gradient, which would take as long as the convolution."""
    given, settings = split(end)
    conv_cases.check_chosen_gradients(
        calls, name, given, conv_cases.grad_for(given, **settings), len(conv_cases.leaves_of(given)), **settings
    )


# Of a map's gradient; one of a batch of one, or of one row, has several layouts whose strides look alike.
READ: list[Callable[[Tensor], Tensor]] = [
    lambda y: y.squeeze(0).movedim(-3, -1),
    lambda y: y.flatten(2).mT,
    lambda y: y.permute(2, 3, 0, 1),
    lambda y: y[:, :1].expand(-1, 3, -1, -1),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["reference", *conv_cases.CONV])
@pytest.mark.parametrize("shape", [(1, 6, 8), (3, 1, 8), (3, 8, 1), (1, 1, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_one_or_one_row_whose_gradient_comes_in_another_layout(name, shape, training):
    batch, height, width = shape
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype, last in itertools.product(dtypes if name == "reference" else dtypes[:1], (True, False)):
        given = conv_cases.arguments(batch, 16, 16, height, width, side=1 if height == 1 else 3, dtype=dtype)
        if not last and name == "reference":
            for leaf in ("x", "weight"):
                given[leaf] = given[leaf].detach().contiguous().requires_grad_()
        leaves = [*conv_cases.leaves_of(given).values()]
        with using(name) if conv_cases.serving(**given) is not None else ops.use_backend("reference"):
            y = ops.conv_norm(**{**given, "update": False}, training=training, relu=False)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            for read in READ:
                given_back = read(grad).contiguous()
                got = torch.autograd.grad(read(y), leaves, given_back, retain_graph=True)
                (of_map,) = torch.autograd.grad(read(y), y, given_back, retain_graph=True)
                usual = torch.empty_like(y.detach()).copy_(of_map)
                expected = torch.autograd.grad(y, leaves, usual, retain_graph=True)
                loose = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05}[dtype]
                for a, b in zip(got, expected, strict=True):
                    assert float((a - b).abs().max()) <= loose * float(b.abs().max())
