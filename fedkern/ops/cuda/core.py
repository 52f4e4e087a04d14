"""Helpers of the CUDA launchers: the compiled core, the device and stream of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import _C, Tensor

from fedkern.ops import backend, devices, loading

# The stream's number, in a tenth of the time that it takes through torch.cuda's Python objects.
_raw_stream: Callable[[int], int] | None = getattr(_C, "_cuda_getCurrentRawStream", None)


def load() -> ModuleType:
    """Returns ``fedkern._cuda``.

    Raises:
        Unavailable: the core was not built or does not load, torch is a build without CUDA, or a GPU or its driver is
            too old.
    """
    core = loading.load_core("_cuda")
    if _raw_stream is None:
        raise loading.Unavailable("fedkern._cuda is built, but torch is a build without CUDA")
    devices.check_cuda(core)
    return core


def register(operator: str, launcher: Callable[[Any], Any], dtypes: frozenset[Any]) -> None:
    """Lets ``launcher`` around the compiled core serve ``operator`` on CUDA tensors."""
    backend.register(operator, "cuda", backend.Kernel(lambda: launcher(load()), dtypes, frozenset({"cuda"})))


def queue(tensor: Tensor) -> tuple[int, int]:
    """The device's number and torch's current stream there; zeros for a CPU tensor (of an emulated core)."""
    index = tensor.get_device()
    return (index, _raw_stream(index)) if index >= 0 and _raw_stream is not None else (0, 0)
