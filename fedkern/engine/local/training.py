"""Local training loop of every method: epochs of SGD or AdamW on the method's loss."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.engine.batches.reader import Reader, batch_plan
from fedkern.engine.local.captured import Graphs, Outcome, Play, is_replayable
from fedkern.engine.local.first_steps import FirstSteps
from fedkern.engine.local.linear_pass import group_batches, has_default_loss, make_pass, play_step, play_steps
from fedkern.engine.local.network import Network, Trained
from fedkern.engine.local.own_optimizer import OwnStepper, clip
from fedkern.errors import UserError
from fedkern.messages.leaves import map_leaves
from fedkern.messages.states import State
from fedkern.methods.protocol import Batch, Message, Phase, Received, batch_slices
from fedkern.methods.roles import Client, Objective
from fedkern.methods.terms import Terms
from fedkern.models.optimisers import cosine
from fedkern.ops._core.private_torch import backward
from fedkern.ops._mlp.mlp import MlpPass
from fedkern.ops._optimise.kernels import Call
from fedkern.process.device_copies import fetch, to_host_async
from fedkern.process.interrupts import check


class Diverged(ArithmeticError):
    """Error of a client whose loss, gradient or parameters are not finite.

    ``batch`` counts from 1 in its exchange.
    """

    def __init__(self, client: int, round: int, batch: int, reason: str) -> None:
        super().__init__(f"client {client}, round {round}, batch {batch}: {reason}")
        self.client, self.round, self.batch, self.what = client, round, batch, reason

    def __reduce__(self) -> tuple[type, tuple[int, int, int, str]]:
        return Diverged, (self.client, self.round, self.batch, self.what)


@dataclass(frozen=True)
class Schedule:
    """Optimiser settings of one exchange.

    Attributes:
        lr: learning rate before the drops in ``drop_epochs``; decay by rounds is included.
        drop_epochs: epochs of the whole run, from 0, at each of which the rate is multiplied by ``factor``.
        end: share of the rate that is left after ``epochs``, along half a cosine; 1: the rate is constant.
        first_epoch: the run's epoch with which this exchange begins.
        max_steps: optimiser steps of the exchange, whatever number of epochs they take; None: all of ``epochs``.
        optimizer: ``"sgd"``, or ``"adamw"`` with betas of 0.9 and 0.999, reset in every exchange.
        keep: whether the optimiser's state is kept in the client's.
        make: a user's factory of the optimiser, whose learning rates ``lr`` multiplies, or None.
    """

    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float
    epochs: int
    batch_size: int
    drop_epochs: tuple[int, ...] = ()
    factor: float = 0.1
    end: float = 1.0
    first_epoch: int = 0
    max_steps: int | None = None
    optimizer: str = "sgd"
    keep: bool = False
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None

    def lr_at(self, epoch: int) -> float:
        """Return the rate of an epoch of the exchange, from 0."""
        drops = sum(drop <= self.first_epoch + epoch for drop in self.drop_epochs)
        return cosine(self.lr, self.lr * self.end, min(epoch / self.epochs, 1)) * self.factor**drops


@dataclass
class ReceivedMessage:
    """Message that a client received in this exchange (see :class:`fedkern.methods.protocol.Received`)."""

    message: Message
    phase: Phase
    samples: int
    epochs: int
    flat: Tensor | None
    frozen: Any
    extras: Mapping[str, Any] = field(default_factory=dict)
    round_cache: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> Tensor:
        if self.flat is None:
            raise ValueError('received: expected a message with "parameters" fp32 [P], given none')
        return self.flat

    @property
    def model(self) -> Any:
        _ = self.parameters  # raises without them
        return self.frozen()


Rate = float | Tensor
"""A learning rate, fp64 0-d if a recorded step reads it."""


class Stepper(NamedTuple):
    """Steps of an optimiser.

    Attributes:
        step: takes the learning rate, applies a batch's gradients and zeroes them.
        read_state: returns the state to keep.
        switch: puts the optimiser in train mode (True) or eval mode.
        call: a step of SGD on all parameters, but for its rate; None for any other.
    """

    step: Callable[[Rate], ops.StepResult]
    read_state: Callable[[], State]
    switch: Callable[[bool], None] = lambda training: None
    call: Call | None = None


def stepper(
    network: Trained,
    schedule: Schedule,
    terms: Terms | None,
    previous: State,
    hold: Callable[[str, Tensor], Tensor] | None = None,
) -> Stepper | OwnStepper:
    """Make the optimiser's steps.

    Personal parameters take the same step without the method's terms. Gradients are clipped by the norm of all.

    Args:
        hold: keeps the step's tensors at one address in all exchanges (see :meth:`Graphs.hold`).
    """
    if schedule.make is not None:
        return OwnStepper(network, schedule, terms, previous)
    theta, gradients = network.parameters.detach(), network.gradients
    if not (isinstance(network, Network) and len(network.personal)):
        return _steps(theta, gradients, schedule, terms, previous, hold)
    plain, vectors = replace(schedule, clip_norm=0.0), network.gradient_vectors
    shared = _steps(theta, gradients, plain, None, previous.get("shared", {}))
    personal = _steps(network.personal.detach(), vectors[1], plain, None, previous.get("personal", {}))

    @torch.no_grad()
    def both(lr: Rate) -> ops.StepResult:
        if terms is not None:
            terms.add_to(gradients, theta)
        if schedule.clip_norm:
            clip(vectors, schedule.clip_norm)
        of_shared, of_personal = shared.step(lr), personal.step(lr)
        return ops.StepResult(of_shared.finite & of_personal.finite, of_shared.squared_norm + of_personal.squared_norm)

    return Stepper(both, lambda: {"shared": shared.read_state(), "personal": personal.read_state()})


def _steps(
    theta: Tensor,
    gradients: Tensor,
    schedule: Schedule,
    terms: Terms | None,
    previous: State,
    hold: Callable[[str, Tensor], Tensor] | None = None,
) -> Stepper:
    settings: dict[str, Any] = {"weight_decay": schedule.weight_decay, "zero": True}
    if schedule.clip_norm:
        settings["max_norm"] = schedule.clip_norm
    if terms is not None:
        settings |= terms.arguments()
    if hold is not None:
        settings = {name: hold(name, x) if isinstance(x, Tensor) else x for name, x in settings.items()}
    state = {name: value.to(theta.device, copy=True) if name != "steps" else value for name, value in previous.items()}
    if schedule.optimizer == "adamw":
        state = {"first": torch.zeros_like(gradients), "second": torch.zeros_like(gradients), "steps": 0, **state}

        def adamw(lr: Rate) -> ops.StepResult:
            state["steps"] += 1
            return ops.adamw_step(
                theta, gradients, state["first"], state["second"], state["steps"], lr=float(lr), **settings
            )

        return Stepper(adamw, lambda: state)
    velocity = None
    if schedule.momentum:
        velocity = state.setdefault("velocity", torch.zeros_like(gradients))
        if hold is not None:
            state["velocity"] = velocity = hold("velocity", velocity)

    def sgd(lr: Rate) -> ops.StepResult:
        return ops.sgd_step(theta, gradients, velocity, lr=lr, momentum=schedule.momentum, **settings)

    # The next exchange overwrites held tensors, so they are copied.
    return Stepper(
        sgd, lambda: state if hold is None else {name: value.clone() for name, value in state.items()},
        call=Call(theta, gradients, velocity, momentum=schedule.momentum, **settings),
    )  # fmt: skip


def epochs(count: int, schedule: Schedule, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Yield the batches of every epoch of an exchange, up to its limit of steps."""
    if schedule.max_steps is None:
        for _ in range(schedule.epochs):
            yield batch_plan(count, schedule.batch_size, rng)
        return
    remaining = schedule.max_steps
    while remaining > 0:
        plan = batch_plan(count, schedule.batch_size, rng)[:remaining]
        remaining -= len(plan)
        yield plan


