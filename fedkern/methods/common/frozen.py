"""Cached outputs and copies of frozen networks, for losses that compare the training network with a frozen one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.methods.protocol import Batch, Received
from fedkern.models import personal, precision
from fedkern.models.transfer import send


@torch.no_grad()
def cached_rows(name: str, batch: Batch, received: Received, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()`` without gradients, cached over the epochs of the exchange.

    One row per sample of the batch.

    If images are not augmented, ``compute`` runs in the first epoch only, and later epochs read the cached rows.  So
    ``compute`` must be a frozen function of each sample, where batch norm of the received network reads running
    statistics.  Where there are none (``--buffers drop``), it runs for every batch.

    Args:
        name: cache key, unique within a loss.
        batch: the batch; its ``indices`` are the rows of the cache.
        received: its ``round_cache`` holds the cache.
        compute: returns ``[B, ...]`` for ``batch.inputs``.
    """
    rows = torch.from_numpy(batch.indices)
    cache = received.round_cache.get(name)
    if cache is not None and batch.epoch > 0:
        return cache.index_select(0, send(rows, cache.device))
    fresh = compute()
    if received.epochs > 1 and not batch.fresh and batch.epoch == 0 and not normalises_by_batch(received.model):
        if cache is None:
            cache = received.round_cache[name] = fresh.new_empty(received.samples, *fresh.shape[1:])
        cache[send(rows, cache.device)] = fresh
    return fresh


def normalises_by_batch(model: nn.Module) -> bool:
    """Whether an output of a frozen network depends on the batch: a batch norm has no running statistics to read."""
    return any(isinstance(layer, _BatchNorm) and layer.training for layer in model.modules())


def frozen_copy(model: nn.Module, vectors: Mapping[str, Tensor]) -> Any:
    """A copy of a frozen network, in the same mode, with other flat vectors.

    Raises:
        ValueError: a vector's size differs from the network's.
    """
    network = copy.deepcopy(model)
    if precision.lower() is not None:
        network.float()  # the received network's weights are already in lower precision
    modes = [(layer, layer.training) for layer in network.modules()]
    network.train()
    if not any(tensor.requires_grad for tensor in model.parameters()):
        network.requires_grad_(False)  # a user's train() may thaw parts, whose places would be others
    personal.flatten(network).load_vectors(vectors)
    network.eval()  # a user's module may derive tensors from its weights there
    for layer, training in modes:
        layer.training = training
    return precision.frozen(network.requires_grad_(False))
