"""What a round takes of a GPU."""

from __future__ import annotations

from typing import Any

import torch


def begin(device: torch.device) -> None:
    """A round begins: the most memory from here on is its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def figures(device: torch.device) -> dict[str, Any]:
    """What the round took; empty on a CPU.

    Returns:
        ``peak_bytes`` of tensors, and ``utilisation`` of the last moments in per cent, as the driver tells it (through
        NVML); None where it does not.
    """
    if device.type != "cuda":
        return {}
    try:
        utilisation: int | None = int(torch.cuda.utilization(device))
    except Exception:  # NVML's own errors, and a missing package: MIG slices and some virtual GPUs do not tell
        utilisation = None
    return {"peak_bytes": int(torch.cuda.max_memory_allocated(device)), "utilisation": utilisation}
