"""RunContext: what all clients and the server of a run share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, singledispatch
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern import models
from fedkern.data.images.pixels import CACHE_BYTES
from fedkern.data.sources.items import Items
from fedkern.data.types import AnySplit
from fedkern.deferred.calls import apply_plan
from fedkern.engine import initial_weights
from fedkern.engine.captured import Graphs
from fedkern.engine.client_teachers import ClientTeachers
from fedkern.engine.evaluate import client_sets, site_sets, test_sets
from fedkern.engine.first_steps import FirstSteps
from fedkern.engine.images import Images
from fedkern.engine.item_sets import Trial
from fedkern.engine.items import ItemReader
from fedkern.engine.network import Network, place
from fedkern.engine.on_device import OnDevice
from fedkern.engine.reader import BATCH, Reader
from fedkern.engine.script_objects import ScriptObjects
from fedkern.methods.base import VECTORS, Federation, Message, Phase
from fedkern.methods.protocol import Batch
from fedkern.models import personal
from fedkern.models.freezing import freeze
from fedkern.models.hooked import find_taps
from fedkern.models.precision import frozen
from fedkern.models.python_state import attributes
from fedkern.models.registry import added, check_gives
from fedkern.models.weight_files import load_by_name
from fedkern.privacy.disclosure import Disclosure
from fedkern.settings.config import RunConfig
from fedkern.streams import seeded_generators
from fedkern.tasks.user_tasks import inner
from fedkern.usercode.identity import identity_table


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


PREPARED = 1000
"""Most clients whose prepared images are kept in memory, where a round has few of them; else those of ten rounds."""


class RunContext:
    """What all clients and the server of a run share: settings, data, three networks, named warnings.

    One network trains, one is the frozen global copy, one is the server's; each is made on first use and reused.

    Pickled are the settings, the data and the disclosure.  Another process makes a context of its own from them, with
    its own networks, and sets ``on_notice``.

    Attributes:
        unfit: a sentence on what of ``--init`` the network has not taken.
        script: the objects that a script gives; in another process without its network.
        code: identities of the code that a script gives, by group.
        on_notice: called with the text of every notice; None: nobody listens.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Any,
        on_notice: Callable[[str], None] | None = None,
        described: dict[str, Any] | None = None,
        script: ScriptObjects = ScriptObjects(),
        code: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        self.config, self.data = config, data
        self.on_notice = on_notice
        self.device = torch.device(torch.device(config.device).type)  # its number is the current one (current_gpu)
        self.federation = self._federation()
        splits = [*data.clients, *data.tests.values(), *([data.public] if data.public is not None else [])]
        self.cache = sum(split.memory for split in splits) <= CACHE_BYTES
        self.warnings: dict[str, str] = {}
        # Server warnings are open at first: before anything is received they follow from the settings alone.
        self.disclosure = Disclosure(clients=config.records != "private")
        self._placed: OnDevice | None = None
        self._clients: dict[int, Reader] = {}
        self._frozen: tuple[list[Any], Any] = [], None  # the vectors of a frozen network, and the network
        self._initial_buffers: Message | None = None
        self._described, self.script, self.code = described, script, code
        self.unfit = ""
        self.teachers = None if config.teachers is None else ClientTeachers(config.teachers)
        self.uploaded: list[Message] = []  # every client's raw data, for a pooled method

    def __reduce__(self) -> tuple[Any, ...]:
        return RunContext, (self.config, self.data, None, self.described, self.script), {"disclosure": self.disclosure}

    def _federation(self) -> Federation:
        splits = self.data.clients
        return Federation(
            rounds=self.config.rounds,
            # The Outline of a finished run has no splits, only the sizes that were declared during the run.
            samples=tuple(map(self.declared, splits)) if splits else self.data.client_sizes,
            classes=len(self.data.classes),
            local_epochs=self.config.local_epochs,
            unit=self.config.unit,
            seed=self.config.seed,
        )

    def declared(self, split: Any) -> int:
        """Number of samples of a client, as everybody may know it.

        With patients as the unit of privacy, the number of a patient's images is as private as the images.  Only the
        number of patients and the largest number of images of a patient are public.
        """
        unit = self.config.unit
        return len(split) if unit.name == "image" else unit.images * len(np.unique(split.patients))

    def named(self, client: int) -> dict[str, str]:
        """A training client's name as an entry of a record; empty where clients have none."""
        return {"name": self.data.client_names[client]} if self.data.client_label(client) != str(client) else {}

    def pool(self) -> None:
        """Puts the data of all clients together, for a method that is not federated."""
        self.uploaded = [split.raw() for split in self.data.clients]
        self.data = self.data.pooled()
        self.federation = self._federation()

    def build(
        self, *, model: str | None = None, width: int | None = None, classes: int | None = None, seed: int | None = None
    ) -> nn.Module:
        """A freshly initialised network on the CPU, from the run's seed (always the same network) or another ``seed``.

        With ``--init`` the run's own network has the weights of that file or run, whatever the seed.

        Raises:
            UserError: there is no network ``model``, it is for another task, or the file does not fit it.
        """
        network: Any = self._built(model, width, classes, seed)
        if model not in (None, self.config.model):
            return network
        if self.config.init is not None and classes is None:
            partial = self.config.init_partial
            self.unfit = load_by_name(network, self._initial_weights, self.config.init, self.model_name, partial)
        if self.config.features or self.config.stages:
            kind, *taps = self._taps  # first: only a user's network, which they are for, has a module
            network = kind(network.module, *taps)
        if self.config.plan is not None:
            apply_plan(inner(network), self.config.plan)
        if self.config.freeze is not None:
            freeze(inner(network), self.config.freeze.split(","), self.model_name)
        if self.config.keeps_parts:
            personal.keep(inner(network), self._personal(network), self.model_name)
        return network

    def _personal(self, network: Any) -> list[str]:
        """Names, or patterns of them, of what every client keeps to itself."""
        if self.config.personal is not None:
            return self.config.personal.split(",")
        head = getattr(network, "head", None)  # not known of a user's network before its first samples
        return [f"{name}.*" for name, each in inner(network).named_modules() if each is head]

    @cached_property
    def _initial_weights(self) -> Mapping[str, Tensor]:
        """Weights of the file or run that ``--init`` names."""
        return initial_weights.read(str(self.config.init), self.config.init_sha256)

    @cached_property
    def _taps(self) -> tuple[Any, ...]:
        """Where ``--features`` and ``--stages`` take the results of the run's network."""
        stages = [name.strip() for name in (self.config.stages or "").split(",") if name.strip()]
        network = self._built(None, None, None, None)
        return find_taps(network, stages, self.config.features, self.data.form, self.model_name)

    def _built(self, model: str | None, width: int | None, classes: int | None, seed: int | None) -> Any:
        seed = self.config.seed if seed is None else seed
        if model is not None:  # the run's own network was checked before
            check_gives(model, self.data.task.network, self.config.data, "in the method option that names it")
        same_model = model is None or model == self.config.model
        about = {
            "model": self.config.model if model is None else model,
            "classes": self.federation.classes if classes is None else classes,
            "width": self.config.width if width is None and same_model else width,
            **(self.described if model is None else {}),
        }
        return self.data.form.build(self.data.task, about, seed)

    @cached_property
    def added_models(self) -> tuple[models.ModelEntry, ...]:
        """The networks that the settings name and that are not fedkern's."""
        return added(" ".join(map(str, (self.config.model, *self.config.options.values()))))

    @property
    def placed(self) -> OnDevice:
        """What this process has on the run's device."""
        if self._placed is None:
            self._placed = OnDevice(self.device, self.build)
        return self._placed

    @property
    def graphs(self) -> Graphs | None:
        """Recorded steps of local training, those of the lane; None on the CPU."""
        return self.placed.recorded()

    def first_steps(self, phase: Phase) -> FirstSteps:
        """Return the watch over this process's first steps of an exchange."""
        new = FirstSteps(keep_going=self.config.on_nan == "skip")
        return self.placed.first_steps.setdefault((phase.name, phase.exchange), new)

    def drawing(self, node: Any, phase: Phase) -> AbstractContextManager[None]:
        """Context of a client's or the server's work in an exchange.

        A user's network, loss, loop or method may draw from global generators (dropout).  They begin anew at a word of
        the node's own stream, so that the bits depend neither on the number of workers nor on an interruption.
        """
        built_in = self.config.kind.__module__.startswith("fedkern.") and not isinstance(self.data.validation, Items)
        if built_in and not self.script.functions and not self.added_models:
            return nullcontext()
        return seeded_generators(int(node.rng("layers", phase).integers(2**63)), self.device)

    @property
    def model_name(self) -> str:
        """Name of the network that the run trains, or of its two encoders."""
        return str(self.data.task.network_name(self.config))

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the task needs to build the network beside the settings, such as a vocabulary of the clients' texts."""
        return self.data.task.described(self) if self._described is None else self._described

    def words(self) -> tuple[list[Message], Message] | None:
        """Every client's message and the server's that make a vocabulary which all share; None without one."""
        return self.data.task.vocabulary_messages(self)

    def tokens(self, split: Any) -> Any:
        """The tokens of a split's texts, on the CPU; None where there are no texts."""
        return split.task.tokens(split, lambda: self.network("server").module.tokenize)

    def place(self, module: nn.Module) -> nn.Module:
        """Moves a module to the run's device."""
        return place(module, self.device)

    @cached_property
    def public(self) -> Any:
        """The public split."""
        public = self.data.public
        if isinstance(public, Items):
            Trial(self.data, self.config.kind, self.build).check_inputs(public)
        return None if public is None else self.reader(public, augment=self.augment, cache=self.cache)

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

    def network(self, name: str) -> Network:
        """The network called ``"local"`` (that of the lane), ``"frozen"`` or ``"server"``."""
        return self.placed.network(name)

    @property
    def trained_vectors(self) -> tuple[str, ...]:
        """Which of a trained network's vectors go to the server."""
        return VECTORS if self.config.buffers == "average" else ("parameters",)

    def is_flat(self, module: nn.Module) -> bool:
        """Whether ``module`` is the server's network, which its flat vectors describe."""
        server = self.placed.networks.get(("server", 0))
        return server is not None and server.module is module

    def initial(self) -> Message:
        """The vectors of a fresh network."""
        return Network(self.build(), torch.device("cpu")).read()

    def initial_buffers(self) -> Message:
        """The ``buffers`` and ``integers`` of a fresh network, for clients that start from them."""
        if self._initial_buffers is None:
            self._initial_buffers = {name: value for name, value in self.initial().items() if name != "parameters"}
        return self._initial_buffers

    @cached_property
    def initial_personal(self) -> Message:
        """What every client keeps to itself as a fresh network has it, by name; empty where nothing is."""
        return personal.copies(personal.tensors(inner(self.build()))) if self.config.keeps_parts else {}

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

    def validation(self) -> Iterator[Batch]:
        """The validation split in batches; none where it is empty."""
        data = self.data
        if len(data.validation):
            yield from self.reader(data.validation).batches()

    def client_data(self, client: int) -> Any:
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

    def frozen(
        self,
        message: Message,
        buffers: Mapping[str, Tensor] | None,
        own_tensors: Mapping[str, Tensor] | None = None,
        client: int | None = None,
    ) -> nn.Module:
        """Return the frozen copy of a received network, in eval mode.

        Clients that received the same vectors share the copy, unless the network has constant buffers, which its
        forward pass may change.

        Args:
            message: what was received.
            buffers: those of the client's own (``--buffers local``), or None.
            own_tensors: what the client keeps to itself (``--personal``), by name, or None.
            client: the client's number.
        """
        network = self.network("frozen")
        vectors = (message["parameters"], *(buffers or {}).values(), *message.values(), *(own_tensors or {}).values())
        # The key holds the tensors themselves, so that no new tensor can get the identity of a freed one.
        counted = [isinstance(each, Tensor) and not each.is_inference() for each in vectors]  # others are numbers
        key = [(each, each._version if has_version else 0) for each, has_version in zip(vectors, counted, strict=True)]
        key += [(client, 0)] if network.constants else []
        old_key, _ = self._frozen
        if len(key) != len(old_key) or any(a[0] is not b[0] or a[1] != b[1] for a, b in zip(key, old_key, strict=True)):
            network.train_mode()  # before the weights change that eval() has derived others from
            network.write({**message, **(buffers or {})})
            network.write_personal(own_tensors or {})
            network.statistics = self.config.statistics or bool(buffers)
            network.eval_mode()
            self._frozen = key, frozen(network.module)
        return self._frozen[1]

    def begin_exchange(self) -> None:
        """Forget the vectors that clients received before: their tensors may have changed without a new version."""
        self._frozen = [], None
        self.placed.received = None

    def user_objects(self) -> dict[str, str]:
        """Return an identity table of the user's functions and objects that clients work with, without large values."""
        task, split = self.data.task, next(iter(self.data.clients), None)
        things = {
            "task": None if type(task).__module__.startswith("fedkern.") else task,
            getattr(task, "loss_name", "loss_fn"): getattr(task, "loss_code", None),
            "collate_fn": getattr(split, "collate", None),
            "train": self.script.train, "optimizer": self.script.optimizer,
        }  # fmt: skip
        given = {name: thing for name, thing in things.items() if thing is not None}
        return identity_table(given, limit=1 << 14, here=True)

    def tell_attributes(self, client: Any, objects: dict[str, str]) -> None:
        """Warn, in a client's name, of Python state that has changed since this process began.

        Args:
            client: the client.
            objects: what :meth:`user_objects` returned when the process began.
        """
        local, now = self.placed.networks.get(("local", 0)), self.user_objects()
        before, held = ({}, {}) if local is None else (local.attributes, attributes(local.module))
        names = [name for name in held if held[name] != before.get(name)]
        paths = sorted(path for path in {*objects, *now} if objects.get(path) != now.get(path))
        if names or paths:
            parts = [f"The network changes {', '.join(names)} as it runs"] if names else []
            parts += [f"{'c' if names else 'C'}lients change {', '.join(paths[:3])} as they work"] if paths else []
            client.warn(
                "python-state",
                f"{', '.join(parts)}, and a client finds what another client of its process has left there: the same "
                "bits are promised neither for another number of workers nor after --resume; keep such state in a "
                f"registered buffer{' of the network, or in client.state' if paths else ''}.",
            )

    def warn(self, name: str, text: str) -> None:
        self.warnings.setdefault(name, text)

    def notice(self, text: str) -> None:
        if self.on_notice is not None:
            self.on_notice(text)
