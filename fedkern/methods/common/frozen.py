"""What frozen networks say of a client's samples, for methods whose loss compares the training network with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.methods.base import Batch, Received
from fedkern.models import precision


@torch.no_grad()
def remembered(name: str, batch: Batch, received: Received, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, one row per sample of the batch, without gradients.

    Where images do not change between epochs it is called in the first one only, and its rows are kept for the rest of
    the exchange; so it must be a frozen function of each sample.

    Args:
        name: tells apart what one loss remembers.
        batch: the batch; its ``indices`` are the rows.
        received: whose ``round_cache`` keeps them.
        compute: gives ``[B, ...]`` for ``batch.images``.
    """
    rows = torch.from_numpy(batch.indices)
    kept = received.round_cache.get(name)
    if kept is not None and batch.epoch > 0:
        return kept[rows.to(kept.device)]
    fresh = compute()
    if received.epochs > 1 and not batch.augmented and batch.epoch == 0:
        if kept is None:
            kept = received.round_cache[name] = fresh.new_empty(received.samples, *fresh.shape[1:])
        kept[rows.to(kept.device)] = fresh
    return fresh


def frozen_copy(model: nn.Module, vectors: Mapping[str, Tensor]) -> Any:
    """A copy of a frozen network, in the same mode, that holds other flat ``parameters`` and ``buffers``.

    Raises:
        ValueError: a vector has another size than the network's.
    """
    made = copy.deepcopy(model)
    if precision.lower() is not None:
        made.float()  # the received one's weights are cast already
    flat = ops.FlatParameters(made)
    flat.load_parameters(vectors["parameters"])
    if "buffers" in vectors:
        flat.load_buffers(vectors["buffers"])
    return precision.frozen(made.requires_grad_(False))
