"""Baselines compute what our operators do, call after call, and do not spoil what they are given."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, bench_aggregate, bench_boxes, bench_robust, bench_server_step
from fedkern import ops
from fedkern.models.networks.resnet import BasicBlock

SIZE, COUNT = 3 * bench_aggregate.LAYERS + 7, 4  # layers of two lengths


@pytest.fixture
def uploads() -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(0)
    return [torch.randn(SIZE) for _ in range(COUNT)], [1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize("make", [bench_aggregate.add_loop, bench_aggregate.foreach_add])
def test_means_into_held_memory(make: Any, uploads: tuple[list[Tensor], list[float]]) -> None:
    vectors, weights = uploads
    out = torch.full((SIZE,), 9.0)
    run = make(vectors, weights, out)
    for _ in range(2):
        torch.testing.assert_close(run(), ops.weighted_mean(vectors, weights))
    torch.testing.assert_close(out, ops.weighted_mean(vectors, weights))


def test_server_steps() -> None:
    case = bench_server_step.Case(COUNT, SIZE)
    runs = (case.fedkern(), case.eager())
    for _ in range(3):
        expected, found = (run().clone() for run in runs)
        assert not torch.equal(expected, case.global_)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_looks_at_the_deltas() -> None:
    case = bench_server_step.Case(COUNT, SIZE)
    norms, cosines = case.look(case.allocate(COUNT), case.allocate(1)[0])
    step = ops.server_step(case.global_, case.vectors, case.weights)
    torch.testing.assert_close(torch.stack(norms), step.norms.float())
    torch.testing.assert_close(torch.stack(cosines), step.cosines.float())


def test_distances_by_the_gram_matrix() -> None:
    vectors = bench_robust.make(7, 100)
    expected = ops.pairwise_distances(vectors).float()
    torch.testing.assert_close(bench_robust.gram_distances(vectors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_boxes(keep: bool) -> None:
    images, boxes = bench_boxes.inputs((5, 3, 17, 17))
    expected = ops.keep_boxes(images, boxes) if keep else ops.erase_boxes(images, boxes)
    assert 0 < (expected == 0).sum() < expected.numel()
    for found in (bench_boxes.loop(images, boxes, keep), bench_boxes.erase_masked(images, boxes, keep)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("block", [BasicBlock(4, 4), BasicBlock(4, 8, 2)])
def test_folded_modules(block: BasicBlock) -> None:
    for layer in block.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    block.eval()
    before, made = copy.deepcopy(block.state_dict()), baselines.fold_norms(block)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in made.modules())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(made(x), block(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
