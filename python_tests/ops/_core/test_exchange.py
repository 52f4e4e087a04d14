"""Tests of the CPU core's view of tensors: torch's exchange table, strides of maps, and batch norm's gradient."""

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fedkern import ops
from fedkern.ops._core import backend
from fedkern.ops._core.layout import NARROW, apply_norm, conv2d, plain_strides
from fedkern.ops._fuse.maps import wants_channels_last
from fedkern.ops._optimise.kernels import AdamW, Call
from python_tests.ops.operator_cases import needs_core
from python_tests.ops.operator_runs import Named

FLOATS = tuple(backend.DTYPES)


@pytest.fixture
def core():
    try:
        return backend.cpu_core()
    except backend.Unavailable as error:
        pytest.skip(str(error))


def make_outlived() -> Tensor:
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(torch.ones(3, 4))
    return kept[0]


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


def make_csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this layout a prototype
        return torch.eye(3).to_sparse_csr()


UNREADABLE: dict[str, Callable[[], object]] = {
    "a negated view": lambda: torch._neg_view(torch.ones(3, 4)),
    "integers": lambda: torch.ones(3, 4, dtype=torch.int64),
    "truth values": lambda: torch.ones(3, 4, dtype=torch.bool),
    "complex numbers": lambda: torch.ones(3, 4, dtype=torch.complex64),
    "eight bits": lambda: torch.ones(3, 4).to(torch.float8_e4m3fn),
    "sparse": sparse,
    "compressed": make_csr,
    "on no device": lambda: torch.ones(3, 4, device="meta"),
    "without memory": lambda: torch._efficientzerotensor((3, 4)),
    "outlived its transform": make_outlived,
    "fake": fake,
    "a subclass": lambda: torch.ones(3, 4).as_subclass(Named),
    "no tensor": lambda: [[1.0, 2.0]],
    "nothing": lambda: None,
}


