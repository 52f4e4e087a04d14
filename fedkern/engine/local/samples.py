"""Samples of a run in this process, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, singledispatch
from operator import attrgetter
from typing import Any

import torch

from fedkern.data.images.pixels import CACHE_BYTES
from fedkern.data.sources.items import Items
from fedkern.data.types import AnySplit, FederatedData
from fedkern.engine.batches.images import Images
from fedkern.engine.batches.item_batches import ItemReader
from fedkern.engine.batches.reader import BATCH, Reader
from fedkern.engine.evaluate import batch_size, compared_alike, sets_by_prefix
from fedkern.engine.local.item_sets import Trial
from fedkern.engine.local.networks import Networks
from fedkern.methods.protocol import Batch
from fedkern.settings.config import RunConfig
from fedkern.tasks.registered_metrics import metrics_of

PREPARED = 1000
"""Most clients whose prepared images stay in memory, or else those of ten rounds."""


@singledispatch
def reader(split: AnySplit, form: Any, device: torch.device, *, seed: int, client: int = -1, **how: Any) -> Reader:
    """Return the batches of a split of any kind, by a reader with arguments ``how``."""
    return Images(split, form, device, **how)


@reader.register
def _(split: Items, form: object, device: torch.device, *, seed: int, client: int = -1, **how: Any) -> Reader:
    return ItemReader(split, device, seed=seed, client=client, size=how.get("size", BATCH))


class Samples:
    """The samples of a run."""

    def __init__(self, config: RunConfig, data: FederatedData, device: torch.device, networks: Networks) -> None:
        self.config, self.data, self.device, self._networks = config, data, device, networks
        splits = [*data.clients, *data.tests.values(), *([data.public] if data.public is not None else [])]
        self.cache = sum(split.memory for split in splits) <= CACHE_BYTES
        self._clients: dict[int, Reader] = {}

    def tokens(self, split: AnySplit) -> Any:
        return split.task.tokens(split, lambda: attrgetter("module.tokenize")(self._networks.get("server")))

    @property
    def augment(self) -> str:
        return str(self.config.augment or self.data.form.augment)

    def reader(self, split: AnySplit, **how: Any) -> Reader:
        tokens = self.tokens(split)
        batches = reader(split, self.data.form, self.device, seed=self.config.seed, tokens=tokens, **how)
        batches.output_bytes = len(split) * (self.config.output_bytes or 0)
        return batches

    def of_client(self, client: int) -> Reader:
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
    def public(self) -> Reader | None:
        public = self.data.public
        if isinstance(public, Items):
            Trial(self.data, self.config.kind, self._networks.build).check_inputs(public)
        return None if public is None else self.reader(public, augment=self.augment, cache=self.cache)

    def validation(self) -> Iterator[Batch]:
        if len(self.data.validation):
            yield from self.reader(self.data.validation).batches()

    @cached_property
    def test_sets(self) -> dict[str, Reader]:
        """Test sets by metric prefix (``""``, ``"id_"``, ``"ood_"``), and ``"validation_"``."""
        sets = {prefix: self._test_set(split) for prefix, split in sets_by_prefix(self.data).items()}
        for reader in sets.values():
            reader.metrics = metrics_of(self.config.plugins)
        return sets

    @cached_property
    def client_sets(self) -> dict[int, Reader]:
        return compared_alike({k: self._test_set(split) for k, split in enumerate(self.data.client_tests)})

    @cached_property
    def site_sets(self) -> dict[int, Reader]:
        """Every client's part of the run's test set, if the test images name their sites.

        Clients with fewer than two images, or without a pixel of known class, are left out.
        """
        test = self.data.tests.get("")
        if test is None or test.homes is None or self.data.client_names is None:
            return {}
        homes = test.homes
        parts = {k: test.subset((homes == k).nonzero().flatten()) for k in range(len(self.data.client_names))}
        fit = {k: split for k, split in parts.items() if len(split) > 1 and not split.task.unfit(split)}
        return compared_alike({k: self._test_set(split) for k, split in fit.items()})

    def _test_set(self, split: AnySplit) -> Reader:
        return self.reader(split, size=batch_size(self.device, self.config.statistics), cache=self.cache)
