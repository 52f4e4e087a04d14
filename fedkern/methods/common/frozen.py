"""Cached outputs and copies of frozen networks, for losses that compare with a frozen network."""

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.methods.protocol import Batch, Received
from fedkern.models import precision
from fedkern.models.state import freezing
from fedkern.process.device_copies import send

N = TypeVar("N", bound=nn.Module)
CACHE_BYTES = 1 << 30
"""Rows beyond this size are not cached."""


@torch.no_grad()
def cached_rows(
    name: str, batch: Batch, received: Received, compute: Callable[[], Tensor], network: nn.Module | None = None
) -> Tensor:
    """Return ``compute()`` without gradients, a row per sample, cached over the epochs of the exchange.

    Without augmentation ``compute`` runs in the first epoch only, so it must be a function of each sample; for batch
    norms that normalise by the batch (``--buffers drop``) it runs every time.
    """
    if batch.fresh or received.epochs == 1:
        return compute()
    indices = torch.from_numpy(batch.indices)
    cache = received.round_cache.get(name)
    if cache is not None and batch.epoch > 0:
        rows: Tensor = cache.index_select(0, send(indices, cache.device))
        return rows.movedim(-1, 1) if rows.dim() == 4 else rows
    fresh = compute()
    if batch.epoch == 0 and not normalises_by_batch(received.model if network is None else network):
        rows = fresh.movedim(1, -1) if fresh.dim() == 4 else fresh
        if cache is None and received.samples * rows[0].numel() * rows.element_size() <= CACHE_BYTES:
            cache = received.round_cache[name] = rows.new_empty(received.samples, *rows.shape[1:])
        if cache is not None:
            cache[send(indices, cache.device)] = rows
    return fresh


def normalises_by_batch(model: nn.Module) -> bool:
    """Return whether a batch norm has no running statistics, so that outputs depend on the batch."""
    return any(isinstance(layer, _BatchNorm) and layer.training for layer in model.modules())


def frozen_copy(model: N, vectors: Mapping[str, Tensor]) -> N:
    """Return a copy of a frozen network, in the same mode, with other vectors."""
    network = copy.deepcopy(model)
    if precision.reduced_dtype() is not None:
        network.float()  # the received network's weights are already in lower precision
    modes = [(layer, layer.training) for layer in network.modules()]
    network.train()
    if not any(tensor.requires_grad for tensor in model.parameters()):
        network.requires_grad_(False)  # a user's train() may thaw parts, which would change the offsets
    freezing.flatten(network).load_vectors(vectors)
    network.eval()  # a user's module may derive tensors from its weights there
    for layer, training in modes:
        layer.training = training
    return precision.cast_frozen(network.requires_grad_(False))
