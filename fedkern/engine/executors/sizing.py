"""Number of workers of a run, from cores, clients and memory."""

from __future__ import annotations

import os
import sys

from fedkern.engine.context import RunContext
from fedkern.process import machine
from fedkern.settings.config import RunConfig

BASE_BYTES = 400 << 20
"""Memory of a worker beside networks and images: the interpreter, PyTorch's own tables, a batch's activations."""
NETWORKS = 8
"""Copies of a network's parameters that a client may have at once: local, frozen, gradients, momentum, messages."""


def workers_for(config: RunConfig, context: RunContext, asks: int, parameters: int) -> int:
    """The number of workers of a run; below 2 its clients work in the run's process.

    Args:
        asks: how often clients will be asked one by one, not as a cohort; with 0 a worker would have nothing to do.
        parameters: number of parameters of the network.
    """
    if config.workers == "1" or not asks:
        return 1
    why = unavailable(config.device)
    if why:
        if config.workers != "auto":
            context.warn("no-workers", f"--workers {config.workers} changes nothing here, as {why}.")
        return 1
    most = config.clients_of_a_round
    if config.workers != "auto":
        return min(int(config.workers), most)
    # Fewer --threads than cores: the user leaves the others to other work.
    cores = min(machine.usable_cores(), config.threads)
    return min(most, cores // config.client_threads, machine.free_memory() // worker_bytes(context, parameters))


def unavailable(device: str) -> str:
    """Why there can be no workers, as a part of a sentence; empty where there can."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return "workers need Linux"
    if device != "cpu":
        return f"clients share the one {device} device"
    return "" if sys.executable else "this Python does not say how it was started"


def worker_bytes(context: RunContext, parameters: int) -> int:
    """Estimated bytes of a worker, without the data, which all workers map."""
    data = context.data
    tests = (*data.tests.values(), data.validation, *data.client_tests) if context.config.own_networks else ()
    images = sum(split.memory for split in (*data.clients, *tests)) if context.cache else 0
    return BASE_BYTES + NETWORKS * 4 * parameters + images
