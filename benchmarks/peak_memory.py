"""Peak memory of a call beyond its inputs."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedkern import ops

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Run once more and return the rise of memory at its highest point, or None where that cannot be seen.

    On a GPU torch's allocator counts.  On the CPU the kernel does: the high-water mark of resident memory is set back
    first, and free memory that malloc and fedkern hold is returned, so that all memory of torch, NumPy and compiled
    code is in it, to a page.  (The counters are per process: other threads must be quiet.)

    Gradients left by the call before are dropped first, and so count as memory of this call.
    """
    gc.collect()
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_leaf and tensor.requires_grad:
            tensor.grad = None
    del tensor
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    try:
        ops.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        held = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - held, 0)
    except (OSError, AttributeError, KeyError):
        return None


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
