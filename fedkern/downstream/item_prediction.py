"""Outputs of a finished run's network for samples that are no images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.data import FederatedData
from fedkern.data.sources.datasets import is_dataset, items_like
from fedkern.data.sources.items import name_cause
from fedkern.engine.batches.item_batches import ItemReader
from fedkern.errors import RAISED, UserError
from fedkern.messages.leaves import Keywords, Positional, join_batches, map_leaves, move_to_device
from fedkern.process.torch_modes import reproducible


@reproducible()
@torch.no_grad()
def outputs(module: nn.Module, data: FederatedData, samples: object, size: int) -> object:
    """Return the network's outputs on the CPU: class probabilities, or all outputs of a user-defined task.

    Args:
        samples: a map-style data set, or a network's inputs: a tensor, a tuple of them, or a dict by argument.
        size: batch size of a data set.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = module.to(device).eval()

    def answer(inputs: object) -> Any:
        try:
            return map_leaves(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, module(inputs))
        except RAISED as error:  # the user's own network may raise anything
            raise UserError(f"the network fails on the samples ({name_cause(error)}).") from error

    if is_dataset(samples):
        reader = ItemReader(items_like(data.clients[0], samples, "the samples"), device, seed=0, size=size)
        pairs = [(answer(inputs), count) for inputs, count in _inputs(reader, data)]
        results = join_batches([answer_part for answer_part, _ in pairs], [count for _, count in pairs])
    else:
        inputs = Positional(samples) if isinstance(samples, tuple) else samples
        results = answer(move_to_device(Keywords(inputs) if isinstance(inputs, Mapping) else inputs, device))
    return data.task.probabilities(results) if "classes" in data.offers else results


def _inputs(reader: ItemReader, data: FederatedData) -> Iterator[tuple[object, int]]:
    takes = 0 if data.form.inputs is None else len(data.form.inputs["args"])
    for batch in reader.batches():
        inputs_only = isinstance(batch.data, (tuple, list)) and len(batch.data) == takes > 1
        yield Positional(batch.data) if inputs_only else batch.inputs, len(batch.indices)
