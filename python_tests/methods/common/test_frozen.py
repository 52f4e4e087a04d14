"""Frozen networks: cached_rows, and copies."""

import types

import numpy as np
import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.engine.local.network import Network
from fedkern.methods import Batch, Phase
from fedkern.methods.common.frozen import cached_rows, frozen_copy

PHASE = Phase(0, "train", "update")


def network(seed):
    return models.build("cnn", classes=3, channels=3, image_size=16, seed=seed, width=4)


@pytest.mark.parametrize(
    ("epochs", "augmented", "statistics", "calls"),
    [(3, False, True, 2), (3, True, True, 6), (1, False, True, 2), (3, False, False, 6)],
)
def test_rows_are_kept_over_epochs_where_they_stay_the_same(epochs, augmented, statistics, calls):
    values, asked = torch.randn(5, 2), []
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=statistics)).train(not statistics)
    received = types.SimpleNamespace(round_cache={}, samples=5, epochs=epochs, model=model)
    for epoch in range(epochs):
        for rows in ([3, 1, 4], [0, 2]) if epoch == 0 else ([0, 4], [1, 2, 3]):
            rows = np.array(rows)
            images = torch.zeros(len(rows), 1, 1, 1)
            batch = Batch(images, torch.zeros(len(rows), dtype=torch.int64), rows, PHASE, epoch, augmented)

            def compute(rows=rows):
                asked.append(rows)
                return values[rows].requires_grad_().clone()

            got = cached_rows("features", batch, received, compute)
            assert torch.equal(got, values[rows])
            assert not got.requires_grad
    assert len(asked) == calls


def test_a_copy_holds_the_other_vectors_and_leaves_the_original_alone():
    original, second = (Network(network(seed), torch.device("cpu")) for seed in (1, 2))
    second.buffers.add_(torch.rand_like(second.buffers))
    original.freeze()
    original.eval_mode()
    images = torch.randn(4, 3, 16, 16)
    before = original.module(images).clone()
    made = frozen_copy(original.module, second.read())
    second.eval_mode()
    assert torch.equal(made(images), second.module(images))
    assert torch.equal(original.module(images), before)
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())


def test_without_buffers_the_copy_keeps_the_originals():
    original, second = (Network(network(seed), torch.device("cpu")) for seed in (1, 2))
    for buffer in original.module.buffers():
        buffer.add_(1)
    made = frozen_copy(original.module, {"parameters": second.parameters})
    assert torch.equal(Network(made, torch.device("cpu")).buffers, original.buffers)
