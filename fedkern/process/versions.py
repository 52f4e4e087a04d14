"""Versions and kernels that a run is made with."""

import platform

import numpy as np
import torch

import fedkern
from fedkern.ops._core import backend
from fedkern.process.commit import commit


def versions() -> dict[str, str]:
    """Return the versions of packages and platform, and fedkern's commit if known."""
    return {
        "fedkern": fedkern.__version__, **({"commit": commit()} if commit() else {}), "torch": torch.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform(),
    }  # fmt: skip


def kernels() -> dict[str, str]:
    """Return the kernels that, with the versions, determine the bits of a run.

    * ``backend``: the forced backend, or "auto".
    * ``isa``: ISA level of the CPU core, or "none" without a core.
    * ``torch``: PyTorch's own ISA level.
    """
    return {
        "backend": backend.forced_backend() or "auto",
        "isa": backend.active_isa(),
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
