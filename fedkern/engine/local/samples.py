"""Samples of a run in this process, in batches, and trials of the first batches of a user's items."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, singledispatch
from itertools import pairwise
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from fedkern.data.forms import in_words
from fedkern.data.images.pixels import CACHE_BYTES
from fedkern.data.sources.datasets import stated_targets
from fedkern.data.sources.items import Items, name_cause
from fedkern.data.types import AnySplit, FederatedData
from fedkern.engine.batches.images import Images
from fedkern.engine.batches.reader import BATCH, ItemReader, Reader, trial_batch
from fedkern.engine.evaluate import batch_size, compared_alike, sets_by_prefix
from fedkern.engine.local.first_steps import is_shipped
from fedkern.engine.local.networks import Networks
from fedkern.errors import RAISED, UserError
from fedkern.messages.leaves import map_leaves
from fedkern.methods.protocol import Batch
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks.figure_names import metrics_of
from fedkern.tasks.user_tasks import INTEGERS

MODES = {
    "training": ((True, True), (False, True)),
    "evaluation": ((False, False), (False, True)),
    "inputs": ((False, False), (False, True)),
}
"""Training mode and gradients of a network's calls, by purpose."""
CLIENT_HOOKS, SERVER_HOOKS = ("client_update", "loss"), ("evaluate", "evaluate_own")
"""Functions of a method that may change a batch before the network, in training and in evaluation."""