class EpochBatches:
    """The batches of an exchange for a user-defined loop, the same as in the run's loop, an epoch at a time."""

    def __init__(self, client: Client, data: Reader, schedule: Schedule, phase: Phase) -> None:
        self.schedule, self.done = schedule, 0
        self._epoch, self._amid = 0, False
        plans = epochs(len(data), replace(schedule, epochs=sys.maxsize), client.rng("batches", phase))
        augmentation = client.rng("augmentation", phase) if data.fresh else None
        self._epochs = (data.make_batches(plan, phase, epoch, augmentation) for epoch, plan in enumerate(plans))

    @property
    def lr(self) -> float:
        return self.schedule.lr_at(self._epoch)

    @property
    def complete(self) -> bool:
        limit = self.schedule.max_steps
        return self._epoch + self._amid == self.schedule.epochs if limit is None else self.done == limit

    def __iter__(self) -> Iterator[Batch]:
        self._epoch, self._amid = self._epoch + self._amid, True
        for batch in next(self._epochs, ()):
            check()
            self.done += 1
            yield batch
        self._epoch, self._amid = self._epoch + 1, False


def batch_sizes(count: int, schedule: Schedule) -> Counter[int]:
    sizes = [part.stop - part.start for part in batch_slices(count, schedule.batch_size)]
    steps = schedule.epochs * len(sizes) if schedule.max_steps is None else schedule.max_steps
    return Counter(islice(cycle(sizes), steps))


