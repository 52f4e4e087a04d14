"""One frozen level of FuseFL with ten clients: the fused level against ten separate module calls.

The networks are ResNet-18 of width 20 = 64 / sqrt(10), cut in 2 and in 4 blocks; a level's input is what the level
before gives, joined.  The modules are what a plain implementation runs: every client's adaptor and block on the same
joined input, in eval mode without autograd, and the concatenation of their results, which the next adaptors read; in
the layout that torch makes by default and, input and weights, channels-last, there also with folded batch norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import folded
from harness import compare, device
from torch import Tensor, nn

from fedkern import models
from fedkern.models.blocks import cut
from fedkern.models.fused import Branch, FusedLevel, make_adaptor

CLIENTS, WIDTH, BATCH = 10, 20, 64
LAST = torch.channels_last


def level(blocks: int, number: int) -> tuple[FusedLevel, list[nn.Module], Tensor]:
    """The fused level, the same clients' (adaptor, block) pairs as modules, and an input."""
    torch.manual_seed(0)
    fused, modules = [], []
    for k in range(CLIENTS):
        network = cut(models.build("resnet18", classes=10, channels=3, image_size=32, seed=k, width=WIDTH), blocks)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, std=0.1)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
        block = network.blocks[number - 1].to(device()).eval()
        states = {"block": block.state_dict()}
        adaptor = None
        if number > 1:
            before = network.interfaces((3, 32, 32))[number - 2]
            adaptor = make_adaptor("cnn1x1", before, CLIENTS, generator=torch.Generator().manual_seed(k)).to(device())
            states["adaptor"] = adaptor.state_dict()
        fused.append(Branch(block, adaptor, states))
        modules.append(block if adaptor is None else nn.Sequential(adaptor, block).eval())
    shape = (3, 32, 32) if number == 1 else (CLIENTS * before[0], *before[1:])
    return FusedLevel(fused), modules, torch.randn(BATCH, *shape, device=device()).relu()


def calls(modules: list[nn.Module], x: Tensor) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return torch.cat([module(x) for module in modules], 1)

    return run


@pytest.mark.parametrize(("blocks", "number"), [(2, 1), (4, 2), (4, 3)])
def test_frozen_level(benchmark: Any, blocks: int, number: int) -> None:
    fused, modules, x = level(blocks, number)
    assert fused.fused is not None
    last = [copy.deepcopy(module).to(memory_format=LAST) for module in modules]

    def ours() -> Tensor:
        with torch.no_grad():
            return fused(x)

    plain = [folded(module) for module in last]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # algorithms round to it at different places
        for others in (modules, plain):
            torch.testing.assert_close(ours(), calls(others, x)(), rtol=1e-3, atol=1e-3)
    runs: dict[str, Callable[[], Any]] = {
        "fedkern": ours,
        "modules": calls(modules, x),
        "channels-last modules": calls(last, x.contiguous(memory_format=LAST)),
        "channels-last folded modules": calls(plain, x.contiguous(memory_format=LAST)),
    }
    case = f"level {number} of {blocks}, M={CLIENTS} ResNet-18 of width {WIDTH}, input {list(x.shape)}"
    compare(benchmark, "fusefl_level", case, runs, floors={"modules": 1.2}, pairs=5, threads=1)
