"""Tests of conv_norm: results, gradients and running statistics of the kernels against the reference in float64."""

import itertools
import math
from typing import Any

import pytest
import torch

from fedkern import ops
from python_tests.ops import differential
from python_tests.ops._conv import conv_cases
from python_tests.ops.operator_cases import using


@pytest.mark.sampled(12)
@conv_cases.each_kernel
@pytest.mark.parametrize("layer", conv_cases.SHAPES, ids=str)
def test_random_calls_agree_with_the_reference(name: str, layer: tuple[Any, ...]) -> None:
    with using(name):
        differential.agree("conv_norm", 20, cases=differential.conv_case(layer))


@pytest.mark.sampled(11)
@conv_cases.needs_core
@pytest.mark.parametrize(("stride", "side", "shape"), conv_cases.SHAPES)
def test_these_shapes_are_served(stride: int, side: int, shape: tuple[int, int, int, int]) -> None:
    for batch, residual in itertools.product((1, 5, 33), (False, True)):
        given = conv_cases.arguments(batch, *shape, residual=residual, stride=stride, side=side)
        assert conv_cases.serving(**given, stride=stride) is not None
        given |= {"mean": None, "variance": None}
        assert (conv_cases.serving(**given, stride=stride, groups=shape[1]) is not None) == (
            (stride, side, shape) in conv_cases.GROUPED
        )


@conv_cases.each_kernel
@pytest.mark.parametrize(
    ("side", "shape"), [(3, (3, 8, 32, 32)), (3, (8, 24, 9, 13)), (3, (32, 64, 16, 16)), (1, (16, 32, 16, 16))]
)
def test_bits_do_not_depend_on_threads(name: str, side: int, shape: tuple[int, int, int, int]) -> None:
    ends = ((2, False, {}), (1, True, {}), (1, True, {"training": False}), (2, False, {"groups": 4}))
    for pool, residual, norm in (*ends, (1, True, {"groups": 4})):
        given = conv_cases.arguments(37, *shape, residual=residual, grouped="groups" in norm, side=side)
        settings = {"pool": pool, **norm}
        grad = conv_cases.grad_for(given, **settings)
        conv_cases.check_threads(name, (1, 2, 3, 5), given, grad, **settings)


@conv_cases.each_kernel
def test_bits_do_not_depend_on_how_many_sums_of_wide_weights_are_held(name: str) -> None:
    """Partial sums take 8 MB: one thread holds one beside the total, five threads hold all four."""
    given = conv_cases.arguments(32, 256, 528, 5, 6)
    with using(name):
        assert conv_cases.serving(**given) is not None
    conv_cases.check_threads(name, (1, 5), given, torch.randn(32, 528, 5, 6).contiguous(memory_format=conv_cases.LAST))


@conv_cases.each_kernel
def test_two_values_per_channel_have_a_variance(name: str) -> None:
    """Two is the minimum in training.

    The unbiased variance is twice the batch's.
    """
    given = conv_cases.arguments(2, 16, 16, 1, 1)
    grad = conv_cases.grad_for(given)
    with using(name):
        got = conv_cases.results(given, grad)
    with ops.use_backend("reference"):
        conv_cases.assert_near(got, conv_cases.results(conv_cases.exact(given), grad), 1e-4)


@conv_cases.each_kernel
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_ties_in_windows_go_to_the_first(name: str, training: bool, relu: bool) -> None:
    """Channels without weights have equal values in every window, above or below 0."""
    given = conv_cases.arguments(3, 8, 16, 7, 6)
    with torch.no_grad():
        given["weight"][::2] = 0
        given["shift"][:8], given["shift"][8:] = 1.5, -1.5
        given["mean"].zero_()
    settings = {"pool": 2, "training": training, "relu": relu}
    grad = torch.randn(3, 16, 3, 3)
    dead = ops.conv_norm(**conv_cases.exact(given), **{**settings, "update": False})[:, 8::2] if relu else None
    assert dead is None or not dead.any()
    got, expected = conv_cases.serve_both(name, given, given, grad, **settings)
    # In the other channels rounding may choose otherwise than in torch.
    torch.testing.assert_close(got["out"], expected["out"])
    rows = "gradient of weight"
    conv_cases.assert_near({rows: got[rows][::2]}, {rows: expected[rows][::2]})


# (stride, side of the kernel, shape): Winograd's, direct, filled with zeros, of stride 2 and of one tap.
NOT_FINITE = [
    (1, 3, (16, 32, 9, 8)), (1, 3, (3, 8, 8, 9)), (1, 3, (12, 16, 8, 8)), (1, 3, (7, 14, 8, 9)), (2, 3, (16, 16, 8, 9)),
    (1, 1, (8, 8, 8, 7)),
]  # fmt: skip
ENDS = [{"pool": 2}, {"residual": True}, {"residual": True, "relu": False}, {"relu": False}]


@pytest.mark.sampled(4)
@conv_cases.each_kernel
@pytest.mark.parametrize("norm", [{"training": True}, {"training": False}, {"groups": 2}], ids=str)
@pytest.mark.parametrize(("stride", "side", "shape"), NOT_FINITE)
def test_what_is_not_finite_spreads_as_in_torch(name, norm, stride, side, shape):
    """Forward and backward pass spread infinities and NaN.

    A position that does not depend on an infinity stays a number.
    """
    places = {"x": (1, 2, 4, 3), "weight": (1, 2, 0, 0), "residual": (2, 5, 3, 1), "shift": (3,), "grad": (1, 4, 1, 1)}
    if "groups" in norm:
        if shape[1] % 8:
            pytest.skip("a group norm's own channels are not filled up")
        places["bias"] = (6,)
    values = itertools.cycle([math.inf, math.nan, -math.inf])
    for end, where in itertools.product(ENDS, places):
        value = next(values)
        settings = {"pool": 1, "relu": True, "stride": stride, **norm, **end}
        given = conv_cases.arguments(
            3, *shape, residual=settings.pop("residual", False), grouped="groups" in norm, stride=stride, side=side
        )
        grad = conv_cases.grad_for(given, **settings)
        if where != "residual" or given["residual"] is not None:
            with torch.no_grad():
                {**given, "grad": grad}[where][places[where]] = value
        conv_cases.check_spreading(name, given, grad, f"{where} {end}", **settings)


@conv_cases.each_kernel
def test_finite_values_whose_tiles_overflow(name: str) -> None:
    given = conv_cases.cut_off(conv_cases.arguments(3, 16, 16))
    given["x"] = (given["x"].sign() * 1e38).contiguous(memory_format=torch.channels_last)
    given["weight"] = torch.zeros_like(given["weight"])
    given["weight"][:, :, 1, 1] = torch.eye(16)
    with using(name):
        out = ops.conv_norm(**given, training=False)
    assert bool(out.isfinite().all())


@conv_cases.each_kernel
@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("mean", [0, 100])
def test_no_worse_than_eager(name: str, mean: float, groups: int) -> None:
    """The cases are stages of the default network, and images far from 0 (their variance is a difference of sums)."""
    for shape in ((3, 32, 32, 32), (32, 64, 16, 16), (64, 128, 8, 8)):
        given, settings = conv_cases.arguments(8, *shape, grouped=groups > 0), {"pool": 2, "groups": groups}
        with torch.no_grad():
            given["x"] += mean
        conv_cases.check_no_worse_than_eager(name, given, conv_cases.grad_for(given, **settings), shape, **settings)
