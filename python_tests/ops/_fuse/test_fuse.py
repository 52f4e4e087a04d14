"""Tests of FusedBlocks, and of fuse_concat and fuse_mean where random calls do not look closely enough."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkern import models, ops
from fedkern.ops import fuse_concat, fuse_mean, use_backend
from fedkern.ops._core import backend
from fedkern.ops._core.backend import cpu_core
from fedkern.ops._fuse.kernels import FuseKernels
from python_tests.ops.operator_cases import DTYPES, KERNELS, needs_core, using

FUNCTIONS = (fuse_concat, fuse_mean)


@needs_core
@pytest.mark.parametrize("function", FUNCTIONS)
def test_maps_that_are_copied_give_the_same_bits(function: Callable[..., Tensor]) -> None:
    results: list[list[Tensor]] = []
    for layout in ("contiguous", "transposed"):
        torch.manual_seed(1)
        features = [torch.randn(4, 5, 3, 6) for _ in range(2)]
        features = [(x.mT.contiguous().mT if layout == "transposed" else x).requires_grad_() for x in features]
        vectors = [torch.randn(10).double().requires_grad_() for _ in range(2)]
        out = function(features, *vectors, "relu")
        results.append([out, *torch.autograd.grad(out, [*features, *vectors], torch.randn_like(out))])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    for gradient in results[0][-2:]:
        assert not torch.equal(gradient, gradient.float().double())  # summed in fp64, and not rounded since


@needs_core
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_last_is_not_copied(monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format) -> None:
    seen: list[bool] = []
    original = FuseKernels._laid_out

    def spy(kernels: FuseKernels, x: Tensor, channels_last: bool) -> Tensor:
        result = original(kernels, x, channels_last)
        seen.append(result is x)
        return result

    monkeypatch.setattr(FuseKernels, "_laid_out", spy)
    features = [torch.randn(4, 8, 5, 5).contiguous(memory_format=layout).requires_grad_() for _ in range(3)]
    scale = torch.randn(24, requires_grad=True)
    out = fuse_concat(features, scale, None, "relu")
    out.backward(torch.randn_like(out))
    slices = [x.requires_grad_() for x in out.detach().split([8, 8, 8], 1)]  # of a wider map
    fuse_mean(slices, activation="relu").sum().backward()
    assert seen
    assert sum(not kept for kept in seen) == 1  # the gradient of the sum: one value, stretched


def test_mean_of_relus_is_not_the_relu_of_the_mean(backend: str) -> None:
    x = torch.tensor([[-2.0, 4.0]])
    assert fuse_mean([x, -x], activation="relu").tolist() == [[1.0, 2.0]]
    assert fuse_mean([x, x, x]).tolist() == x.tolist()


@needs_core
def test_streamed_results_are_the_same(backend: str, cache_bytes: Callable[[int], None]) -> None:
    """Results too large for the cache are written past it, in whole lines wherever the run begins."""
    for layout, dtype, width in itertools.product(
        (torch.contiguous_format, torch.channels_last), (torch.float32, torch.bfloat16), (13, 16)
    ):
        features = [torch.randn(3, width, 37, 5).to(dtype).contiguous(memory_format=layout) for _ in range(3)]
        features = [x.requires_grad_() for x in features]
        scale = torch.randn(3 * width)
        results = []
        for limit in (1 << 40, -1):
            cache_bytes(limit)
            for function in FUNCTIONS:
                out = function(features, scale, scale, "relu")
                results.append([out, *torch.autograd.grad(out, features, torch.ones_like(out).cumsum(1))])
        for usual, streamed in zip(results[:2], results[2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(usual, streamed, strict=True))


@needs_core
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_is_written(dtype: torch.dtype, cache_bytes: Callable[[int], None]) -> None:
    core = cpu_core()
    batch, count, size = 2, 5, 23
    total = batch * 2 * count * size
    for name, interleaved, stream, offset in itertools.product(KERNELS, (False, True), (False, True), range(0, 35, 3)):
        strides = (1, count) if interleaved else (size, 1)
        maps = [torch.randn(batch * count * size).to(dtype) for _ in range(2)]
        buffer = torch.full((total + 70,), 777.0, dtype=dtype)
        target = buffer[offset:]
        outer = (1, 2 * count) if interleaved else (size, 1)
        cache_bytes(-1 if stream else 1 << 40)
        views = [x.as_strided((batch, count, size), (count * size, *strides)) for x in maps]
        got = target.as_strided((batch, 2 * count, size), (2 * count * size, *outer), target.storage_offset())
        with using(name):
            assert core.fuse_forward(views, got, None, None, interleaved, True, False, 1)
        assert torch.equal(got, torch.cat(views, 1).relu())
        assert bool((buffer[:offset] == 777).all())
        assert bool((buffer[offset + total :] == 777).all())


@needs_core
def test_a_forced_kernel_says_that_it_knows_no_transforms() -> None:
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was forced.*reference under torch\.func"):
        torch.func.vmap(lambda a: fuse_concat([a, a]))(torch.randn(4, 2, 3))


def test_only_what_is_needed_is_saved() -> None:
    maps = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    out = fuse_concat(maps, torch.full((6,), 3.0))
    with torch.no_grad():
        maps[0].zero_()
        out.zero_()  # neither matters to the maps' gradients
    out.sum().backward()
    assert torch.equal(maps[0].grad, torch.full_like(maps[0], 3.0))


X = torch.zeros(2, 3, 4)
WRONG = [
    ((X,), TypeError, "features must be a list of tensors, but got Tensor"),
    (([X.int()],), TypeError, r"features\[0\] must have dtype float32.*but has torch.int32"),
    (
        ([X, X.double()],),
        TypeError,
        r"features\[1\] must have dtype torch.float32 like features\[0\], but has torch.fl",
    ),
    (([torch.zeros(3)],), ValueError, r"features\[0\] must have shape \[B, C, \*S\], but has \[3\]"),
    (([X, X[:1]],), ValueError, r"features\[1\] must have shape \[2, .*, 4\] like features\[0\], but has \[1, 3, 4\]"),
    (([X, X[..., :2]],), ValueError, r"features\[1\] must have shape .* but has \[2, 3, 2\]"),
    (([X, X], torch.zeros(5)), ValueError, r"scale must have shape \[6\], one value per channel.*but has \[5\]"),
    (([X, X], None, torch.zeros(2, 3)), ValueError, r"shift must have shape \[6\].*but has \[2, 3\]"),
    (([X], None, None, "gelu"), ValueError, "activation must be None or \"relu\", but is 'gelu'"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments(backend: str, function: Callable, arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


def test_mean_needs_one_width() -> None:
    message = r"features\[1\] must have shape \[2, 3, 4\] like features\[0\], but has \[2, 2"
    with pytest.raises(ValueError, match=message):
        fuse_mean([X, X[:, :2]])


# -- fused blocks ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(3, 6), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "classifier": classifier,
    "alone": lambda: nn.Conv2d(4, 3, 1),
    "linear": lambda: nn.Linear(4, 3, bias=False),
    "resnet stage": lambda: models.build("resnet8", classes=3, channels=3, image_size=8, width=4, seed=0).layer2,
}


def make_blocks(name: str, count: int = 3) -> list[nn.Module]:
    blocks = []
    for m in range(count):
        torch.manual_seed(m)
        block = BLOCKS[name]()
        with torch.no_grad():
            for key, tensor in block.state_dict().items():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5) if key.endswith("var") else tensor.normal_()
                else:
                    tensor.fill_(m)  # batches counted by the norms of this client
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_gradients_and_statistics(name, shared, training, grouped, monkeypatch):
    if grouped:  # as on a GPU
        monkeypatch.setattr(backend, "eager", lambda *_: False)
    blocks = [block.double().train(training) for block in make_blocks(name)]
    fused = ops.FusedBlocks(blocks, shared=shared)
    size = () if name == "linear" else (6, 6)
    x = torch.randn(5, 4 if shared else 12, *size, dtype=torch.float64, requires_grad=True)
    parts = [x] * 3 if shared else list(x.tensor_split(3, 1))
    expected = torch.cat([block(part) for block, part in zip(blocks, parts, strict=True)], 1)
    outputs = fused(x)
    torch.testing.assert_close(outputs, expected)
    along = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(outputs, x, along)[0], torch.autograd.grad(expected, x, along)[0])
    for block, state in zip(blocks, fused.state_dicts(), strict=True):
        torch.testing.assert_close(dict(state), dict(block.state_dict()))


@pytest.mark.parametrize("name", BLOCKS)
def test_states_go_back_exactly(name: str) -> None:
    blocks, other_blocks = make_blocks(name), make_blocks(name)[::-1]
    fused = ops.FusedBlocks(blocks)
    for members in (blocks, other_blocks):
        fused.load_state_dicts([block.state_dict() for block in members])
        for block, state in zip(members, fused.state_dicts(), strict=True):
            assert list(state) == list(block.state_dict())
            assert all(torch.equal(state[key], value) for key, value in block.state_dict().items())
    with pytest.raises(ValueError, match="states must hold 3 state dicts, not 2"):
        fused.load_state_dicts([block.state_dict() for block in blocks[:2]])
    with pytest.raises(ValueError, match=r"states\[0\] must have the keys and shapes"):
        fused.load_state_dicts([{}, {}, {}])


def test_the_fused_module_can_be_trained_and_writes_to_no_input() -> None:
    with torch.inference_mode():
        fused = ops.FusedBlocks([nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 1)) for _ in range(2)])
    x = torch.randn(2, 2, 3, 3)
    before = x.clone()
    for module in (fused, ops.FusedBlocks([nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 1))], shared=False)):
        module(x).sum().backward()
        assert torch.equal(x, before)
        assert all(p.grad is not None for p in module.parameters())


def make_hooked() -> nn.Module:
    layer = nn.Conv2d(2, 3, 1)
    layer.register_forward_hook(lambda *_: None)
    return layer


def make_replaced() -> nn.Module:
    layer = nn.Conv2d(2, 3, 1)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def make_tied() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    layers[1].weight = layers[0].weight
    return layers


class Mixing(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.call = nn.Conv2d(2, 3, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.LayerNorm(3)), r"layer 1 \(LayerNorm\)"),
        (nn.Sequential(nn.Softmax(1)), r"layer 0 \(Softmax\)"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 1)), "ParametrizedConv2d"),
        (nn.Sequential(nn.BatchNorm2d(2, momentum=None)), r"layer 0 \(BatchNorm2d\) with these settings"),
        (nn.Sequential(nn.Flatten(0)), r"layer 0 \(Flatten\) with these settings"),
        (Mixing(lambda y: y.softmax(1)), "call softmax"),
        (Mixing(lambda y: torch.cat([y, y], 1)), "call cat"),
        (Mixing(lambda y: y.flatten()), "call flatten"),
        (Mixing(lambda y: y.mean(1)), "call mean"),
        (Branching(), "cannot trace the forward of Branching"),
        (make_hooked(), "hooks or a replaced forward"),
        (make_replaced(), "hooks or a replaced forward"),
        (make_tied(), "tied parameters"),
        ("conv", "blocks must hold modules, not str"),
    ],
    ids=str,
)
def test_what_cannot_be_grouped_is_refused_by_name(block: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        ops.FusedBlocks([block, block])


def make_scaled() -> nn.Module:
    block = Residual()
    block.scale = 2.0
    return block


@pytest.mark.parametrize(
    ("block", "name"),
    [
        (Residual().eval(), "training"),
        (Residual().double(), "conv.weight"),
        (Residual().requires_grad_(False), "conv.weight"),
        (make_scaled(), "scale"),
        (nn.Conv2d(4, 4, 3), ""),
    ],
    ids=str,
)
def test_blocks_that_differ(block: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=rf"blocks\[1\] must equal blocks\[0\] but for its values; .* in '{name}"):
        ops.FusedBlocks([Residual(), block])


def test_inputs_that_do_not_fit() -> None:
    fused = ops.FusedBlocks(make_blocks("alone"), shared=False)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3 \* C, \.\.\.\], not \[2, 4, 6, 6\]"):
        fused(torch.randn(2, 4, 6, 6))
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        fused([1.0])
    with pytest.raises(ValueError, match="blocks must hold at least one module"):
        ops.FusedBlocks([])
