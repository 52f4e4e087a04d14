"""Base of the launchers: what calls ``fedkern._cpu`` and ``fedkern._cuda``, whose functions take the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fedkern.ops._core.memory import fresh
from fedkern.ops._core.private_torch import raw_stream

_threads = torch.get_num_threads


class Launcher:
    """A family's calls of one compiled core.

    Both cores take tensors as they are (csrc/bindings/exchange.h) and None for an absent one.  The last argument of
    every function is :meth:`at`.

    Attributes:
        core: ``fedkern._cpu`` or ``fedkern._cuda``.
        gpu: whether it is ``fedkern._cuda``.  It may run emulated, on CPU tensors, in the tests.
    """

    def __init__(self, core: ModuleType) -> None:
        self.core = core
        self.gpu = hasattr(core, "architectures")
        self.at: Callable[[Tensor], int] = _stream_of if self.gpu else _threads_of

    def fresh(self, tensor: Tensor) -> Tensor:
        """``tensor``, just allocated and about to be written.

        Large ones on the CPU in memory that is kept for them.
        """
        return tensor if self.gpu else fresh(self.core, tensor)


def _threads_of(tensor: Tensor) -> int:
    """Return the CPU's threads."""
    return _threads()


def _stream_of(tensor: Tensor) -> int:
    """Return torch's current stream on the tensor's device.

    0 for a CPU tensor (of an emulated core).
    """
    index = tensor.get_device()
    return raw_stream(index) if index >= 0 and raw_stream is not None else 0
