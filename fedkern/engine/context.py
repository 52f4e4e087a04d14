"""Context that all clients and the server of a run share, their base class, and the run's warnings and notices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedkern.data.forms import ImageForm
from fedkern.data.sources.items import Items
from fedkern.data.types import FederatedData
from fedkern.engine.local.networks import ClientTeachers, Networks
from fedkern.engine.local.samples import Samples
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.errors import UserError
from fedkern.messages.leaves import move_to_device
from fedkern.messages.states import State
from fedkern.methods.base import Federation, Message, Phase
from fedkern.methods.roles import Client, Server
from fedkern.models.users.python_state import hash_attributes
from fedkern.ops._core.checks import to_float
from fedkern.privacy.guarantee import Disclosure
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks import Task
from fedkern.tasks.protocols import Description
from fedkern.usercode.code_identity import identity_table


class Notices:
    """Warnings and notices of a run.

    Attributes:
        warnings: texts by name; the first of each name counts.
        on_notice: called with the text of every notice, or None.
    """

    def __init__(self, disclosure: Disclosure, on_notice: Callable[[str], None] | None = None) -> None:
        self.disclosure, self.on_notice = disclosure, on_notice
        self.warnings: dict[str, str] = {}

    def warn(self, name: str, text: str) -> None:
        self.warnings.setdefault(name, text)

    def warn_all(self, texts: Mapping[str, str]) -> None:
        self.warnings |= {name: text for name, text in texts.items() if name not in self.warnings}

    def notice(self, text: str) -> None:
        if self.on_notice is not None:
            self.on_notice(text)


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
        changes = {name: (before.get(name), value) for name, value in held.items() if value != before.get(name)}
        names = [*{change: name for name, change in reversed(changes.items())}.values()][::-1]  # a shared object once
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


# The engine's own figures of a client.
TAKEN = ("clipped", "name", "samples", "seconds", "staleness", "update_norm")


class Node:
    """Base of :class:`~fedkern.engine.client.Client` and :class:`~fedkern.engine.server.Server`.

    A method that goes to worker processes may have kept a node or its function (``server.notice``). Only a node's
    context is pickled, so that in a worker a kept node shares the context of the worker's clients: it warns, gives
    notice and builds networks as they do.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.device = context.device
        self.task: Task = context.data.task
        self.classes: tuple[str, ...] = context.data.classes
        self.report: dict[str, float] = {}
        self.round_cache: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, RunContext]:
        # State, report and caches stay behind: a worker's changes to copies of them would be lost without a word.
        # In a worker they are an AttributeError.
        return {"_context": self._context}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._images().shape

    @property
    def mean(self) -> tuple[float, ...]:
        return self._images().scale(self._context.config.method)[0]

    @property
    def std(self) -> tuple[float, ...]:
        return self._images().scale(self._context.config.method)[1]

    def _images(self) -> ImageForm:
        form, method = self._context.data.form, self._context.config.method
        if "images" not in form.offers:
            raise UserError(f"{method} with these options needs images [C, H, W]; samples have {form.input_words()}.")
        images: ImageForm = form
        return images

    def noise(self, samples: int, rng: np.random.Generator) -> Any:
        return move_to_device(self._context.data.form.noise(samples, rng), self.device)

    @property
    def public(self) -> Any:
        return self._context.samples.public

    def notice(self, text: str) -> None:
        self._context.notices.notice(text)


def convert_figures(report: Mapping[str, object], owner: str, taken: Collection[str] = ()) -> dict[str, float]:
    """Return a report's figures as Python numbers."""
    numbers = {}
    for name, value in report.items():
        where = f'{owner}["{name}"]'
        if name in taken:
            raise UserError(f"{where} has a name of the engine's: choose one besides {', '.join(sorted(taken))}.")
        try:
            numbers[name] = value if isinstance(value, int) else to_float(value, where)
        except (TypeError, ValueError) as error:
            raise UserError(f"{error}: report a number, or leave it out.") from None
    return numbers
