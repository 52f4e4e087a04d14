"""Run context that all clients and the server of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedkern.data.sources.items import Items
from fedkern.data.types import FederatedData
from fedkern.engine.local.client_teachers import ClientTeachers
from fedkern.engine.local.networks import Networks
from fedkern.engine.local.samples import Samples
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.notices import Notices
from fedkern.messages.states import State
from fedkern.methods.base import Federation, Message, Phase
from fedkern.methods.roles import Client, Server
from fedkern.models.users.python_state import hash_attributes
from fedkern.privacy.disclosure import Disclosure
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks.protocols import Description
from fedkern.usercode.code_identity import identity_table


class RunContext:
    """Settings, samples, networks and notices that all clients and the server of a run share.

    Only settings, data and disclosure are pickled. Another process makes its own networks from them, and sets
    ``notices.on_notice``.

    Attributes:
        script: objects from a user's script; in another process without their network.
        code: identities of the user's code, by group.
        uploaded: every client's raw data, for a pooled method.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Any,
        on_notice: Callable[[str], None] | None = None,
        described: State | None = None,
        script: ScriptObjects = ScriptObjects(),
        code: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        self.config, self.script, self.code, self._described = config, script, code, described
        self.device = torch.device(torch.device(config.device).type)  # the current GPU's number applies (current_gpu)
        self._take(data)
        # Server warnings are open at first: before any upload they follow from the settings alone.
        self.notices = Notices(Disclosure(clients=config.records != "private"), on_notice)
        self.teachers = None if config.teachers is None else ClientTeachers(config.teachers)
        self.uploaded: list[Message] = []

    def _take(self, data: FederatedData) -> None:
        config, splits = self.config, data.clients
        self.data = data
        self.networks = Networks(config, data, self.device, lambda: self.task_facts)
        self.samples = Samples(config, data, self.device, self.networks)
        # The Outline of a finished run has no splits, only the sizes declared during the run.
        sizes = tuple(map(self._declare_size, splits)) if splits else data.client_sizes
        self.federation = Federation(
            rounds=config.rounds, samples=sizes, classes=len(data.classes), local_epochs=config.local_epochs,
            unit=config.unit, seed=config.seed,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Callable[..., RunContext], tuple[object, ...]]:
        return _copy_of, (self.config, self.data, self.task_facts, self.script, self.notices.disclosure)

    def _declare_size(self, split: Any) -> int:
        """Return the public number of samples of a client.

        With patients as the unit of privacy, only the number of patients and the largest number of images of a patient
        are public.
        """
        unit = self.config.unit
        return len(split) if unit.name == "image" else unit.images * len(np.unique(split.patients))

    def name_entry(self, client: int) -> dict[str, str]:
        """Return a training client's name as a record's entry, empty if clients have no names."""
        names = self.data.client_names
        return {} if names is None or self.data.client_label(client) == str(client) else {"name": names[client]}

    def pool(self) -> None:
        self.uploaded = [split.raw() for split in self.data.clients]
        self._take(self.data.pooled())

    def drawing(self, node: Client | Server, phase: Phase) -> AbstractContextManager[None]:
        """Seed global generators for a node's work in an exchange.

        User code may draw from them (dropout). Seeded from the node's own stream, they give bits that depend neither on
        the number of workers nor on interruptions.
        """
        built_in = self.config.kind.__module__.startswith("fedkern.") and not isinstance(self.data.validation, Items)
        if built_in and not self.script.functions and not self.networks.added_models:
            return nullcontext()
        return seeded_generators(int(node.rng("layers", phase).integers(2**63)), self.device)

    @cached_property
    def task_facts(self) -> Description:
        """Facts from which the task builds the network beside the settings, such as the clients' vocabulary."""
        return self.data.task.describe_network(self) if self._described is None else self._described

    def words(self) -> tuple[list[Message], Message] | None:
        """Return the clients' messages and the server's that make a shared vocabulary, or None."""
        return self.data.task.vocabulary_messages(self)

    def user_objects(self) -> dict[str, str]:
        """Return identities of the user's functions and objects that clients work with, without large values."""
        task, split = self.data.task, next(iter(self.data.clients), None)
        things = {
            "task": None if type(task).__module__.startswith("fedkern.") else task,
            getattr(task, "loss_name", "loss_fn"): getattr(task, "loss_code", None),
            "collate_fn": getattr(split, "collate", None),
            "train": self.script.train, "optimizer": self.script.optimizer,
        }  # fmt: skip
        given = {name: thing for name, thing in things.items() if thing is not None}
        return identity_table(given, limit=1 << 14, local=True)

    def tell_attributes(self, client: Client, objects: dict[str, str]) -> None:
        """Warn, in a client's name, of Python state that has changed since this process began."""
        local, current = self.networks.slots.get(("local", 0)), self.user_objects()
        before, held = ({}, {}) if local is None else (local.attributes, hash_attributes(local.module))
        names = [name for name in held if held[name] != before.get(name)]
        paths = sorted(path for path in {*objects, *current} if objects.get(path) != current.get(path))
        if names or paths:
            parts = [f"The network changes {', '.join(names)} as it runs"] if names else []
            parts += [f"{'c' if names else 'C'}lients change {', '.join(paths[:3])} as they work"] if paths else []
            client.warn(
                "python-state",
                f"{', '.join(parts)}, and a client finds what another client of its process has left there: the same "
                "bits are promised neither for another number of workers nor after --resume; keep such state in a "
                f"registered buffer{' of the network, or in client.state' if paths else ''}.",
            )


def _copy_of(
    config: RunConfig, data: FederatedData, described: State, script: ScriptObjects, disclosure: Disclosure
) -> RunContext:
    context = RunContext(config, data, described=described, script=script)
    context.notices.disclosure = disclosure
    return context
