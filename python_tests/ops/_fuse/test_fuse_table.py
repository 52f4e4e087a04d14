"""FusedBlocks' choice of how to compute, and what its ways keep."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from fedkern.ops import FusedBlocks
from fedkern.ops._fuse.blocks import choice as fuse_choice
from fedkern.ops._fuse.blocks.choice import choose
from fedkern.ops._fuse.blocks.lowering import halved, halves
from fedkern.ops._fuse.blocks.lowering_costs import KINDS, LOWERINGS, VECTOR, Work, nearest, read_table, write_table

SHIPPED = [pytest.param(path, id=path.stem) for path in sorted(fuse_choice.SHIPPED.glob("*.json"))]


def test_every_layer_has_a_way() -> None:
    for kind, count, last, whole in itertools.product(KINDS, (1, 50), (True, False), (False, True)):
        work = Work(kind, 0.0, whole, 0.0, 1.0)
        assert choose([work], count, last, True) in LOWERINGS
        assert choose([work], count, last, False) != "direct"
    assert choose([], 5, False, True) == "grouped"


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_tables_tell_every_layer_by_its_own_row(path: Path) -> None:
    table = read_table(path)
    for threads, rows in table.rows.items():
        for row in rows:
            whole = row.width % VECTOR == 0
            own = (row.kind, row.branches, row.width, whole, row.size, row.channels_last)
            assert nearest(table, threads, *own) == row
            costs = [row.grouped, row.separate, math.inf if row.direct is None else row.direct]
            works = [Work(row.kind, row.width, whole, row.size, 7.0)] * 2
            assert table.totals(works, row.branches, row.channels_last, threads) == [14 * cost for cost in costs]


@pytest.mark.parametrize("path", SHIPPED)
def test_a_table_is_written_as_it_was_read(path: Path, tmp_path: Path) -> None:
    table = read_table(path)
    write_table(table, tmp_path / "again.json")
    again = read_table(tmp_path / "again.json")
    assert (again.rows, again.digest, again.where) == (table.rows, table.digest, table.where)
    assert [each.name for each in tmp_path.iterdir()] == ["again.json"]


def test_shipped_tables_are_in_the_package() -> None:
    """The wheel holds what package-data names."""
    root = Path(fuse_choice.__file__).resolve().parents[4]
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    named = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fedkern"]
    assert SHIPPED
    held = {path for pattern in named for path in (root / "fedkern").glob(pattern)}
    assert held >= set(fuse_choice.SHIPPED.iterdir())


def test_lowering_follows_all_layers_of_a_block() -> None:
    """A chain's choice is by what it does on every size, with maxima in between, not by its last layer alone."""
    layers: list[nn.Module] = []
    for i, width in enumerate((16, 32, 64)):
        read = 3 if i == 0 else width // 2
        layers += [nn.Conv2d(read, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    fused = FusedBlocks([nn.Sequential(*copy.deepcopy(layers)).eval() for _ in range(2)])
    works = fused._folded.works((4, 3, 33, 32), True, False)
    assert [work.kind for work in works] == ["stem", "halve", "spatial", "halve", "spatial", "halve"]
    assert [work.whole for work in works] == [True] * 6
    assert [work.amount for work in works] == [
        *(27 * 16 * 33 * 32, 16 * 33 * 32, 9 * 16 * 32 * 16 * 16, 32 * 16 * 16, 9 * 32 * 64 * 8 * 8, 64 * 8 * 8)
    ]
    assert [work.kind for work in fused._folded.works((4, 3, 33, 32), True, True)] == ["recorded"] * 3


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
