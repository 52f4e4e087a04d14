"""Client as the engine implements it (protocol: :class:`fedkern.methods.roles.Client`)."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.data.sharing.holdout import number_patients
from fedkern.data.types import AnySplit
from fedkern.engine.batches.reader import Reader
from fedkern.engine.context import Node, RunContext
from fedkern.engine.local.linear_pass import LINEAR
from fedkern.engine.local.network import Network, NetworkPart, Trainable
from fedkern.engine.local.private_training import count_declared, train_privately
from fedkern.engine.local.training import Diverged, EpochBatches, ReceivedMessage, Schedule, train_async
from fedkern.engine.marks import TRAINED
from fedkern.engine.participation import share_of_work
from fedkern.engine.uploads.encoders import STATES, Drift
from fedkern.errors import UserError, format_value
from fedkern.messages import states
from fedkern.messages.states import State
from fedkern.methods.protocol import BEFORE, Backgrounds, Batch, Message, Phase, batch_slices
from fedkern.methods.roles import Objective
from fedkern.methods.uploads import is_alike
from fedkern.ops._core.layout import plain_strides
from fedkern.privacy import DPSGD
from fedkern.process.device_copies import to_host_async, wait_for_stream
from fedkern.streams import stream
from fedkern.tasks.user_tasks import user_module

PERSONAL, BUFFERS = "personal", "buffers_local"
"""Entries of a client's stored state: its personal parts, and its own buffers (``--buffers local``)."""


