"""Settings of the data: data set, amount, and partition over clients."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedkern.data import AUGMENTATIONS, DATASETS
from fedkern.data.dataset_registry import data_names
from fedkern.errors import UserError
from fedkern.files.filesystem import absolute
from fedkern.settings.defaults import COMMON
from fedkern.settings.section import OF_METHOD, Section
from fedkern.typed_option import option
from fedkern.usercode import named_code
from fedkern.usercode.named_code import FORMS

DATA_DEPENDENT = ("partition", "clients", "client_test")
"""Settings with defaults that the data may decide: named sites are the clients, and may have test sets."""
PARTS = {"backdoor_target": "backdoor_clients", "backdoor_size": "backdoor_clients", "cue_size": "cue_clients"}
"""Data options without effect unless another is given."""


@dataclass(frozen=True)
class DataSettings(Section):
    """Settings of the data.

    ``unset`` names the settings of `DATA_DEPENDENT` that nobody gave, ``asked`` the settings that the user gave and the
    run must use, ``common`` the settings that a comparison gives to all its methods (None in a single run).
    """

    data: str = option(
        COMMON["data"], lambda: f"data set: {', '.join(data_names())}, {FORMS}", path=named_code.absolute
    )
    data_root: str | None = option(None, "folder of the data files", path=absolute)
    cache: str | None = option(
        None, "folder that keeps decoded images of image files, for later and parallel runs", path=absolute
    )
    keep_items: str = option(
        "auto", "keep items of PyTorch data sets in memory: auto (if they never change and fit into 1 GB), memory (of "
        "any size, else fail), off (read them for every batch)", choices=("auto", "memory", "off"),
    )  # fmt: skip
    train_samples: int | None = option(None, "number of training samples to use instead of all", low=1)
    public_samples: int = option(
        0, "number of public training samples, drawn before the partition; no client owns them", low=0
    )
    partition: str | None = option(
        None,
        "split of the samples over clients: iid, stratified, dirichlet:ALPHA, classes:S, quantity:ALPHA, "
        "domain:LAMBDA, attribute (the default if the data name sites)",
    )
    clients: int = option(
        DATASETS[COMMON["data"]].clients, "number of clients; data that name sites have one client a site", low=1
    )
    correlation: float | None = option(None, "how strongly the background colour predicts the class", low=0, high=1)
    held_out_client: str | None = option(
        None, "name or number of a client that never trains; its data become the test set held_out"
    )
    client_test: float = option(
        COMMON["client_test"], "fraction of every client's samples for its own test set; 0: as in the data set",
        low=0, high=0.9,
    )  # fmt: skip
    augment: str | None = option(
        None, "augmentation of training images instead of the data set's", choices=tuple(AUGMENTATIONS)
    )
    data_options: Mapping[str, Any] = field(default_factory=dict)
    unset: frozenset[str] = field(default=frozenset(), compare=False)
    asked: frozenset[str] = field(default=frozenset(), compare=False)
    common: frozenset[str] | None = field(default=None, compare=False)

    def check(self) -> None:
        super().check()
        for name, parent in PARTS.items():
            if name in self.data_options and not self.data_options.get(parent):
                raise UserError(f"Data option {name} has no effect without {parent}: give that too, or leave it out.")

    def replace(self, **settings: Any) -> Self:
        """Return a copy with some settings changed and thereby set, without conversion or checks."""
        copy = dataclasses.replace(self, **{"unset": self.unset - set(settings), **settings})
        if {"method", "options"}.isdisjoint(settings):
            vars(copy).update({name: vars(self)[name] for name in OF_METHOD if name in vars(self)})
        return copy

    @property
    def trained_clients(self) -> int:
        return self.clients - (self.held_out_client is not None)
