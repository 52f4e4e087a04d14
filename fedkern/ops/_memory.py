"""Memory for the large results of the CPU kernels, and numbers brought to a device."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Below this the system call costs as much as the page faults it saves.
HUGE = 4 << 20

# From here on results get memory of their own. malloc keeps smaller ones and hands them to whoever asks next, who finds
# them in a processor's cache: blend takes a fifth longer at 4 MB where its results lie elsewhere, and as long at 16.
KEPT = 16 << 20

# Freed memory that is kept for the next result, unless FEDKERN_CACHE_MB says otherwise.
CACHE_MB = 1024


class Cache:
    """Memory of large results, kept when they are freed, for the next ones of their size.

    The system hands out fresh memory page by page and zeroed, which takes longer than a kernel takes to write it: of a
    result of 168 MB half the time with huge pages, nine tenths without.  ``malloc`` keeps no block of more than 32 MB,
    and no more than 64 MB of smaller ones.

    What is kept is marked as free: the system takes it as soon as it runs short, so that it is in nobody's way.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.free: deque[mmap.mmap] = deque()  # its methods are atomic: results are freed in any thread, at any time

    def storage(self, size: int) -> torch.UntypedStorage:
        """``size`` bytes that come back when nothing refers to the storage any more."""
        memory = self._take(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        view = np.frombuffer(memory, np.uint8, size)
        # Python itself ends with results alive, whose memory then goes with the process.
        weakref.finalize(view, self._give, memory).atexit = False
        return torch.from_numpy(view).untyped_storage()

    def _take(self, size: int) -> mmap.mmap:
        for memory in reversed(list(self.free)):  # the latest is the likeliest to be in a processor's cache
            if len(memory) == size:
                try:
                    self.free.remove(memory)
                except ValueError:  # another thread was faster
                    continue
                return memory
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(memory, "MADV_HUGEPAGE")
        return memory

    def _give(self, memory: mmap.mmap) -> None:
        _advise(memory, "MADV_FREE")
        self.free.append(memory)
        self._trim(self.most)

    def _trim(self, most: int) -> None:
        """Gives the oldest back until at most ``most`` bytes are kept."""
        while sum(map(len, list(self.free))) > most:
            try:
                self.free.popleft()
            except IndexError:
                return

    def clear(self) -> None:
        self._trim(0)


def _advise(memory: mmap.mmap, name: str) -> None:
    """Advice only: a system that does not know it does without."""
    advice = getattr(mmap, name, None)
    if advice is not None:
        with contextlib.suppress(OSError):
            memory.madvise(advice)


@functools.cache
def cache() -> Cache:
    """The process's.

    Raises:
        ValueError: ``FEDKERN_CACHE_MB`` is not a number of megabytes.
    """
    given = os.environ.get("FEDKERN_CACHE_MB", "")
    if given and not given.isdecimal():
        raise ValueError(f"FEDKERN_CACHE_MB must be a whole number of megabytes, 0 or more, not {given!r}")
    return Cache((int(given) if given else CACHE_MB) << 20)


def empty_cache() -> None:
    """Gives the memory that is kept for large results on the CPU back to the system.

    Results of 16 MB and more get memory of their own, which is kept when they are freed, at most 1 GB
    (``FEDKERN_CACHE_MB`` says how much, 0 for none), since fresh memory costs more time than writing a result into it.
    It is marked as free, so that the system takes it by itself where it runs short; this gives it back at once.

    Raises:
        ValueError: ``FEDKERN_CACHE_MB`` is not a number of megabytes.
    """
    cache().clear()


def fresh(core: Any, tensor: Tensor) -> Tensor:
    """Returns ``tensor``, just allocated and about to be written by ``core``: in memory of the :class:`Cache` if large.

    What is too small or too large for that is backed by huge pages: first writes fault once per page.
    """
    bytes_ = tensor.nbytes
    if bytes_ < HUGE:
        return tensor
    kept = cache()
    if KEPT <= bytes_ <= kept.most and tensor.untyped_storage().nbytes() == bytes_:
        tensor.set_(kept.storage(bytes_), 0, tensor.shape, tensor.stride())
    else:
        core.advise_huge_pages(tensor.data_ptr(), bytes_)
    return tensor


def placed(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """``values`` on ``device``; on a GPU filled in there: a copy would wait for it and end a graph's capture."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
