"""strided_conv: against its reference in float64, and what it leaves to PyTorch."""

import pytest
import torch
from torch import Tensor

from fedkern.ops._conv.strided import StridedKernels, strided_conv, strided_reference
from python_tests.ops._conv import conv_cases
from python_tests.ops.operator_cases import using

LAST = torch.channels_last
# Batch, groups, in and out channels, height and width: odd sizes, parts of samples, one vector and two of channels.
SHAPES = (
    (8, 2, 16, 16, 2, 3),
    (9, 3, 16, 48, 7, 4),
    (13, 2, 48, 32, 5, 6),
    (32, 5, 16, 32, 16, 16),
    (21, 2, 32, 64, 9, 8),
)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def draw(shape: tuple[int, ...]) -> list[Tensor]:
    batch, groups, channels, out, height, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, groups * channels, height, width, generator=generator).to(memory_format=LAST)
    weight = torch.randn(groups * out, channels, 4, 4, generator=generator)
    grad = torch.randn(batch, groups * out, height // 2, width // 2, generator=generator)
    return [x.requires_grad_(), weight.requires_grad_(), grad]


@conv_cases.each_kernel
@each_shape
def test_values_and_gradients(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = draw(shape)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = strided_reference(*exact, shape[1])
    expected_gradients = torch.autograd.grad(expected, exact, grad.double())
    monkeypatch.setattr("fedkern.ops._conv.strided.strided_reference", None)
    with using(name):
        y = strided_conv(x, weight, shape[1])
        gradients = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
        single_gradients = [torch.autograd.grad(y, leaf, grad, retain_graph=True)[0] for leaf in (x, weight)]
        planar = strided_conv(x.detach().contiguous(), weight.detach(), shape[1])
        torch.set_num_threads(3)
        threaded = torch.autograd.grad(strided_conv(x, weight, shape[1]), (x, weight), grad)
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, planar)
    for given, again, single, right in zip(gradients, threaded, single_gradients, expected_gradients, strict=True):
        assert torch.equal(given, again)
        assert torch.equal(given, single)
        torch.testing.assert_close(given.double(), right, rtol=1e-5, atol=1e-6 * float(right.detach().abs().max()))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.detach().abs().max()))


@conv_cases.each_kernel
def test_what_is_not_finite_spreads_as_in_torch(name: str) -> None:
    for at in range(3):
        given = draw(SHAPES[0])
        with torch.no_grad():
            given[at][(0,) * 4] = float("inf")
        results = []
        for conv in (strided_conv, strided_reference):
            with using(name):
                y = conv(*given[:2], 2)
                results.append([y, *torch.autograd.grad(y, given[:2], given[2])])
        for result, right in zip(*results, strict=True):
            assert torch.equal(result.isfinite(), right.isfinite())


@conv_cases.each_kernel
def test_second_derivatives(name: str) -> None:
    x, weight, grad = draw(SHAPES[0])
    seconds = []
    for conv in (strided_conv, strided_reference):
        with using(name):
            (slope,) = torch.autograd.grad(conv(x, weight, 2), x, grad, create_graph=True)
            seconds.append(torch.autograd.grad(slope.square().sum(), weight)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-3)


@conv_cases.needs_core
def test_other_calls_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StridedKernels, "forward", None)
    for shape in ((3, 2, 16, 16, 4, 4), (8, 1, 16, 16, 4, 4), (8, 2, 8, 16, 4, 4), (8, 2, 16, 24, 4, 4)):
        x, weight, _ = draw(shape)
        assert torch.equal(strided_conv(x, weight, shape[1]), strided_reference(x, weight, shape[1]))
    leaves = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 4, 4, 5), (6, 2, 4, 4))]
    assert torch.autograd.gradcheck(lambda *leaves: strided_conv(*leaves, 2), leaves)
