"""Tests of strides of maps, and of strided 1 × 1 convolutions of few channels, where oneDNN overruns its memory."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern.ops._core.layout import NARROW, apply_norm, conv2d, plain_strides

LAST = torch.channels_last
PARTS = """
import itertools

import torch
from torch import nn

from fedkern import models, ops
from fedkern.models.blocks import cut_network
from fedkern.ops._conv.kernels import Inputs, Settings
from fedkern.ops._conv.reference import conv_norm_reference

torch.set_num_threads(1)


def convolved(channels, stride, batch):
    for relu in (True, False):
        step = min(stride, 2)
        x = maps(channels, step, batch)
        weight = torch.randn(8, channels, 1, 1, requires_grad=True)
        inputs = Inputs(x, weight, torch.ones(8), torch.zeros(8))
        ops.conv_norm(*inputs[:4], None, None, stride=step, relu=relu).sum().backward()
        conv_norm_reference(inputs, Settings(stride=step, relu=relu)).sum().backward()


def blocks(channels, stride, batch):
    for shared in (True, False):
        made = [nn.Sequential(nn.Conv2d(channels, 8, 1, stride=(stride, 1 + batch % 2))) for _ in range(2)]
        x = maps(channels if shared else 2 * channels, stride, batch)
        ops.FusedBlocks(made, shared=shared)(x).sum().backward()


def zoo(channels, stride, batch):
    made = models.build("resnet8", classes=3, channels=3, image_size=8, width=channels, seed=0)
    made.to(memory_format=torch.channels_last)(maps(3, 2, batch)).sum().backward()


class Strided(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(
            nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, 8, 1, stride=apart), nn.ReLU(), nn.Conv2d(8, 4, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes),
        )


class Hidden(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.all = Strided(classes, channels)

    def forward(self, x):
        return self.all(x + 0 * x.mean())


def own(channels, stride, batch):
    global wide, apart
    wide, apart = channels, stride
    for kind, colours in ((Strided, 1), (Hidden, 1), (Strided, 3)):
        name = f"{kind.__name__}-{channels}-{stride}-{batch}-{colours}"
        models.register_model(name)(kind)
        network = models.build(name, classes=3, channels=colours, image_size=4 * stride, seed=0)
        network(maps(colours, stride, batch)).sum().backward()
        if kind is Strided:
            cut_network(network, 2)(maps(colours, stride, batch)).sum().backward()


def maps(channels, stride, batch):
    x = torch.randn(batch, 4 * stride, 4 * stride, channels).permute(0, 3, 1, 2)
    return x.requires_grad_()


for part in (convolved, blocks, zoo, own):
    for channels, stride, batch in ((2, 2, 2), (4, 2, 5), (7, 3, 3), (15, 2, 2)):
        print(part.__name__, channels, stride, batch, flush=True)
        part(channels, stride, batch)

"""


@pytest.mark.exhaustive
def test_no_part_writes_past_its_memory() -> None:
    """The heap checks of glibc end the process where bytes outside of an allocation have changed."""
    checks = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", PARTS], env=os.environ | checks, capture_output=True, text=True, timeout=300
    )
    if "cannot be preloaded" in done.stderr or sys.platform != "linux":
        pytest.skip("there is no libc_malloc_debug.so.0, which checks the heap")
    assert done.returncode == 0, done.stdout[-40:] + done.stderr[-2000:]


@pytest.mark.parametrize("shape", [(4, 1, 6, 5), (4, 3, 6, 5), (1, 3, 4, 4), (1, 1, 4, 4), (4, 3, 1, 1), (0, 1, 4, 4)])
def test_strides_are_those_of_a_new_tensor(shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape)
    last = torch.empty_strided(shape, torch.empty(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).stride())
    for x in (expected, last.copy_(expected), torch.randn(2, *shape)[1].copy_(expected)):
        found = plain_strides(x)
        assert found.stride() == expected.stride()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        {"stride": (2, 2)}, {"stride": (1, 3)}, {"stride": (2, 3), "padding": "valid", "dilation": (2, 1)},
        {"stride": (2, 2), "padding": (1, 0)}, {"stride": (2, 2), "kernel": (1, 3)}, {"stride": (2, 2), "groups": 2},
        {"stride": (1, 1), "padding": "same"}, {"stride": (2, 2), "channels": NARROW},
    ],
    ids=str,
)  # fmt: skip
def test_a_convolution_computes_what_torchs_does(case: dict[str, Any]) -> None:
    settings = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, **case}
    channels, kernel = settings.pop("channels", 4), settings.pop("kernel", (1, 1))
    # Contiguous maps: torch's own gradient is right there.
    x = torch.randn(3, channels, 7, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, channels // settings["groups"], *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    given, expected = conv2d(x, weight, bias, **settings), F.conv2d(x, weight, bias, **settings)
    torch.testing.assert_close(given, expected)
    grad = torch.randn_like(expected)
    for got, wanted in zip(*(torch.autograd.grad(y, (x, weight, bias), grad) for y in (given, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_wide_convolutions_are_torchs_bit_for_bit() -> None:
    x = torch.randn(2, NARROW, 8, 8).contiguous(memory_format=LAST)
    weight = torch.randn(8, NARROW, 1, 1)
    assert torch.equal(conv2d(x, weight, None, (2, 2), (0, 0), (1, 1), 1), F.conv2d(x, weight, stride=2))


# -- normed ------------------------------------------------------------------------------------------------------------


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
