"""Tests of FusedBlocks: the outputs, gradients and states of the blocks themselves, and refusals by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkern import models, ops
from fedkern.ops._core import backend


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
    with pytest.raises(
        ValueError, match=rf"blocks\[1\] must equal blocks\[0\] but for its values; it differs in '{name}"
    ):
        ops.FusedBlocks([Residual(), block])


def test_inputs_that_do_not_fit() -> None:
    fused = ops.FusedBlocks(make_blocks("alone"), shared=False)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3 \* C, \.\.\.\], not \[2, 4, 6, 6\]"):
        fused(torch.randn(2, 4, 6, 6))
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        fused([1.0])
    with pytest.raises(ValueError, match="blocks must hold at least one module"):
        ops.FusedBlocks([])