class Trial:
    """Trial of unusual batches of a federation's sets on an untrained network."""

    def __init__(self, data: FederatedData, kind: type, build: Callable[[], nn.Module]) -> None:
        self._data, self._task, self._kind, self._build, self._client = data, data.task, kind, build, data.clients[0]
        self._offers, self._has_figures = data.task.offers, not data.task.code()  # built-in figures draw nothing
        self._stated: dict[int, Tensor | None] = {}
        self._rows = range(min(2, len(self._client)))
        self._usual = trial_batch(self._client, self._rows)

    def check_clients(self, batch_size: int) -> None:
        for split in self._data.clients if self._ships(CLIENT_HOOKS) else ():
            self._check(split, "training", batch_size)

    def check_tests(self) -> None:
        """Check the first items of all test and validation sets, and their classes if the sets state them."""
        sets = [self._data.validation, *(self._data.client_tests or self._data.tests.values())]
        for split in sets if self._ships(SERVER_HOOKS) else ():
            self._check(split, "evaluation", BATCH)

    def check_inputs(self, split: Items) -> None:
        if "criterion" in self._offers and self._ships(CLIENT_HOOKS + SERVER_HOOKS):
            self._check(split, "inputs", BATCH)

    def _ships(self, hooks: Sequence[str]) -> bool:
        return all(is_shipped(getattr(self._kind, name, self._kind)) for name in hooks)

    def _check(self, split: Items, purpose: str, size: int) -> None:
        concatenated = type(split.dataset) is ConcatDataset and split.rows is None
        ends = split.dataset.cumulative_sizes if concatenated else [len(split)]
        has_classes = purpose != "inputs" and self._range is not None
        stated = self._targets(split, None) if has_classes else None
        for rows in (range(start, min(start + size, end)) for start, end in pairwise([0, *ends]) if start < end):
            batches = trial_batch(split, rows[:2]), self._usual
            words = [
                str(map_leaves(in_words, batch.inputs if purpose == "inputs" else batch.data)).replace("'", "")
                for batch in batches
            ]
            if words[0] != words[1]:
                odd = f"A batch of {split.name} is {words[0]}, not {words[1]} as that of {self._client.name}"
                self._try(split, purpose, (rows[:2], rows), odd, "give all sets one form")
            if has_classes and stated is None:
                self._check_classes(split, purpose, self._targets(split, batches[0].targets), rows)
            if rows[0]:
                trial_batch(split, (rows[0] - 1, rows[0]))  # one batch with items of two sets
        self._check_classes(split, purpose, stated, range(len(split)))

    def _check_classes(self, split: Items, purpose: str, targets: Tensor | None, rows: Sequence[int]) -> None:
        if targets is None or not targets.numel() or not self._range:
            return
        low, high = int(targets.min()), int(targets.max())
        size = targets.numel() // len(targets)
        ends = [rows[int(targets.argmin()) // size], rows[int(targets.argmax()) // size]]
        if low < self._range[0] or high > self._range[1] or split is self._client:
            usual = f", not {self._range[0]} to {self._range[1]}" if (low, high) != self._range else ""
            odd = f"The classes of {split.name} are {low} to {high}{usual}"
            self._try(split, purpose, (ends,), odd, "number classes from 0, and give the network as many outputs")

    @cached_property
    def _range(self) -> tuple[int, int] | None:
        if "classes" in self._offers:
            return 0, len(self._data.classes) - 1
        by_class = "criterion" in self._offers and is_shipped(getattr(self._task, "loss_code", None))
        targets = self._targets(self._client, self._usual.targets) if by_class else None
        return None if targets is None else (int(targets.min()), int(targets.max()))

    @cached_property
    def _network(self) -> nn.Module:
        return self._build()

    def _targets(self, split: Items, seen: object) -> Tensor | None:
        """Return the classes that a set states, or else those of its first items, if any, with 0 for ignored ones."""
        if (targets := stated_targets(split.dataset, self._stated)) is not None and split.rows is not None:
            targets = targets[split.rows]
        if targets is None and isinstance(seen, Tensor) and seen.dtype in INTEGERS and seen.dim():
            targets = seen.long()
        return None if targets is None else targets.masked_fill(targets == getattr(self._task, "ignored", -100), 0)

    def _try(self, split: Items, purpose: str, attempts: Sequence[Sequence[int]], odd: str, way: str) -> None:
        errors = [self._failure(split, purpose, rows) for rows in attempts]
        if (error := errors[0]) and None not in errors and not self._failure(self._client, purpose, self._rows):
            raise UserError(f"{odd}, and the network or its loss fails there ({name_cause(error)}): {way}.") from error

    def _failure(self, split: Items, purpose: str, rows: Sequence[int]) -> BaseException | None:
        failures: list[BaseException] = []
        for training, gradients in MODES[purpose]:
            try:
                batch = trial_batch(split, rows)
                self._network.train(training)
                with seeded_generators(0), torch.set_grad_enabled(gradients), warnings.catch_warnings():
                    warnings.filterwarnings("error", "Using a target size")  # torch takes outputs [n, 1] with [n]
                    if purpose == "inputs":
                        self._network(batch.inputs)
                    elif purpose == "evaluation" and self._has_figures:
                        self._task.figures(self._network, SimpleNamespace(batches=lambda batch=batch: iter([batch])))
                    else:
                        loss = self._task.with_loss_copied().loss(self._network, batch)
                        if purpose == "training":
                            loss.backward()
                return None
            except RAISED as error:  # of users' code
                failures.append(error)
        return failures[0]


def check_test_sets(data: FederatedData) -> dict[str, str]:
    """Return a warning about a test set that is also the data set of a listed client."""
    holders: dict[int, list[Items]] = {}
    for split in data.clients:
        holders.setdefault(id(split.dataset), []).append(split)
    for test in (*data.client_tests, *data.tests.values()):
        for client in holders.get(id(test.dataset), ()):
            if test.rows is None or client.rows is None or bool(torch.isin(test.rows, client.rows).any()):
                text = (
                    f"{test.name[:1].upper()}{test.name[1:]} is the data set that {client.name} trains on: give "
                    "test=DATASET of other samples, such as a part of torch.utils.data.random_split."
                )
                if data.client_names is not None:
                    raise UserError(text)
                return {"tested-on-training": text}
    return {}


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

    @property
    def augment(self) -> str:
        return str(self.config.augment or self.data.form.augment)

    def reader(self, split: AnySplit, **how: Any) -> Reader:
        tokens = split.task.tokens(split, lambda: attrgetter("module.tokenize")(self._networks.get("server")))
        batches = reader(split, self.data.form, self.device, seed=self.config.seed, tokens=tokens, **how)
        batches.output_bytes = len(split) * (self.config.output_bytes or 0)
        return batches

    def of_client(self, client: int) -> Reader:
        if client not in self._clients:
            if not self.cache:
                self._clients.clear()  # one client's images at a time
            elif len(self._clients) >= max(PREPARED, 10 * self.config.sampled_clients):
                del self._clients[next(iter(self._clients))]
            split = self.data.clients[client]
            self._clients[client] = self.reader(split, client=client, augment=self.augment, cache=self.cache)
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
        if (test := self.data.tests.get("")) is None or test.homes is None or self.data.client_names is None:
            return {}
        parts = {k: test.subset((test.homes == k).nonzero().flatten()) for k in range(len(self.data.client_names))}
        fit = {k: split for k, split in parts.items() if len(split) > 1 and not split.task.unfit(split)}
        return compared_alike({k: self._test_set(split) for k, split in fit.items()})

    def _test_set(self, split: AnySplit) -> Reader:
        return self.reader(split, size=batch_size(self.device, self.config.statistics), cache=self.cache)