def one_pass(
    method: Objective,
    module: nn.Module,
    apply: Callable[[], ops.StepResult] | None,
    batch: Batch,
    received: Received,
    *,
    collect: Callable[[], None] | None = None,
) -> Outcome:
    """Run forward and backward pass of a batch, ``collect``, and the step of ``apply``."""
    result = method.loss(module, batch, received)
    loss, observed = result if isinstance(result, tuple) else (result, {})
    backward(loss)
    if collect is not None:
        collect()
    squared = None if apply is None else apply().squared_norm
    # Stacking figures with the loss would mix dtypes, which takes 30 us a batch.
    return Outcome(loss.detach(), squared, (torch.stack([*observed.values()]),) if observed else (), tuple(observed))


def train_async(
    client: Client,
    method: Objective,
    phase: Phase,
    network: Trained,
    data: Reader,
    received: ReceivedMessage,
    schedule: Schedule,
    rows: np.ndarray | None = None,
    graphs: Graphs | None = None,
    first_steps: FirstSteps | None = None,
    linear: bool = False,
) -> Callable[[], dict[str, float]]:
    """Train ``network``, which already holds the received vectors, on the client's data.

    Returns:
        A function that returns the means over all batches of ``loss`` and the method's figures, once the device is done
        (:func:`~fedkern.process.device_copies.wait_for_stream`).

    Raises:
        Diverged: the loss or the gradient of a batch, or the parameters at the end, are not finite. Losses and
            gradients are checked once per epoch, or on a GPU, for which the host would wait, once at the end.
        UserError: a batch is a single sample, which batch norm cannot normalise.
    """

    # Streams of random numbers, and the method's hooks that the loop has to call.
    network.train_mode()
    theta, gradients = network.parameters, network.gradients
    orders = client.rng("batches", phase)
    draws = client.rng("background", phase) if type(method).draw is not Objective.draw else None
    augmentation = client.rng("augmentation", phase) if data.fresh else None
    kind = type(method)
    adjusts = kind.adjust_gradient is not Objective.adjust_gradient
    prepares = kind.prepare is not Objective.prepare
    previous = client.state.get(key := f"optimizer {phase.exchange} {len(gradients)}", {}) if schedule.keep else {}
    terms = None if adjusts else method.terms(received)

    # Steps are recorded if method, network and loss declare it; None is unknown, and verified.
    recordable = None if graphs is None else is_replayable(kind, network.module)
    if recordable and data.task.code():  # the user's loss
        recordable = None
    if recordable is False:
        graphs = None

    # A step is recorded as a whole only for plain SGD on shared parameters; else forward and backward alone.
    has_personal = len(network.gradient_vectors) > 1  # parameters that the client keeps to itself
    is_sgd = schedule.make is None and schedule.optimizer == "sgd"  # AdamW's numbers change every time
    # A whole recorded step keeps its tensors in place.
    hold = graphs.hold if graphs is not None and is_sgd and not (adjusts or has_personal) else None
    as_whole = hold is not None
    optimiser = stepper(network, schedule, terms, previous, hold)
    step: Callable[[Rate], ops.StepResult] = optimiser.step

    # A recorded step reads its learning rate from memory.
    rate = torch.zeros((), dtype=torch.float64, device=theta.device)
    rate = rate if hold is None else hold("rate", rate)
    for vector in network.gradient_vectors:
        vector.zero_()
    totals: dict[str, float] = {}
    seen: dict[str, int] = {}
    done, count = 0, len(data) if rows is None else len(rows)

    # Draws and preparation happen batch by batch, in the order of the streams.
    def batches(epoch: int, plan: list[np.ndarray]) -> Iterator[Batch]:
        for batch in data.make_batches(plan, phase, epoch, augmentation, masked=method.masked):
            check()
            if draws is not None:
                batch.drawn = method.draw(client, batch, draws)
            if prepares:
                with torch.no_grad():
                    batch.drawn = {**batch.drawn, **method.prepare(network.module, batch, received)}
            yield batch

    # The checks of first steps wrap the loss, inside and outside of recordings.
    objective = method if first_steps is None else first_steps.watch(client, method, network)
    run = partial(one_pass, objective, network.module, partial(step, rate) if as_whole else None)
    passing = make_pass(network.module) if linear and has_default_loss(method, data.task) else None
    core: tuple[MlpPass, Call] | None = None  # takes the steps of many batches, as nothing happens between them
    if passing is not None:
        run = partial(play_step, passing, run)  # of code that has nothing to check
        if isinstance(optimiser, Stepper) and optimiser.call and not (draws or adjusts):
            core = passing, optimiser.call
    passes: AbstractContextManager[Play] = nullcontext(partial(map, partial(run, received=received)))
    if graphs is not None:
        passes = graphs.replaying(
            network, method, received, run, batch_sizes(count, schedule), partial(_warn, client),
            ahead=as_whole and not prepares,
            settings=(as_whole, schedule.momentum, schedule.weight_decay, schedule.clip_norm, terms and terms.proximal),
            unverified=recordable is None,
        )  # fmt: skip

    # On a CPU, losses are checked after every epoch; a GPU is not waited for.
    records: list[Outcome] = []
    with passes as play:
        for epoch, plan in enumerate(epochs(count, schedule, orders)):
            chosen = plan if rows is None else [rows[part] for part in plan]
            lr = schedule.lr_at(epoch)
            rate.fill_(lr)
            together = group_batches(core[0], chosen) if core and data.joins else []
            joined = batches(epoch, [np.concatenate(part) for part in together])
            try:
                for part in together or [chosen]:
                    result = play_steps(*core, lr, part, next(joined), data) if core and together else None
                    for outcome in play(batches(epoch, part)) if result is None else [result]:
                        if adjusts:
                            method.adjust_gradient(theta.detach(), gradients, received)
                        stepped = as_whole or result is not None
                        records.append(outcome if stepped else outcome._replace(squared_norm=step(lr).squared_norm))
            except ValueError as error:
                if min(map(len, chosen)) == 1 and "more than 1 value per channel" in str(error):
                    raise UserError(_too_small(client)) from None
                raise
            if graphs is None and theta.device.type == "cpu":
                done, records = _add_to_totals(client.id, phase, *_gather_records(records), done, totals, seen), []

    # The terms count the run's own steps, unless the stepper has counted already.
    optimiser.switch(False)
    finite = network.finite()
    counted = schedule.make is not None or has_personal  # by the stepper
    if terms is not None and terms.gradient_sum is not None and not counted:
        terms.gradient_sum.steps += done + sum(outcome.loss.numel() for outcome in records)
        if graphs is not None and as_whole:
            terms.gradient_sum.total.copy_(graphs.held["gradient_sum"])
    if schedule.keep:
        client.state[key] = map_leaves(
            lambda leaf: fetch(leaf) if isinstance(leaf, Tensor) else leaf, optimiser.read_state()
        )

    # One copy to the host holds all figures, on its way while the caller continues.
    groups, values = _gather_records(records, finite)
    values = to_host_async(values)

    def read_figures() -> dict[str, float]:
        _add_to_totals(client.id, phase, groups, values, done, totals, seen)
        return {name: totals[name] / seen[name] for name in totals}

    return read_figures