class Client(Node):
    """A client (see :class:`fedkern.methods.roles.Client`)."""

    def __init__(self, context: RunContext, client: int, state: State) -> None:
        super().__init__(context)
        self.id = client
        self.label: str = context.data.client_label(client)
        self.samples = len(context.data.clients[client])
        self.declared = context.federation.samples[client]
        self.unit = context.federation.unit
        # The engine's own entries of the state, which no method sees: states of encoders, personal parts, buffers.
        self.encoded: dict[str, Any] = state.pop(STATES, {})
        self._own_entries: dict[str, Message] = {name: state.pop(name) for name in (PERSONAL, BUFFERS) if name in state}
        check_own_entries(context, self._own_entries, self.label)
        self.state = state
        self.phase: Phase = BEFORE  # of the present exchange
        self._batches_by_phase: dict[Phase, EpochBatches] = {}
        self.marks: set[str] = set()
        self.share = 1.0  # of the local steps, until the deadline of --devices
        self.on_gpu: tuple[str, ...] = ()  # vectors that stay there after training (see Encoder.on_gpu)
        self.drift: Drift | None = None
        # Work to do when the GPU is done; None: train waits for the GPU.
        self.later: list[Callable[[], None]] | None = None

    @property
    def context(self) -> RunContext:
        return self._context

    @property
    def _data(self) -> Reader:
        return self._context.samples.of_client(self.id)

    @property
    def stored_state(self) -> State:
        """The state in the checkpoint: the method's, and the engine's own entries."""
        return {**self.state, **self._own_entries, **({STATES: self.encoded} if self.encoded else {})}

    def check_state(self) -> None:
        """Drop entries that a file cannot hold, and raise UserError that names the first."""
        if not isinstance(self.state, dict):
            given, self.state = self.state, {}
            raise UserError(f"client.state must stay a dict, not {format_value(given)}: give it entries instead.")
        problems = []
        for key in [*self.state]:
            try:
                if key in (PERSONAL, BUFFERS, STATES):
                    raise TypeError(f"client.state[{key!r}] is an entry of fedkern's own: take another name")
                states.tree_of({key: self.state[key]}, "client.state", states.check_tensor)
            except TypeError as error:
                del self.state[key]
                deep = f"client.state[{key!r}] holds itself, or is nested too deeply: flatten it"
                problems.append(deep if isinstance(error, states.TooDeep) else str(error))
        if problems:
            raise UserError(f"{problems[0]}.")

    def warn(self, name: str, text: str) -> None:
        if self._context.notices.disclosure.clients:
            self._context.notices.warn(name, text)

    @functools.cached_property
    def groups(self) -> np.ndarray | None:
        split: AnySplit = self._context.data.clients[self.id]
        return split.units()

    @functools.cached_property
    def patients(self) -> np.ndarray | None:
        return number_patients(self._context.data.clients[self.id]) if self.unit.name == "patient" else None

    @property
    def labels(self) -> Tensor:
        labels: Tensor = self._context.data.clients[self.id].labels
        return labels

    @property
    def known(self) -> Tensor:
        return self._data.known_count

    @property
    def objects_known(self) -> bool:
        return getattr(self._context.data.clients[self.id], "masks", None) is not None

    def network(
        self,
        *,
        model: str | None = None,
        width: int | None = None,
        classes: int | None = None,
        stream: str | None = None,
    ) -> Any:
        seed = None if stream is None else int(self.rng(f"model/{stream}", BEFORE).integers(2**63))
        networks = self._context.networks
        return networks.place(networks.build(model=model, width=width, classes=classes, seed=seed))

    def train(
        self,
        method: Objective,
        phase: Phase,
        message: Message,
        *,
        parts: Sequence[str] | None = None,
        steps: int | None = None,
        rows: np.ndarray | None = None,
        anchor: Message | None = None,
        extras: Mapping[str, object] | None = None,
    ) -> Message:
        context = self._context
        network = context.networks.get("local")
        if parts is None and self.load_pretrained(network.module):
            wanted = context.networks.trained_vectors
            return {name: value.cpu() for name, value in network.read().items() if name in wanted}
        if context.script.train is not None:
            return self.upload(context.script.train_model(self.model(message), self))
        buffers, flat = self._load_message(network, message)
        schedule = self._cut_schedule(phase, rows, steps=steps)
        received = self._make_received(phase, message, schedule.epochs, buffers, anchor, flat)
        received.extras = extras or {}
        self.marks |= TRAINED
        network.fixed = self.statistics_fixed(phase)
        trained = network if parts is None else NetworkPart(network, parts)
        read_figures = train_async(
            self, method, phase, trained, self._data, received, schedule, rows, graphs=context.networks.graphs,
            first_steps=context.networks.first_steps(phase), linear=context.config.plan == LINEAR,
        )  # fmt: skip
        result = self._collect_upload(network, trained, flat)
        self._when_device_done(lambda: self.report.update(read_figures()))
        return result

    def _when_device_done(self, work: Callable[[], None]) -> None:
        """Run work that needs the GPU's results: now, after waiting, or when the lane is done."""
        if self.later is None:
            wait_for_stream(self.device)
            work()
        else:
            self.later.append(work)

    def _load_message(self, network: Network, message: Message) -> tuple[Message | None, Tensor | None]:
        """Write a message, and the client's personal parts and buffers, into the network.

        Returns:
            The client's own buffers, and the parameters on the device.
        """
        buffers = None
        if self._context.config.buffers != "average":
            buffers = self.own_buffers
            network.write(buffers or self._context.networks.initial_buffers)
        network.write_personal(self.personal)
        flat = self._context.networks.send(message["parameters"]) if "parameters" in message else None
        network.write(message if flat is None else {**message, "parameters": flat})
        return buffers, flat

    def _collect_upload(self, network: Network, trained: Network | NetworkPart, start: Tensor | None = None) -> Message:
        """Return the vectors to upload, and store personal parts and buffers.

        Copies to the host are still under way, as is the norm of an update of ``start`` that stays on the GPU.
        """
        policy = self._context.config.buffers
        result: Message = trained.read()
        if personal := network.read_personal():
            self._own_entries[PERSONAL] = {name: to_host_async(value) for name, value in personal.items()}
        if policy == "local":
            copies = result if trained is network else network.read()
            self._own_entries[BUFFERS] = {
                name: to_host_async(value) for name, value in copies.items() if name != "parameters"
            }
        if policy != "average":
            result = {"parameters": result["parameters"]}
        if "parameters" in self.on_gpu and start is not None and is_alike(result["parameters"], start):
            vector = result["parameters"]
            self.drift = Drift(vector, vector._version, to_host_async(torch.linalg.vector_norm(vector - start)))
        return {name: value if name in self.on_gpu else to_host_async(value) for name, value in result.items()}

    # -- user-defined training loops -------------------------------------------------------------------------------

    def _epoch_batches(self, phase: Phase) -> EpochBatches:
        if phase not in self._batches_by_phase:
            self._batches_by_phase[phase] = EpochBatches(self, self._data, self._cut_schedule(phase), phase)
        return self._batches_by_phase[phase]

    def collect_marks(self) -> frozenset[str]:
        return frozenset(self.marks | {"epochs" for batches in self._batches_by_phase.values() if batches.complete})

    @property
    def lr(self) -> float:
        self.marks.add("lr")
        return self._epoch_batches(self.phase).lr

    @property
    def batch_size(self) -> int:
        self.marks.add("batches")
        return self._context.config.batch_size

    @property
    def epochs(self) -> int:
        self.marks.add("epochs")
        return self._epoch_batches(self.phase).schedule.epochs

    def batches(self, phase: Phase | None = None) -> Iterator[Batch]:
        if not isinstance(phase, Phase | None):
            raise UserError(
                f"client.batches takes a phase or nothing, not {format_value(phase)}: client.in_order({phase!r}) gives "
                "all samples in stored order."
            )
        self.marks |= {"batches", "augmented"}
        network = self._context.networks.get("local").module
        for batch in self._epoch_batches(phase or self.phase):
            if user_module(network) is not network and isinstance(batch.inputs, Tensor):
                batch.inputs = plain_strides(batch.inputs)
            yield batch

    def model(self, message: Message) -> Any:
        if (precision := self._context.config.precision) != "fp32":
            self._context.notices.warn(
                "loop-precision",
                f"--precision {precision} has no effect in a training loop of your own, only in evaluations: use "
                "torch.autocast in the loop.",
            )
        network = self._context.networks.get("local")
        self._load_message(network, message)
        network.train_mode()
        return copy.deepcopy(user_module(network.module))

    def upload(self, model: nn.Module) -> Message:
        network = self._context.networks.get("local")
        self._context.networks.first_steps(self.phase).take(self, network, model)
        if not network.finite():
            done = self._epoch_batches(self.phase).done
            raise Diverged(self.id, self.phase.round, done, "the parameters are not finite")
        result = self._collect_upload(network, network)
        wait_for_stream(self.device)
        return result

    def _cut_schedule(self, phase: Phase, rows: np.ndarray | None = None, **how: Any) -> Schedule:
        """Return the schedule on ``rows``, shortened for a slow client (``--straggler-rate``, ``--devices``)."""
        samples = self.samples if rows is None else len(rows)
        schedule = self._schedule(phase, samples, **how)
        share = min(self.share, share_of_work(self._context.config, phase.round, self.id) if phase.round >= 0 else 1.0)
        if share == 1:
            return schedule
        self.report["work_done"] = share
        epoch = len(batch_slices(samples, schedule.batch_size))
        total = schedule.epochs * epoch if schedule.max_steps is None else schedule.max_steps
        return replace(schedule, max_steps=max(1, math.floor(share * total)))

    def statistics_fixed(self, phase: Phase) -> bool:
        self.marks.add("statistics")
        after = self._context.config.freeze_bn_after
        if after is None or phase.round < after:
            return False
        if PERSONAL not in self._own_entries and any(name.endswith("running_mean") for name in self.personal):
            return False
        return self._context.config.buffers != "local" or bool(self.own_buffers)

    @property
    def own_buffers(self) -> Message:
        own: Message = self._own_entries.get(BUFFERS, {}) if self._context.config.buffers == "local" else {}
        return own

    @property
    def personal(self) -> Message:
        personal: Message = self._own_entries.get(PERSONAL) or self._context.networks.initial_personal
        return personal

    def frozen(self, message: Message) -> Any:
        return self._context.networks.frozen(message, self.own_buffers, self.personal, self.id)

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        self.marks |= set() if rng is None else {"augmented"}
        return self._data.batch(indices, rng=rng)

    def load_pretrained(self, module: nn.Module) -> bool:
        self.marks.add("teachers")
        if self._context.teachers is None:
            return False
        self._context.teachers.load(self.id, module)
        return True

    def fit(
        self,
        method: Objective,
        phase: Phase,
        module: nn.Module,
        *,
        message: Message | None = None,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
        first: int | None = None,
    ) -> dict[str, float]:
        if self.load_pretrained(module):
            return {}
        trainable = Trainable(module)
        trainable.fixed = self.statistics_fixed(phase)
        self.marks |= TRAINED
        schedule = self._cut_schedule(phase, rows, epochs=epochs, first_epoch=first)
        received = self._make_received(phase, message or {}, schedule.epochs, None)
        try:
            read_figures = train_async(
                self, method, phase, trainable, self._data, received, schedule, rows, self._context.networks.graphs,
                self._context.networks.first_steps(phase), linear=self._context.config.plan == LINEAR,
            )  # fmt: skip
            wait_for_stream(self.device)
            figures = read_figures()
        finally:
            trainable.release()
        self.report.update(figures)
        return figures

    def fit_privately(
        self, method: Objective, phase: Phase, module: nn.Module, spending: DPSGD, *, rows: np.ndarray | None = None
    ) -> dict[str, float]:
        self.marks |= TRAINED - {"clip"}
        schedule = self._schedule(phase, count_declared(self.samples, rows, spending))
        received = self._make_received(phase, {}, schedule.epochs, None)
        figures = train_privately(self, method, phase, module, self._data, received, schedule, spending, rows)
        self.report.update(figures)
        return figures

    def _make_received(
        self,
        phase: Phase,
        message: Message,
        epochs: int,
        buffers: Message | None,
        anchor: Message | None = None,
        flat: Tensor | None = None,
    ) -> ReceivedMessage:
        flat = message.get("parameters") if flat is None else flat
        return ReceivedMessage(
            message=message,
            phase=phase,
            samples=self.samples,
            epochs=epochs,
            flat=flat.to(self.device) if isinstance(flat, Tensor) else None,
            frozen=lambda: self._context.networks.frozen(
                message if anchor is None else anchor, buffers, self.personal, self.id
            ),
        )

    def _schedule(
        self, phase: Phase, samples: int, *, steps: int | None = None, epochs: int | None = None,
        first_epoch: int | None = None,
    ) -> Schedule:  # fmt: skip
        """Decide learning rate and length of an exchange.

        Args:
            steps: optimiser steps, rounded up to epochs.
            epochs: local epochs. With neither, the run's settings hold.
        """
        config, round = self._context.config, max(phase.round, 0)
        limit = config.local_steps if steps is None and epochs is None else steps
        if epochs is None:
            epochs = config.local_epochs
            if limit is not None:
                epochs = math.ceil(limit / len(batch_slices(samples, config.batch_size)))
        make = self._context.script.optimizer
        # The run's schedule multiplies the rates of a user's optimiser.
        lr, drops = (config.lr if make is None else 1.0) * config.lr_decay**round, config.lr_epochs
        if limit is not None:
            # A number of steps is a different number of epochs at every client. The rate drops by rounds (or
            # rounds x local epochs) instead, so that it drops in the same round at every client.
            begun = round if config.local_steps is not None else round * config.local_epochs
            lr, drops = lr * config.lr_step_factor ** sum(drop <= begun for drop in drops), ()
        return Schedule(
            lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, clip_norm=config.clip_norm,
            epochs=epochs, batch_size=config.batch_size, drop_epochs=drops, factor=config.lr_step_factor,
            end=config.lr_end, first_epoch=round * epochs if first_epoch is None else first_epoch, max_steps=limit,
            optimizer=config.optimizer, keep=config.optimizer_state == "keep", make=make,
        )  # fmt: skip

    def in_order(
        self, size: int = 500, *, augment: bool = False, rng: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        self.marks |= {"augmented"} if augment else set()
        return self._data.batches(size, augment=augment, rng=rng)

    def validate(self, answer: Callable[[Tensor], Tensor]) -> float | None:
        with torch.no_grad():
            right = [
                answer(batch.inputs).argmax(1).to(batch.targets.device) == batch.targets
                for batch in self._context.samples.validation()
            ]
        return float(torch.cat(right).double().mean()) if right else None

    def backgrounds(self) -> Backgrounds:
        images: Any = self._data
        bank: Backgrounds = images.backgrounds
        if len(bank) == 0:
            self.warn(
                "background-bank-empty",
                f"No object was detected in any image of client {self.label}: it trains without the intervention.",
            )
        elif len(bank) < 0.5 * self.samples:
            self.warn(
                "background-bank-sparse",
                f"Objects were detected in {len(bank)} of the {self.samples} images of client {self.label}: its "
                "background bank is small.",
            )
        return bank

    def rng(self, purpose: str, phase: Phase) -> np.random.Generator:
        name = purpose if phase.exchange == "update" else f"{purpose}/{phase.exchange}"
        return stream(self._context.config.seed, name, round=phase.round, client=self.id)


def check_own_entries(context: RunContext, entries: Mapping[str, object], client: object) -> None:
    """Raise UserError if a client's stored personal parts or buffers do not fit the run's network."""
    for name, attribute in ((PERSONAL, "initial_personal"), (BUFFERS, "initial_buffers")):
        if name in entries and not _fits(entries[name], getattr(context.networks, attribute)):
            raise UserError(
                f'The checkpoint is damaged: "{name}" of client {client} does not fit the run\'s network. '
                "Put the run's files back, or start the run again."
            )


def _fits(value: object, expected: Message) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == expected.keys()
        and all(isinstance(value[k], Tensor) and is_alike(value[k], tensor) for k, tensor in expected.items())
    )


def check_client(method: Any, client: Client) -> None:
    method.check(client)
    if method.masked and not client.objects_known:
        raise UserError(
            f"{type(method).__name__} trains on object masks (its masked is True), and client {client.label} has no "
            "images with masks: give --boxes FILE, --detector PATH_OR_NAME or, for a Dataset, items with a key `mask`."
        )
