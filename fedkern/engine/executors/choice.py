"""Choice of a run's executor: this process, workers, ranks of torchrun, or remote clients."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch

from fedkern.data.sources.items import Items
from fedkern.engine.context import RunContext
from fedkern.engine.executors import fork_server
from fedkern.engine.executors.executor import Executor, Setup
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.executors.workers import Workers
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.transport import torchrun_group
from fedkern.messages.packets import NotPortable, check_portable, only_code_bars
from fedkern.process import machine
from fedkern.process.forking import read_positions
from fedkern.settings.config import RunConfig

BASE_BYTES = 400 << 20
"""Memory of a worker beside networks and images: the interpreter, PyTorch's own tables, a batch's activations."""
NETWORKS = 8
"""Copies of a network's parameters that a client may have at once: local, frozen, gradients, momentum, messages."""


def executor_of(run: RunObjects) -> Executor:
    if run.request.remote is not None:
        return run.request.remote(run)
    config, context = run.config, run.context
    rounds = list(islice(run.plan, run.progress.planned, None))
    asks = config.sampled_clients * sum(len(entry.exchanges) for entry in rounds if not entry.cohort)
    if config.own_networks:  # all clients evaluate theirs
        asks += context.federation.clients * -(-len(rounds) // config.eval_every)
    if (ranks := torchrun_group.find_main_group()) is not None:
        if config.workers != "1":
            _no_workers(config, context, "each rank of torchrun has its clients work one after another")
        if not asks or config.clients_of_a_round < 2:  # other ranks would be idle
            return run.here
        return Ranks(context, run.here, run.handlers, run.store.checkpoints.reader, ranks)
    if (count := workers_for(config, context, asks, run.parameters)) < 2:
        return run.here
    expected = asks if config.workers == "auto" else None
    return Workers(context, run.here, run.handlers, run.store.checkpoints.reader, count, asks=expected)


def _no_workers(config: RunConfig, context: RunContext, why: str) -> None:
    if config.workers != "auto":
        context.notices.warn("no-workers", f"--workers {config.workers} changes nothing here, as {why}.")


def workers_for(config: RunConfig, context: RunContext, asks: int, parameters: int) -> int:
    """Return the number of workers, or 1 if clients work in the run's process."""
    if config.workers == "1" or not asks:
        return 1
    if why := find_worker_obstacle(config.device):
        _no_workers(config, context, why)
        return 1
    limit = config.clients_of_a_round
    if config.workers != "auto":
        return min(int(config.workers), limit)
    # Fewer --threads than cores: the user reserves the others for other work.
    cores = min(machine.usable_cores(), config.threads)
    return min(limit, cores // config.client_threads, machine.free_memory() // worker_bytes(context, parameters))


def find_worker_obstacle(device: str) -> str:
    """Return why there can be no workers, as a part of a sentence, or an empty text."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return "workers need Linux"
    if device != "cpu":
        return f"clients share the one {device} device"
    return "" if sys.executable else "this Python does not say how it was started"


def worker_bytes(context: RunContext, parameters: int) -> int:
    """Estimate the bytes of a worker, without the data, which all workers map."""
    data = context.data
    tests = (*data.tests.values(), data.validation, *data.client_tests) if context.config.own_networks else ()
    images = sum(split.memory for split in (*data.clients, *tests)) if context.samples.cache else 0
    return BASE_BYTES + NETWORKS * 4 * parameters + images


def own_fork_server(setup: Setup) -> AbstractContextManager[None]:
    """Fork the fork server from this process for a run whose setup cannot be sent to another.

    The run has no thread yet, and the fork server and its workers compute on one thread.
    """
    config = setup.context.config
    barred = find_worker_obstacle(config.device) or torch.cuda.is_initialized()
    if config.workers != "1" and config.client_threads == 1 and not barred:
        try:
            check_portable(setup)
            split = next(iter(setup.context.data.clients), None)
            needed = isinstance(split, Items) and _reads_open_files(split)
        except NotPortable:
            # All processes would share an open object, such as a connection.
            needed = only_code_bars(setup)
        if needed:
            return fork_server.prefork_server(setup)
    return nullcontext()


def _reads_open_files(split: Items) -> bool:
    """Return whether reading items moves the position in an open file, which no other process has."""
    positions = read_positions()
    for row in (0, len(split) - 1):
        next(split.read([row], 0))
        if any(position != read_positions().get(file) for file, position in positions.items()):
            return True
    return False
