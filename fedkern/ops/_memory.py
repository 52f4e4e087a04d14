"""Fresh output memory of the CPU kernels, and numbers brought to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Below this the system call costs as much as the page faults it saves.
HUGE = 4 << 20


def fresh(core: Any, tensor: Tensor) -> Tensor:
    """Returns ``tensor``, just allocated and about to be written by ``core``, backed by huge pages where it is large.

    First writes to fresh memory fault once per page; with 4 KB pages that costs more than the writing.
    """
    bytes_ = tensor.nbytes
    if bytes_ >= HUGE:
        core.advise_huge_pages(tensor.data_ptr(), bytes_)
    return tensor


def placed(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """``values`` on ``device``; on a GPU filled in there: a copy would wait for it and end a graph's capture."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
