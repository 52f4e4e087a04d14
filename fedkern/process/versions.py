"""Versions, kernels and commit that a run is made with."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import fedkern
from fedkern.ops._core import backend

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def commit(package: Path = PACKAGE) -> str:
    """The short hash that setup.py noted in an installed package, or that of the checkout around ``package``.

    Returns:
        The hash, with "-dirty" where files differ from the commit; "" where nobody knows.
    """
    with contextlib.suppress(OSError):
        return (package / "commit.txt").read_text().strip()
    if not (package.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--match="]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def versions() -> dict[str, str]:
    """Versions of the packages and the platform that the run was made with, and fedkern's commit where it is known."""
    return {
        "fedkern": fedkern.__version__, **({"commit": commit()} if commit() else {}), "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform(),
    }  # fmt: skip


def kernels() -> dict[str, str]:
    """The kernels that, beside the versions, determine the bits of a run.

    * ``backend``: the forced backend, or "auto".
    * ``isa``: ISA level of the CPU core, or "none" where there is no core.
    * ``torch``: PyTorch's own ISA level.
    """
    return {
        "backend": backend.forced_backend() or "auto",
        "isa": backend.active_isa(),
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
