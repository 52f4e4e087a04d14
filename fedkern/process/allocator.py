"""malloc settings with which memory that a process frees stays with it, for its next tensors."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
OWN_MAPPING = 256 << 20
"""Blocks of at least this many bytes go back to the system as soon as they are freed."""
_NEVER = 2**31 - 1
_SET_BY_HAND = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@cache
def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory instead of giving it back to the system after every batch.

    A batch's activations are freed in its backward pass and allocated again in the next batch's forward pass.  By
    default malloc gives such blocks back, and the system maps and zeroes them page by page again.  That takes a fifth
    to a third of a training step of a small network.  The setting holds for the whole process, and a second call
    changes nothing.

    Returns:
        Whether freed memory is kept now.  False with another C library, and where the user has set malloc otherwise
        (``MALLOC_*``, ``GLIBC_TUNABLES``).
    """
    if any(name in os.environ for name in _SET_BY_HAND) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (
        mallopt is not None
        and bool(mallopt(_M_MMAP_THRESHOLD, OWN_MAPPING))
        and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    )