def step(parameters: object, gradients: object, **others: Any) -> Call:
    """Return a step of SGD without momentum."""
    given = dict.fromkeys(("first", "second", "anchor", "correction", "gradient_sum", "max_norm", "adamw"))
    numbers = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "proximal": 0.0, "zero": False}
    return Call(**{**given, **numbers, "parameters": parameters, "gradients": gradients, **others})


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in UNREADABLE.items()])
def test_what_has_no_address_of_its_own_is_not_readable(core, make):
    good, bad = torch.ones(3, 4), make()
    assert not core.tensors_fit(good, bad)
    assert not core.logits_fit(bad, good)
    assert not core.blend_fits(good, bad, 0.5, None)
    assert not core.fuse_fits([good, bad], None, None)
    assert not core.optimise_fits(step(bad, good), False)
    if bad is not None:
        assert not core.optimise_fits(step(good, good.clone(), correction=bad), False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_and_parameters_of_any_strides_are_readable(core, dtype):
    x = torch.ones(3, 4, dtype=dtype)
    assert core.tensors_fit(x, x.t(), x[:, :1].expand(3, 4), nn.Parameter(x), x[:0], x.requires_grad_()) == 1


def test_logits_have_one_shape_and_classes(core):
    x = torch.ones(3, 4)
    assert core.logits_fit(x, x.half(), x.clone()) == 1
    assert core.logits_fit(x[:0]) == 1
    unfit = [(x, x[:2]), (x, x[None]), (x[:, :0],), (x[0],), (torch.ones(1, 2, *[1] * 8),), ()]
    assert not any(core.logits_fit(*tensors) for tensors in unfit)


def test_blend_knows_what_fits(core):
    maps, index = torch.ones(3, 4, 2), torch.tensor([0, 0, 1])
    for fits in [(maps, maps, 0.5, None), (maps, maps[:2], 1.0, index), (maps, maps, torch.ones(3).half(), None)]:
        assert core.blend_fits(*fits)
    for wrong in [
        (maps, maps[:2], 0.5, None), (maps, maps.double(), 0.5, None), (maps, maps, 1.5, None), (maps, maps, 1, None),
        (maps, maps, float("nan"), None), (maps, maps, torch.ones(2), None), (maps, maps, 0.5, index.int()),
        (maps, maps, 0.5, index[:2]), (maps, maps[:, :3], 0.5, index), (maps[0, 0, 0], maps[0, 0, 0], 0.5, None),
    ]:  # fmt: skip
        assert not core.blend_fits(*wrong), wrong


def test_optimise_knows_what_fits(core):
    theta, g, state, two = (torch.ones(3, 4) for _ in range(4))
    leaf, wide = torch.ones(3, 4, requires_grad=True), torch.ones(3, 8)
    adamw = AdamW(0.9, 0.999, 0.1, 0.1, 1e-8)
    for fits in [
        step(theta, g), step(theta[0], g[0]), step(theta[:0], g[:0]), step(theta, g, lr=[0.1, 1, 0.0], zero=True),
        step(theta, g, first=state, momentum=0.9), step(theta, g, first=state, second=two, adamw=adamw, max_norm=1),
        step(theta, g, anchor=state[0], proximal=0.1, correction=state[0].expand(3, 4)), step(wide[:, :4], wide[:, 4:]),
    ]:  # fmt: skip
        assert core.optimise_fits(fits, True) == 1, fits
    assert core.optimise_fits(step(leaf, g), False) == 1
    for wrong in [
        step(leaf, g), step(theta, g[:2]), step(theta, g.double()), step(theta, g[0]), step(theta.t(), g.t()),
        step(theta, theta), step(theta, g, gradient_sum=g), step(theta, state[:1].expand(3, 4)), step(theta, None),
        step(theta, g, lr=-1.0), step(theta, g, lr=[0.1]), step(theta, g, lr=torch.ones(3)), step(theta, g, zero=1),
        step(theta, g, momentum=0.9), step(theta, g, first=state), step(theta, g, proximal=0.1),
        step(theta, g, max_norm=0.0), step(theta, g, weight_decay=float("inf")), step(theta, g, proximal=10**400),
        step(theta, g, first=state, second=two), step(theta, g, first=state, adamw=adamw), (theta, g),
        step(theta, g, first=state, second=two, adamw=adamw._replace(beta1=1.0)), step(theta[None], g[None]),
    ]:  # fmt: skip
        assert core.optimise_fits(wrong, True) == 0, wrong


@pytest.mark.parametrize(
    "shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 4, 4), (1, 1, 1, 1), (2, 3, 1, 5)]
)
def test_layouts_are_those_that_torch_names(core, shape):
    dense = torch.ones(shape)
    variants = [dense, dense.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(*shape, 2)[..., 0]]
    if len(shape) == 4:
        variants.append(dense.contiguous(memory_format=torch.channels_last))
    for a, b in itertools.product(variants, repeat=2):
        last = len(shape) == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in (a, b))
        expected = 1 if a.is_contiguous() and b.is_contiguous() else 2 if last and not a.is_contiguous() else 0
        assert core.fuse_fits([a, b], None, None) == bool(expected)
        if expected:  # ordinary calls, whose layout the first map shows
            assert wants_channels_last([a, b]) == (not a.is_contiguous()) == (expected == 2)


def test_fuse_takes_vectors_of_the_dtype_that_it_computes_in(core):
    maps = [torch.ones(2, 3, 4, 4)] * 2
    scale = torch.ones(6)
    assert core.fuse_fits(maps, scale, None) == 1
    assert core.fuse_fits([x.half() for x in maps], scale, scale) == 1
    assert core.fuse_fits([x.double() for x in maps], scale.double(), None) == 1
    for wrong in (scale.double(), scale.half(), scale[:5], torch.ones(12)[::2], torch.ones(1, 6), "scale"):
        assert core.fuse_fits(maps, None, wrong) == 0
    assert core.fuse_fits([], None, None) == 0
    assert core.fuse_fits(maps[0], None, None) == 0
    assert core.fuse_fits([torch.ones(0, 3)], None, None) == 0


