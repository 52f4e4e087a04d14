"""Tests of batch norm's gradient where strides do not show a map's layout: one sample, maps of one row or column."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._core.layout import apply_norm

SHAPES = (
    (1, 6, 4, 5), (3, 6, 1, 5), (3, 6, 4, 1), (1, 6, 1, 5), (1, 6, 4, 1), (1, 1, 4, 5), (3, 6, 4, 5), (4, 6, 1, 1),
)  # fmt: skip
FORMATS = (torch.contiguous_format, torch.channels_last)
# What a loss reads of a map, which decides in what layout the gradient arrives.
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "the map": lambda y: y,
    "channels behind": lambda y: y.squeeze(0).movedim(-3, -1),
    "turned": lambda y: y.permute(2, 3, 0, 1),
    "transposed": lambda y: y.mT,
    "tokens": lambda y: y.flatten(2).mT,
    "without axes of size 1": lambda y: y.squeeze().movedim(0, -1),
    "a channel": lambda y: y[:, :1].expand(-1, 3, -1, -1),
}


def laid_out(x: Tensor, kind: torch.memory_format, unusual: bool) -> Tensor:
    """Return ``x`` with the strides of its format, or with unusual ones for axes of size 1."""
    x = x.contiguous(memory_format=kind)
    strides = [1 if unusual and n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def formula(x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, training: bool) -> Tensor:
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    columns = [v[:, None, None] for v in (mean, variance, scale, shift)]
    return (x - columns[0]) / (columns[1] + 1e-5).sqrt() * columns[2] + columns[3]


@pytest.mark.sampled(40)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_the_formulas(shape: tuple[int, ...], read: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.rand(shape[1], generator=draw).add(0.5).to(dtype) for _ in range(4)]
    for kind, unusual, training in itertools.product(FORMATS, (False, True), (True, False)):
        x = laid_out(torch.randn(shape, generator=draw).to(dtype), kind, unusual).requires_grad_()
        exact = x.detach().double().requires_grad_()
        y = apply_norm(F.batch_norm, x, *(v.clone() for v in vectors), training)
        z = formula(exact, *(v.double() for v in vectors), training)
        grad = torch.randn(READ[read](z).shape, generator=draw).to(dtype)
        (got,) = torch.autograd.grad(READ[read](y), x, grad)
        (expected,) = torch.autograd.grad(READ[read](z), exact, grad.double())
        tolerance = 0.03 if dtype is torch.bfloat16 else 1e-4
        assert float((y - z).detach().abs().max()) <= tolerance * float(z.detach().abs().max())
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max()), (kind, unusual, training)


def loss(x: Tensor) -> Tensor:
    """Return a loss whose gradient is channels-last in a contiguous map of a batch of one."""
    y = torch.relu_(apply_norm(F.batch_norm, x, None, None, None, None, True))
    return (y.squeeze(0).movedim(0, -1).contiguous() * torch.arange(120).view(4, 5, 6)).square().sum()


def exact_loss(x: Tensor) -> Tensor:
    y = formula(x, *torch.ones(4, 6).unbind(), training=True) - 1
    return (y.relu().squeeze(0).movedim(0, -1) * torch.arange(120).view(4, 5, 6)).square().sum()


def image() -> Tensor:
    return torch.randn(1, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_second_derivatives_and_transforms() -> None:
    x = image()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(exact_loss)(x))
    rows = torch.stack([x, 2 * x + 1, x.flip(3)])
    for gradients in (torch.vmap(torch.func.grad(loss)), torch.func.grad(lambda rows: torch.vmap(loss)(rows).sum())):
        torch.testing.assert_close(gradients(rows), torch.func.grad(lambda r: sum(map(exact_loss, r)))(rows))
    second = [torch.autograd.functional.hvp(f, x, x.flip(1))[1] for f in (loss, exact_loss)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_under_a_compiler(compiler: str) -> None:
    x = image().requires_grad_()
    torch.compile(loss, backend=compiler, fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, torch.func.grad(exact_loss)(x.detach()))


def test_other_maps_are_given_as_they_are() -> None:
    """The norm of a usual batch, without gradient or in a trace is not wrapped."""
    norm = torch.nn.Identity()
    for shape in ((4, 6, 4, 5), (1, 6, 1, 1), (4, 6, 1, 1), (3, 6), (3, 6, 5)):
        x = torch.randn(shape)
        assert apply_norm(norm, x) is x
    single = image()
    assert apply_norm(norm, single) is not single
    with torch.no_grad():
        assert apply_norm(norm, single) is single
    traced = torch.jit.trace(lambda x: apply_norm(F.batch_norm, x, torch.zeros(6), torch.ones(6)), single.float())
    assert traced(torch.randn(7, 6, 4, 5)).shape == (7, 6, 4, 5)
