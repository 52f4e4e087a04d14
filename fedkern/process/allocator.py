"""Settings of malloc that keep freed memory in the process, for its next tensors."""

import ctypes
import os
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
OWN_MAPPING = 256 << 20
"""Size in bytes from which freed blocks return to the system at once."""
_NEVER = 2**31 - 1
_SET_BY_HAND = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@cache
def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory instead of returning it to the system after every batch.

    A batch's activations are freed in its backward pass and allocated again in the next forward pass. By default the
    system unmaps, maps and zeroes them page by page, which takes a fifth to a third of a training step of a small
    network. The setting holds for the whole process.

    Returns:
        Whether freed memory is kept now. False with another C library, and if the user has configured malloc
        (``MALLOC_*``, ``GLIBC_TUNABLES``).
    """
    if (
        sys.platform == "win32"
        or any(name in os.environ for name in _SET_BY_HAND)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_THRESHOLD, OWN_MAPPING) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
