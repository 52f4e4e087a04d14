"""Memory for large results of the CPU kernels, and small tensors of numbers created on a device."""

import errno
import functools
import mmap
import operator
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes from which huge pages are asked for. Below this the system call costs as much as the page faults it saves.
HUGE = 4 << 20

# Bytes from which results get memory from the Cache below. malloc reuses smaller blocks while they are still in a
# processor's cache. With other memory blend takes a fifth longer at 4 MB; at 16 MB it takes the same time.
KEPT = 16 << 20


# Elements that the references take of long vectors at a time: temporaries of fp64 stay in a processor's cache.
PIECE = 1 << 17


class _Lent(weakref.ref[Any]):
    """Weak reference to the array through which a storage uses ``memory``."""

    __slots__ = ("madvise", "memory")
    memory: mmap.mmap
    madvise: Callable[[int], None]


# Callback of a weak reference that runs no Python code: a signal such as Ctrl-C that arrives in such code is lost.
_mark = operator.methodcaller("madvise", getattr(mmap, "MADV_FREE", 0))


class Cache:
    """Memory of freed large results, kept for later results of the same size.

    The system hands out fresh memory zeroed: even with huge pages this takes as long as a kernel takes to write the
    memory, without them ten times as long. ``malloc`` keeps no block of more than 32 MB, and 64 MB at most. Kept memory
    is marked as free: the system takes its pages when it runs short of memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Methods of deque and dict are atomic: results are freed in any thread, at any time.
        self._free: deque[mmap.mmap] = deque()
        self._returned: deque[_Lent] = deque()
        self._lent: dict[int, list[_Lent]] = {}
        self._marks = True

    def storage(self, size: int) -> torch.UntypedStorage:
        """Return a storage of ``size`` bytes, whose memory comes back when nothing refers to it any more."""
        memory = self._take(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        view = np.frombuffer(memory, np.uint8, size)
        back = _Lent(view, self._returned.append)
        back.memory = memory
        lent = self._lent[id(back)] = [back]
        if self._marks:
            mark = _Lent(view, _mark)  # callbacks run latest first: marked as free before it is returned
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
        """Return the kept memory, oldest first, after giving back all above the limit."""
        while self._returned:
            try:
                back = self._returned.popleft()
            except IndexError:  # another thread was faster
                break
            self._free.append(back.memory)
            self._lent.pop(id(back), None)
        self._trim(self.limit)
        return list(self._free)

    def _trim(self, limit: int) -> None:
        while sum(map(len, list(self._free))) > limit:
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
    advice = getattr(mmap, name, None)
    if advice is None:
        return False
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:  # any other error may come from a signal handler
            raise
        return False
    return True


@functools.cache
def cache() -> Cache:
    megabytes = os.environ.get("FEDKERN_CACHE_MB") or "1024"
    if not megabytes.isdecimal():
        raise ValueError(f"FEDKERN_CACHE_MB must be a whole number of megabytes, 0 or more, not {megabytes!r}")
    return Cache(int(megabytes) << 20)


def empty_cache() -> None:
    """Give the memory that is kept for large CPU results back to the system.

    Fresh memory costs as much time as writing a result into it. So the memory of results of 16 MB and more is kept for
    later results when they are freed: at most 1 GB, or ``FEDKERN_CACHE_MB`` megabytes (0 keeps none).
    Kept memory is marked as free, so the system takes its pages when it runs short. Limits on address space
    (``ulimit -v``, strict overcommit) count kept memory until this function gives it back.

    The storage of such a result cannot be resized (``untyped_storage().resize_()``, ``resize_()``, ``out=`` with a
    result of another size). The storage of its ``clone()`` can.

    Raises:
        ValueError: ``FEDKERN_CACHE_MB`` is not a number of megabytes.
    """
    cache().clear()


def fresh(core: ModuleType, tensor: Tensor) -> Tensor:
    """Move a large ``tensor``, just allocated and about to be written by ``core``, to memory of the :class:`Cache`.

    Elsewhere tensors from 4 MB on get huge pages: first writes fault once per page.
    """
    bytes_ = tensor.nbytes
    if bytes_ < HUGE:
        return tensor
    if bytes_ < KEPT or not _move_to_cache(tensor, bytes_):
        core.advise_huge_pages(tensor)
    return tensor


def _move_to_cache(tensor: Tensor, bytes_: int) -> bool:
    memory = cache()
    if bytes_ > memory.limit or tensor.untyped_storage().nbytes() != bytes_:
        return False
    # torch's deterministic mode has filled the tensor, so that elements left unwritten are the same in every run.
    # Memory of the cache is not filled.
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        return False
    try:
        tensor.set_(memory.storage(bytes_), 0, tensor.shape, tensor.stride())
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return False
    return True


def place_values(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return ``values`` as a tensor on ``device``, filled in on a GPU.

    A copy from the host would wait and end the capture of a CUDA graph.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
