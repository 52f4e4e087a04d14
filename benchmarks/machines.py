"""Description of the measuring machine: the processor down to its caches, versions, backend and compiled core."""

import contextlib
import functools
import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.recorded import recorded_commit
from fedkern.report.doctor_page import CPUINFO, cpuinfo

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# A virtual machine's processor often has a name that says no more than the maker: these tell its generation.
FACTS = {
    "model name": "cpu",
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",
    "CPU part": "part",
}


def now() -> str:
    """Return the time as an ISO date, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine(device: str) -> dict[str, Any]:
    """Return the machine and versions behind numbers, with a forced backend."""
    info: dict[str, Any] = {
        "time": now(),
        "commit": recorded_commit(),
        "cpu": platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **chip(),
    }
    try:
        from fedkern.ops._core.backend import cpu_core

        info["isa"] = cpu_core().isa()
    except Exception as error:  # the table says so instead of failing
        info["isa"] = f"no core: {error}"
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
        info["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        info["cuda"] = torch.version.cuda
    forced = _read_forced()
    if forced:
        info["backend"] = forced
    for package in ("triton", "liger_kernel", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            info[package] = importlib.metadata.version(package)
    return info


def chip(path: Path = CPUINFO, caches: Path = CACHES) -> dict[str, str]:
    """Return name, family, model, stepping (on ARM implementer and part) and sizes of L2 and L3, as far as known."""
    info = {FACTS[name]: value for name, value in cpuinfo(path).items() if name in FACTS}
    with contextlib.suppress(OSError):
        for index in sorted(caches.glob("index*")):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if level in ("2", "3") and kind != "Instruction":
                info[f"l{level}"] = size
    return info


def _read_forced() -> str | None:
    from fedkern.ops._core.backend import forced_backend

    return forced_backend()


def served_by(device: str) -> tuple[str, str]:
    """Return the serving backend, and the ``source_hash()`` of its compiled core ("" without one).

    The backend is the forced one, else the first that can serve; "reference" where none does.
    """
    forced = _read_forced()
    if forced:
        return forced, _core_of(forced) or ""
    names = [name for name in (("cuda", "triton") if device == "cuda" else ("cpu",)) if _core_of(name) is not None]
    return (names[0], _core_of(names[0]) or "") if names else ("reference", "")


@functools.cache
def _core_of(backend: str) -> str | None:
    """Return the source hash of a backend's compiled core, "" without a core, None where it cannot be used."""
    from fedkern.ops._core.backend import cpu_core
    from fedkern.ops._core.loading import Unavailable, load_core, load_triton

    try:
        if backend == "triton":
            load_triton("_core.triton.launch")
        if backend in ("cpu", "cuda"):
            return (cpu_core() if backend == "cpu" else load_core("_cuda")).source_hash()
    except Unavailable:
        return None
    return ""
