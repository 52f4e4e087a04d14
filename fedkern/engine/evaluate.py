"""Evaluation of the global network on the named test sets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from typing import TypeVar

import torch
from torch import nn

from fedkern.data.split import Split
from fedkern.data.types import FederatedData, client_label
from fedkern.engine.batches.reader import BATCH, Reader
from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.common.personal import ClientsNetworks
from fedkern.methods.roles import Client
from fedkern.process.torch_modes import cpu_threads
from fedkern.settings.config import RunConfig
from fedkern.streams import preserve_generators
from fedkern.tasks.figure_names import set_noun
from fedkern.tasks.retrieval import LOSS_BATCH

Key = TypeVar("Key")
Value = TypeVar("Value")

CPU_BATCH = 64
"""Images per evaluation batch on a CPU."""


def sets_by_prefix(data: FederatedData) -> dict[str, Split]:
    splits = {f"{name}_" if name else "": split for name, split in data.tests.items()}
    return splits | ({"validation_": data.validation} if len(data.validation) else {})


def compared_alike(sets: dict[int, Reader]) -> dict[int, Reader]:
    """Give contrastive losses of all sets one batch size, so that clients can be compared."""
    smallest = min(map(len, sets.values()), default=LOSS_BATCH)
    for data in sets.values():
        data.loss_batch = min(LOSS_BATCH, smallest)
    return sets


def batch_size(device: torch.device, statistics: bool) -> int:
    # Activations of a small batch stay in a CPU's cache: batches of 500 take up to a quarter longer, and 1.5 times as
    # long the first time. Without running statistics the batch size changes the figures, so it stays.
    return CPU_BATCH if device.type == "cpu" and statistics else BATCH


@contextmanager
def set_evaluation_threads(config: RunConfig, run_network: bool) -> Iterator[int]:
    """Set the threads of an evaluation, and yield how many sets or batches run side by side.

    A run and the command ``evaluate`` both call it: the number of threads changes bits.

    Args:
        run_network: whether the network is the run's own. A module of the method may be traced at its first call, and
            torch.fx then patches every module's call, so it is evaluated alone.
    """
    count = config.threads // config.client_threads if run_network and config.device == "cpu" else 1
    with cpu_threads(config.client_threads if count > 1 else config.threads):
        yield count


def evaluate_clients(
    method: Method,
    network: nn.Module,
    sets: Mapping[int, Reader],
    at_once: int,
    names: Sequence[str] | None,
    code: Callable[[str], AbstractContextManager[None]],
    client: Callable[[int], Client],
    seed: int,
    keep: bool = False,
) -> dict[int, dict[str, float]]:
    """Return the method's figures on every client's own test set, by client.

    Args:
        network: in eval mode.
        at_once: number of sets evaluated side by side, in threads.
        code: names the method's part, and the labelled client, in an exception.
        client: gives a client with its state, if the method may look at it.
        keep: whether the sets keep the networks' answers (``Reader.kept``).
    """
    looks, buffers = type(method).evaluate_own is not Method.evaluate_own, Buffers(network)

    def figures(k: int) -> dict[str, float]:
        label = client_label(names, k)
        explained = _name_set(f"The test set of client {label}", sets[k])
        keeping = sets[k].keeping() if keep else nullcontext()
        with explained, keeping, sets[k].repeating(seed, "client", k), code(label):
            values = method.evaluate_own(network, sets[k], client(k)) if looks else method.evaluate(network, sets[k])
            buffers.put_back()
            return {name: float(value) for name, value in values.items()}

    def evaluate_all(at_once: int) -> dict[int, dict[str, float]]:
        return dict(zip(sets, _side_by_side(figures, list(sets), at_once), strict=True))

    return _without_chance(evaluate_all, buffers, sets.values(), at_once)


def _without_chance(
    evaluate_all: Callable[[int], dict[Key, Value]], buffers: Buffers, sets: Collection[Reader], at_once: int
) -> dict[Key, Value]:
    """Return the results of ``evaluate_all`` with ``at_once`` sets or batches side by side.

    If an evaluation draws from global generators, or changes buffers while others read them, all sets are evaluated
    again, one after another, from their own seeds.
    """
    if not any(data.draws for data in sets):
        with preserve_generators(next((data.device for data in sets), None)) as have_moved:
            results = evaluate_all(at_once)
            if not have_moved() and not (at_once > 1 and buffers.changed):
                return results
        for data in sets:
            data.draws = True
    return evaluate_all(1)


class Buffers:
    """A network's buffers before an evaluation, which may change them."""

    def __init__(self, network: nn.Module) -> None:
        buffers = [(layer, key, x) for layer in network.modules() for key, x in layer._buffers.items() if x is not None]
        self._values = [(layer, key, x, x.clone()) for layer, key, x in buffers if not x.is_inference()]
        self._versions = [buffer._version for _, _, buffer, _ in self._values]
        self.changed = False

    @torch.no_grad()
    def put_back(self) -> None:
        for place, (layer, key, buffer, value) in enumerate(self._values):
            if layer._buffers.get(key) is not buffer or buffer._version != self._versions[place]:
                layer._buffers[key], self.changed = buffer.copy_(value), True
                self._versions[place] = buffer._version


