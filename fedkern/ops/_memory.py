"""Fresh output memory of the CPU kernels."""

from __future__ import annotations

from typing import Any

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