def _warn(client: Client, error: Exception) -> None:
    client.warn(
        "no-cuda-graph",
        "The GPU's kernels of a training step are started one by one, as they could not be recorded as a CUDA graph "
        f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Results are the same; training is slower.",
    )


def _too_small(client: Client) -> str:
    why = "has a single training sample" if client.samples == 1 else "trains on one sample at a time"
    return (
        f"Client {client.label} {why}, and batch norm cannot normalise a single value per channel: use larger batches, "
        "fewer clients, another --partition, or a network with several positions where it normalises (--model cnn)."
    )


Groups = list[tuple[tuple[str, ...], int]]
"""Names of the figures of consecutive batches, and the number of batches."""


def _gather_records(records: list[Outcome], finite: Tensor | None = None) -> tuple[Groups, Tensor]:
    """Flatten batches' records into one fp64 vector, which ends with ``finite`` (bool 0-d)."""
    columns: list[Tensor] = []
    groups: Groups = []
    for names, mates in groupby(records, lambda outcome: outcome.names):
        parts = [outcome.parts() for outcome in mates]
        columns += [torch.cat([part.reshape(-1) for part in column]) for column in zip(*parts, strict=True)]
        groups.append((names, sum(loss.numel() for loss, *_ in parts)))
    columns += [] if finite is None else [finite.reshape(1)]
    numbers = [column.to(columns[-1].device, torch.float64) for column in columns]
    return groups, torch.cat(numbers) if numbers else torch.empty(0)


def _add_to_totals(
    client: int,
    phase: Phase,
    groups: Groups,
    gathered: Tensor,
    done: int,
    totals: dict[str, float],
    seen: dict[str, int],
) -> int:
    """Add the records of :func:`_gather_records` to the totals, and return the number of batches done."""
    values = iter(gathered.tolist())
    for names, count in groups:
        losses, squares = list(islice(values, count)), list(islice(values, count))
        rows = list(islice(values, count * len(names)))
        columns = [rows[i :: len(names)] for i in range(len(names))]
        for loss, squared, *figures in zip(losses, squares, *columns, strict=True):
            done += 1
            for value, value_name in ((loss, "the loss"), (squared, "the gradient")):
                if not math.isfinite(value):
                    raise Diverged(client, phase.round, done, f"{value_name} is {value}")
            for name, value in zip(("loss", *names), (loss, *figures), strict=True):
                totals[name] = totals.get(name, 0.0) + value
                seen[name] = seen.get(name, 0) + 1
    if not next(values, True):
        raise Diverged(client, phase.round, done, "the parameters are not finite")
    return done
