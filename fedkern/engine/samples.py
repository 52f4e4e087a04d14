"""Access to the samples of a run in this process: clients, test sets, validation and public samples in batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, singledispatch
from typing import Any

import torch

from fedkern.data.images.pixels import CACHE_BYTES
from fedkern.data.sources.items import Items
from fedkern.data.types import AnySplit
from fedkern.engine.evaluate import client_sets, site_sets, test_sets
from fedkern.engine.images import Images
from fedkern.engine.item_sets import Trial
from fedkern.engine.items import ItemReader
from fedkern.engine.networks import Networks
from fedkern.engine.reader import BATCH, Reader
from fedkern.methods.protocol import Batch
from fedkern.settings.config import RunConfig

PREPARED = 1000
"""Most clients whose prepared images are kept in memory, where a round has few of them; else those of ten rounds."""


@singledispatch
def reader(split: AnySplit, form: Any, device: torch.device, *, seed: int, client: int = -1, **how: Any) -> Reader:
    """The batches of a split of any kind.

    Args:
        form: of the split's samples.
        seed: the run's.
        client: the client that trains on the split, or -1.
        how: of images ``augment``, ``cache`` and ``tokens``, see `Images`; ``size``, samples of a batch.
    """
    return Images(split, form, device, **how)


@reader.register
def _(split: Items, form: Any, device: torch.device, *, seed: int, client: int = -1, **how: Any) -> Reader:
    return ItemReader(split, device, seed=seed, client=client, size=how.get("size", BATCH))


class Samples:
    """The samples of a run.

    Args:
        config: the settings.
        data: federated data, or the outline of a finished run.
        device: where batches are.
        networks: their tokenizer reads texts.

    Attributes:
        cache: whether normalised images stay in memory.
    """

    def __init__(self, config: RunConfig, data: Any, device: torch.device, networks: Networks) -> None:
        self.config, self.data, self.device, self._networks = config, data, device, networks
        splits = [*data.clients, *data.tests.values(), *([data.public] if data.public is not None else [])]
        self.cache = sum(split.memory for split in splits) <= CACHE_BYTES
        self._clients: dict[int, Reader] = {}

    def tokens(self, split: Any) -> Any:
        """The tokens of a split's texts, on the CPU; None where there are no texts."""
        return split.task.tokens(split, lambda: self._networks.get("server").module.tokenize)

    @property
    def augment(self) -> str:
        """Augmentation of training batches."""
        return str(self.config.augment or self.data.form.augment)

    def reader(self, split: Any, **how: Any) -> Reader:
        """The batches of a split, see :func:`reader`."""
        tokens = self.tokens(split)
        batches = reader(split, self.data.form, self.device, seed=self.config.seed, tokens=tokens, **how)
        batches.output_bytes = len(split) * (self.config.output_bytes or 0)
        return batches

    def of_client(self, client: int) -> Any:
        """The batches of a client's training samples."""
        if client not in self._clients:
            split = self.data.clients[client]
            batches = self.reader(split, client=client, augment=self.augment, cache=self.cache)
            if not self.cache:
                self._clients.clear()  # one client's images at a time
            elif len(self._clients) >= max(PREPARED, 10 * self.config.sampled_clients):
                del self._clients[next(iter(self._clients))]
            self._clients[client] = batches
        return self._clients[client]

    @cached_property
    def public(self) -> Any:
        """The public split."""
        public = self.data.public
        if isinstance(public, Items):
            Trial(self.data, self.config.kind, self._networks.build).check_inputs(public)
        return None if public is None else self.reader(public, augment=self.augment, cache=self.cache)

    def validation(self) -> Iterator[Batch]:
        """The validation split in batches; none where it is empty."""
        if len(self.data.validation):
            yield from self.reader(self.data.validation).batches()

    @cached_property
    def test_sets(self) -> dict[str, Reader]:
        """See :func:`~fedkern.engine.evaluate.test_sets`."""
        return test_sets(self)

    @cached_property
    def client_sets(self) -> dict[int, Reader]:
        """See :func:`~fedkern.engine.evaluate.client_sets`."""
        return client_sets(self)

    @cached_property
    def site_sets(self) -> dict[int, Reader]:
        """See :func:`~fedkern.engine.evaluate.site_sets`."""
        return site_sets(self)