def test_fuse_reads_maps_that_are_dense_inside(core):
    wide = torch.ones(2, 6, 4, 5)
    last = wide.contiguous(memory_format=torch.channels_last)
    one_position = torch.ones(2, 6)
    planar = [wide, wide[:, 2:5], wide[:0], wide[..., :0], one_position, one_position[:, :3], one_position[:, :1, None]]
    for x in planar:
        assert core.fuse_reads(x, False)
    for x in (last, last[:, 2:5], wide[:, :1], wide[..., :0], one_position, wide[:1, :, :1, :1].contiguous()):
        assert core.fuse_reads(x, True)
    for x in (last, wide[..., 1:], wide.mT, wide[:1, :1, :1, :1].expand(2, 6, 4, 5), one_position[:, ::2]):
        assert not core.fuse_reads(x, False)
    for x in (wide, last[..., 1:], last[:, ::2], one_position[:, ::2]):
        assert not core.fuse_reads(x, True)


def test_subclasses_take_the_long_way_to_the_same_result():
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    expected = ops.kl_div(x, y, 2.0)
    assert torch.equal(ops.kl_div(x.as_subclass(Named), y, 2.0).as_subclass(Tensor), expected)


def test_another_table_is_refused(core):
    with pytest.raises(ValueError, match="PyCapsule"):
        core.take_tensors(object(), Tensor, nn.Parameter)


@needs_core
def test_a_tensor_without_memory_is_an_error():
    nothing = torch._efficientzerotensor((4, 5))
    with pytest.raises(TypeError, match="have memory"):
        ops.kl_div(nothing, torch.ones(4, 5))


def test_a_mask_that_outlived_its_transform():
    kept: list[Tensor] = []
    torch.func.grad(lambda z: (kept.append((z > 0).expand(3, 5)), z.sum())[1])(torch.ones(5))
    student, teachers = torch.randn(4, 5, requires_grad=True), torch.randn(3, 4, 5)
    expected = ops.ensemble_kl(student, teachers, class_mask=torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(ops.ensemble_kl(student, teachers, class_mask=kept[0]), expected)
    assert torch.equal(ops.ensemble_kl(student, teachers, torch.ones(3), class_mask=kept[0]), expected)


def test_negated_vectors_beside_maps():
    maps, weights = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(ops.blend(maps, -maps, torch._neg_view(-weights)), ops.blend(maps, -maps, weights))
    scale = torch.randn(6)
    assert torch.equal(ops.fuse_concat([maps, maps], torch._neg_view(-scale)), ops.fuse_concat([maps, maps], scale))


def test_gradients_of_maps_without_positions():
    maps, scale = torch.randn(2, 3, 0, requires_grad=True), torch.ones(6, requires_grad=True)
    for vector in (None, scale):
        total = ops.fuse_concat([maps, maps], vector, None, "relu").sum()
        wanted = (maps,) if vector is None else (maps, scale)
        assert all(not grad.any() for grad in torch.autograd.grad(total, wanted))


def test_a_grad_output_that_outlived_its_transform():
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (grad,) = torch.autograd.grad(ops.blend(x, y, 0.25), x, make_outlived())
    assert torch.equal(grad, torch.full((3, 4), 0.25))


@pytest.mark.parametrize("call", [lambda a: ops.fuse_concat([a, a]), lambda a: ops.blend(a, a)], ids=["fuse", "blend"])
def test_compiled_calls_are_compiled_once(call):
    torch._dynamo.reset()
    backend._forget()  # as in a fresh process
    compiled = torch.compile(call, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            compiled(torch.ones(2, 3))
    torch._dynamo.reset()


# -- layout ------------------------------------------------------------------------------------------------------------


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
