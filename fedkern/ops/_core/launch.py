"""Base of the launchers, which call ``fedkern._cpu`` and ``fedkern._cuda`` with the same arguments."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fedkern.ops._core.memory import fresh
from fedkern.ops._core.private_torch import raw_stream

_threads = torch.get_num_threads


class Launcher:
    """Calls of one compiled core by a family of operators.

    Both cores take tensors as they are (csrc/bindings/exchange.h), and :meth:`at` as the last argument.

    Attributes:
        core: ``fedkern._cpu`` or ``fedkern._cuda``.
        gpu: whether it is ``fedkern._cuda``, which tests may emulate on CPU tensors.
    """

    def __init__(self, core: ModuleType) -> None:
        self.core = core
        self.gpu = hasattr(core, "architectures")
        self.at: Callable[[Tensor], int] = _stream_of if self.gpu else lambda tensor: _threads()

    def fresh(self, tensor: Tensor) -> Tensor:
        """Move a large new CPU tensor, about to be written, to memory that is kept for such tensors."""
        return tensor if self.gpu else fresh(self.core, tensor)


def _stream_of(tensor: Tensor) -> int:
    """Return torch's current stream on the tensor's device, 0 for a CPU tensor (of an emulated core)."""
    index = tensor.get_device()
    return raw_stream(index) if index >= 0 and raw_stream is not None else 0
