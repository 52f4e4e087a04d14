"""FusedBlocks' choice of how to compute, and what its ways keep."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fedkern.models.resnet import BasicBlock
from fedkern.ops import FusedBlocks, use_isa
from fedkern.ops._core import backend
from fedkern.ops._fuse.blocks.choice import LARGE, WIDE, Work, choose
from fedkern.ops._fuse.blocks.lowering import halved, halves
from fedkern.ops._fuse.blocks.shapes import survey

needs_lanes = pytest.mark.skipif("avx2" not in backend.cpu_core().available_isas(), reason="the portable core alone")


def work(kernel: int, width: int, size: float, amount: float = 1.0) -> Work:
    return Work(kernel, width, size, amount)


@pytest.mark.parametrize("amount", [1.0, 1e9])
@pytest.mark.parametrize(
    ("works", "way", "without"),
    [
        ([], "grouped", "grouped"),
        ([(9, WIDE - 1, LARGE)], "direct", "grouped"),
        ([(9, WIDE, LARGE)], "separate", "separate"),
        ([(9, WIDE - 1, LARGE - 1)], "grouped", "grouped"),
        ([(9, WIDE, 2)], "separate", "separate"),
        ([(1, WIDE, LARGE)], "direct", "grouped"),
        ([(1, 1, LARGE - 1)], "grouped", "grouped"),
        # the greater part decides: none of the three has more than half
        ([(9, 8, 32), (9, 128, 4), (9, 8, 4)], "grouped", "grouped"),
        ([(9, 8, 32), (9, 8, 16), (9, 128, 4)], "direct", "grouped"),
        ([(9, 8, 32), (9, 128, 8), (9, 128, 4)], "separate", "separate"),
    ],
)
def test_most_of_the_multiplications_decide(works: Any, way: str, without: str, amount: float) -> None:
    given = [work(*each, amount) for each in works]
    assert choose(given, False, True) == way
    assert choose(given, False, False) == without
    heavier = [*given, work(9, WIDE, 2, amount * (len(given) + 1))]
    assert choose(heavier, False, True) == "separate"


def test_1x1_convolutions_of_channels_last_maps_are_grouped() -> None:
    for width in (4, WIDE):
        assert choose([work(1, width, LARGE)], True, True) == "grouped"
        assert choose([work(9, 4, LARGE, 2.0), work(1, width, LARGE)], True, True) == "direct"


def test_all_layers_of_a_block_are_counted() -> None:
    layers: list[nn.Module] = []
    for i, width in enumerate((16, 32, 64)):
        read = 3 if i == 0 else width // 2
        layers += [nn.Conv2d(read, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 6, 1, groups=2)]
    for count, shared in ((2, True), (3, False)):
        fused = FusedBlocks([nn.Sequential(*copy.deepcopy(layers)).eval() for _ in range(count)], shared=shared)
        shape = (4, 3 if shared else 3 * count, 33, 32)
        assert survey(fused._steps, fused._layers, count, shape, shared).works == [
            Work(9, 16, math.sqrt(33 * 32), 27 * 16 * 33 * 32),
            Work(9, 32, 16.0, 9 * 16 * 32 * 16 * 16),
            Work(9, 64, 8.0, 9 * 32 * 64 * 8 * 8),
            Work(1, 6, 4.0, 32 * 6 * 4 * 4),
        ]


def ways(module: FusedBlocks, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lowerings of folded calls, in order, as they come."""
    seen: list[str] = []
    for name in ("grouped", "separate", "direct"):
        inner = getattr(module._folded, name)
        way = lambda *args, name=name, inner=inner: seen.append(name) or inner(*args)  # noqa: E731
        monkeypatch.setattr(module._folded, name, way)
    return seen


@needs_lanes
@torch.no_grad()
@pytest.mark.parametrize(
    ("width", "size", "way"), [(3, 16, "direct"), (3, 8, "grouped"), (64, 16, "separate"), (64, 4, "separate")]
)
def test_blocks_follow_the_rule(width: int, size: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = FusedBlocks([BasicBlock(width, width).eval() for _ in range(2)])
    seen, threads = ways(fused, monkeypatch), torch.get_num_threads()
    x = torch.randn(1, width, size, size)
    with use_isa("avx2"):
        for count in (1, 2):
            torch.set_num_threads(count)
            fused(x)
        torch.set_num_threads(threads)
    with use_isa("portable"):  # no vectors for the direct lowering's lanes
        fused(x)
    assert seen[:2] == [way, way]
    assert seen[2] == ("grouped" if way == "direct" else way)


@needs_lanes
@torch.no_grad()
def test_pools_that_are_slow_on_contiguous_maps_are_not_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for pool, way in ((nn.MaxPool2d(2), "direct"), (nn.MaxPool2d(3, 2), "grouped"), (nn.AvgPool2d(2), "grouped")):
        fused = FusedBlocks([nn.Sequential(nn.Conv2d(3, 4, 3), pool).eval() for _ in range(2)])
        seen = ways(fused, monkeypatch)
        with use_isa("avx2"):
            fused(torch.randn(1, 3, 18, 18))
        assert seen == [way]


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (2, 3)])
def test_maxima_of_2x2(size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, *size)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = math.nan, math.inf
    torch.testing.assert_close(halved(x), nn.MaxPool2d(2)(x), rtol=0, atol=0, equal_nan=True)
    assert all(halves(layer) for layer in (nn.MaxPool2d(2), nn.MaxPool2d((2, 2), (2, 2))))
    others = [nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True)]
    assert not any(halves(layer) for layer in [*others, nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(2), None])


@pytest.mark.parametrize("lowering", ["separate", "grouped"])
def test_prepared_weights_follow_changes_and_copies(lowering: str) -> None:
    """Weights that are laid out once per shape are laid out anew after a change, and never travel with a copy."""
    blocks = [nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval() for _ in range(2)]
    fused = FusedBlocks(blocks, lowering=lowering)  # type: ignore[arg-type]
    inputs = [torch.randn(batch, 4, 6, 6) for batch in (3, 1, 2, 5, 4, 3)]  # more shapes than are kept

    @torch.no_grad()
    def check(module: nn.Module) -> None:
        for x in inputs:
            wanted = torch.cat([block(x) for block in blocks], 1)
            torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)

    check(fused)
    check(copy.deepcopy(fused))
    check(pickle.loads(pickle.dumps(fused)))
    with torch.no_grad():
        blocks[1][0].weight.mul_(2)
    fused.load_state_dicts([block.state_dict() for block in blocks])
    check(fused)


@torch.no_grad()
def test_convolutions_alone_are_folded_in_either_mode() -> None:
    blocks = [nn.Conv2d(6, 3, 1) for _ in range(2)]
    module = FusedBlocks(blocks)
    assert module.training
    x = torch.randn(2, 6, 5, 5)
    seen = []
    inner = module._folded.grouped
    module.lowering = "grouped"
    module._folded.grouped = lambda *args: seen.append(True) or inner(*args)  # type: ignore[method-assign]
    y = module(x)
    assert seen
    assert torch.equal(y, module.eval()(x))
    with_norms = FusedBlocks([nn.Sequential(nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)])
    with_norms._folded = None  # type: ignore[assignment]
    with_norms.lowering = "grouped"
    torch.testing.assert_close(with_norms(x).mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
