"""Number of workers of a run, from cores, clients and memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from fedkern.engine.config import RunConfig, clients_of_a_round
from fedkern.engine.context import RunContext

BASE_BYTES = 400 << 20
"""Memory of a worker beside networks and images: the interpreter, PyTorch's own tables, a batch's activations."""
NETWORKS = 8
"""Copies of a network's parameters that a client may have at once: local, frozen, gradients, momentum, messages."""


def workers_for(config: RunConfig, context: RunContext, asks: int, parameters: int) -> int:
    """The number of workers of a run; below 2 its clients work in the run's process.

    Args:
        config: every setting.
        context: of the run.
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
    most = clients_of_a_round(config)
    if config.workers != "auto":
        return min(int(config.workers), most)
    cores = min(usable_cores(), config.threads)  # fewer --threads than cores: the user leaves the others to other work
    return min(most, cores // config.client_threads, free_memory() // worker_bytes(context, parameters))


def unavailable(device: str) -> str:
    """Why there can be no workers, as a part of a sentence; empty where there can."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return "workers need Linux"
    if device != "cpu":
        return f"clients share the one {device} device"
    return "" if sys.executable else "this Python does not say how it was started"


def worker_bytes(context: RunContext, parameters: int) -> int:
    """Estimated bytes of a worker, without the data, which all workers map."""
    images = sum(4 * split.images.numel() for split in context.data.clients) if context.cache else 0
    return BASE_BYTES + NETWORKS * 4 * parameters + images


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity mask, at most its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(cores, int(quota))) if quota else cores


def _quota() -> float:
    """CPU quota of the control group, in CPUs; 0 for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        return 0.0 if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        own = Path("/sys/fs/cgroup/cpu")
        limit = int((own / "cpu.cfs_quota_us").read_text())
        return limit / int((own / "cpu.cfs_period_us").read_text()) if limit > 0 else 0.0
    except (OSError, ValueError, ZeroDivisionError):
        return 0.0


def free_memory() -> int:
    """Free memory in bytes: what the system has left, at most what the control group has left."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    except (OSError, ValueError):
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most: Any = Path(limit).read_text().strip()
            if most != "max":
                found.append(int(most) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(0, min(found, default=sys.maxsize))
