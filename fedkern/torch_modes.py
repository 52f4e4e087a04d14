"""PyTorch's process-wide settings: those of a run in place of its caller's, and those that its workers take over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def reproducible() -> Iterator[None]:
    """Context manager or decorator: what a caller has set for its own work changes no bit of the work inside.

    fp32 is the default dtype and the precision of matrix products, the CPU the default device, gradients are recorded,
    and cuDNN takes its deterministic algorithms.  The caller's settings are back afterwards.  Deterministic
    algorithms, anomaly detection and function modes are tools of the caller's that stay.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    dtype, matmul, device = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_default_device()
    moved = False
    with ExitStack() as modes:
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            if device != torch.device("cpu"):
                torch.set_default_device(None)
                moved = torch.get_default_device() != device
                if not moved:  # a block of the caller's, "with torch.device(...)", cannot be left from within
                    modes.enter_context(torch.device("cpu"))
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            yield
        finally:
            modes.close()
            cudnn.deterministic, cudnn.benchmark = before
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(matmul)
            if moved:
                torch.set_default_device(device)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Runs with ``count`` CPU threads and restores the caller's number.  The number changes the bits of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def modes() -> dict[str, Any]:
    """The process-wide settings of PyTorch that change bits, and that a run takes over from its caller."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def set_modes(given: dict[str, Any]) -> None:
    """Sets the process-wide settings that :func:`modes` returned in another process."""
    now = modes()
    if (now["deterministic"], now["warn_only"]) != (given["deterministic"], given["warn_only"]):
        # Called only for a change: the call imports torch's compiler, which takes a second.
        torch.use_deterministic_algorithms(given["deterministic"], warn_only=given["warn_only"])
    torch.backends.mkldnn.enabled = given["mkldnn"]
