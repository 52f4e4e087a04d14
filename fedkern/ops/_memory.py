"""Memory for the large results of the CPU kernels, and numbers brought to a device."""

from __future__ import annotations

import errno
import functools
import mmap
import operator
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
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


class _Lent(weakref.ref[Any]):
    """To what is lent to a storage, from ``memory``."""

    __slots__ = ("madvise", "memory")
    memory: mmap.mmap
    madvise: Callable[[int], None]


# A weak reference's callback in which Python runs no line: a signal that arrives in one, such as Ctrl-C's, is lost.
_mark = operator.methodcaller("madvise", getattr(mmap, "MADV_FREE", 0))


class Cache:
    """Memory of large results, kept when they are freed, for the next ones of their size.

    The system hands out fresh memory page by page and zeroed, which takes as long as a kernel takes to write it even
    with huge pages, and ten times as long without.  ``malloc`` keeps no block of more than 32 MB, and no more than
    64 MB of smaller ones.

    What is kept is marked as free: the system takes its pages as soon as it runs short of memory.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        # Their methods are atomic: results are freed in any thread, at any time.
        self._free: deque[mmap.mmap] = deque()
        self._returned: deque[_Lent] = deque()
        self._lent: dict[int, list[_Lent]] = {}
        self._marks = True

    def storage(self, size: int) -> torch.UntypedStorage:
        """``size`` bytes that come back when nothing refers to the storage any more.

        Raises:
            OSError: there is no memory.
        """
        memory = self._take(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        view = np.frombuffer(memory, np.uint8, size)
        back = _Lent(view, self._returned.append)
        back.memory = memory
        lent = self._lent[id(back)] = [back]
        if self._marks:
            mark = _Lent(view, _mark)  # the later one is called first
            mark.madvise = memory.madvise
            lent.append(mark)
        return torch.from_numpy(view).untyped_storage()

    def _take(self, size: int) -> mmap.mmap:
        for memory in reversed(self.free()):  # the latest is the likeliest to be in a processor's cache
            if len(memory) == size:
                try:
                    self._free.remove(memory)
                except ValueError:  # another thread was faster
                    continue
                return memory
        try:
            memory = _map(size)
        except OSError:
            self.clear()
            memory = _map(size)
        # Locked memory can't be marked.
        self._marks = _advise(memory, "MADV_FREE")
        _advise(memory, "MADV_HUGEPAGE")
        return memory

    def free(self) -> list[mmap.mmap]:
        """What is kept, the oldest first; more than ``most`` bytes only until this is called."""
        while self._returned:
            try:
                back = self._returned.popleft()
            except IndexError:  # another thread was faster
                break
            self._free.append(back.memory)
            self._lent.pop(id(back), None)
        self._trim(self.most)
        return list(self._free)

    def _trim(self, most: int) -> None:
        """Gives the oldest back until at most ``most`` bytes are kept."""
        while sum(map(len, list(self._free))) > most:
            try:
                self._free.popleft()
            except IndexError:
                return

    def clear(self) -> None:
        self.free()
        self._trim(0)


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _advise(memory: mmap.mmap, name: str) -> bool:
    """Whether the system took the advice; it can do without."""
    advice = getattr(mmap, name, None)
    if advice is None:
        return False
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what else there is may be a signal handler's
            raise
        return False
    return True


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
    (``FEDKERN_CACHE_MB`` says how much, 0 for none), since fresh memory costs as much time as writing a result into it.
    It is marked as free, so that the system takes its pages by itself where it runs short; limits on address space
    (``ulimit -v``, strict overcommit) count it until this gives it back.

    The storage of such a result cannot be resized (``untyped_storage().resize_()``, ``resize_()``, ``out=`` with a
    result of another size); that of a ``clone()`` can.

    Raises:
        ValueError: ``FEDKERN_CACHE_MB`` is not a number of megabytes.
    """
    cache().clear()


def fresh(core: Any, tensor: Tensor) -> Tensor:
    """Returns ``tensor``, just allocated and about to be written by ``core``: in memory of the :class:`Cache` if large.

    What is smaller, too large for that, or finds no memory there is backed by huge pages from 4 MB on: first writes
    fault once per page.
    """
    bytes_ = tensor.nbytes
    if bytes_ < HUGE:
        return tensor
    if bytes_ < KEPT or not _moved(tensor, bytes_):
        core.advise_huge_pages(tensor.data_ptr(), bytes_)
    return tensor


def _moved(tensor: Tensor, bytes_: int) -> bool:
    """Whether ``tensor`` lies in memory of the cache now."""
    kept = cache()
    if bytes_ > kept.most or tensor.untyped_storage().nbytes() != bytes_:
        return False
    # In torch's deterministic mode what is not written has been filled, so that it is the same in every run.
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        return False
    try:
        tensor.set_(kept.storage(bytes_), 0, tensor.shape, tensor.stride())
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return False
    return True


def placed(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """``values`` on ``device``; on a GPU filled in there: a copy would wait for it and end a graph's capture."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