def evaluate(
    method: Method | ClientsNetworks,
    network: nn.Module,
    sets: dict[str, Reader],
    code: Callable[[], AbstractContextManager[None]],
    at_once: int = 1,
    *,
    seed: int,
    keep: bool = False,
) -> dict[str, float]:
    """Return the method's figures on every set, by prefixed name (``id_accuracy``, ``validation_loss``, ...).

    ``at_once`` batches are evaluated side by side, in threads. Whole sets are instead, if they have few batches, the
    task needs its batches in order, or the method has its own ``evaluate``.
    """

    def figures(prefix: str) -> dict[str, float]:
        data = sets[prefix]
        explained = _name_set(f"The {set_noun(prefix[:-1])}", data)
        with explained, data.keeping() if keep else nullcontext(), data.repeating(seed, prefix), code():
            result = method.evaluate(network, data)
            buffers.put_back()
            return result

    ordinary, buffers = type(method).evaluate is Method.evaluate, Buffers(network)
    batches = [-(-len(data) // data.size) for data in sets.values() if data.task.concurrent]

    def evaluate_all(at_once: int) -> dict[str, dict[str, float]]:
        if ordinary and 1 < at_once < max(batches, default=0):
            with _threads(at_once) as pool:
                for data in sets.values():
                    data.pool = pool
                try:
                    return {prefix: figures(prefix) for prefix in sets}
                finally:
                    for data in sets.values():
                        data.pool = None
        # The largest set first, so that no thread starts it last.
        order = sorted(sets, key=lambda prefix: -len(sets[prefix]))
        return dict(zip(order, _side_by_side(figures, order, at_once), strict=True))

    results = _without_chance(evaluate_all, buffers, sets.values(), at_once)
    return {prefix + name: float(value) for prefix in sets for name, value in results[prefix].items()}


def _side_by_side(task: Callable[[Key], Value], keys: Sequence[Key], at_once: int) -> list[Value]:
    """Return the results of ``task`` for all keys, in order, ``at_once`` at a time in threads.

    Threads compute on as many CPU threads as the caller, so figures do not depend on ``at_once``.
    """
    if min(at_once, len(keys)) < 2:
        return [task(key) for key in keys]
    with _threads(at_once) as pool:
        # In a copy of this thread's context, which holds the precision that networks compute in.
        tasks = [pool.submit(copy_context().run, task, key) for key in keys]
        return [future.result() for future in tasks]


def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


@contextmanager
def _name_set(subject: str, data: Reader) -> Iterator[None]:
    """Name the set in errors about a single image or about no known target."""
    try:
        yield
    except ValueError as error:
        if len(data) and "at least one sample" in str(error):
            raise UserError(f"{subject} has no target that counts: give it one with known targets.") from None
        if len(data) == 1 and "more than 1 value per channel" in str(error):
            raise UserError(
                f"{subject} has a single image, and batch norm without running statistics cannot normalise a single "
                "value per channel: give it at least 2, or keep running statistics with --buffers average."
            ) from None
        raise
