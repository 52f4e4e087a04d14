"""GPU memory and utilisation of a round."""

import torch


def begin(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def figures(device: torch.device) -> dict[str, int | None]:
    """Return GPU figures of the round, empty on a CPU.

    Returns:
        ``peak_bytes``, the peak memory of tensors, and ``utilisation`` of the last moments in per cent, from the driver
        (NVML), or None.
    """
    if device.type != "cuda":
        return {}
    try:
        utilisation: int | None = int(torch.cuda.utilization(device))
    except Exception:  # NVML's errors (MIG slices and some virtual GPUs report nothing), or a missing package
        utilisation = None
    return {"peak_bytes": int(torch.cuda.max_memory_allocated(device)), "utilisation": utilisation}
