"""Trials of the first batches of a user's items, before a run begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from fedkern.data.forms import in_words
from fedkern.data.sources.datasets import stated_targets
from fedkern.data.sources.items import Items, name_cause
from fedkern.data.types import FederatedData
from fedkern.engine.batches.item_batches import trial_batch
from fedkern.engine.batches.reader import BATCH
from fedkern.engine.local.first_steps import is_shipped
from fedkern.errors import RAISED, UserError
from fedkern.messages.leaves import map_leaves
from fedkern.streams import seeded_generators
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
        targets = stated_targets(split.dataset, self._stated)
        if targets is not None and split.rows is not None:
            targets = targets[split.rows]
        if targets is None and isinstance(seen, Tensor) and seen.dtype in INTEGERS and seen.dim():
            targets = seen.long()
        ignored = getattr(self._task, "ignored", -100)
        return None if targets is None else targets.masked_fill(targets == ignored, 0)

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
