"""Host helpers of the Triton kernels: launches on the right device, tile sizes, arguments that Triton cannot take."""

import functools
import struct
from collections.abc import Iterable
from typing import Any, TypeVar

import torch

from fedkern.ops._core.triton import INTERPRETED

T = TypeVar("T")


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **meta: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on ``device``, on torch's current stream there.

    As in csrc/, products and sums are not contracted, unless a kernel calls fma.
    """
    if not programs:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            kernel.run(*arguments, grid=(programs,), warmup=False, enable_fp_fusion=False, **meta)
    else:
        kernel.run(*arguments, grid=(programs,), warmup=False, enable_fp_fusion=False, **meta)


@functools.cache
def processors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 1  # programs run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def double_bits(value: float) -> int:
    """Return ``value``'s bits as an int64: Triton would round a float argument to fp32."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def pad_parameters(values: Iterable[T], filler: T) -> tuple[T, ...]:
    """Pad kernel parameters to a power of two, so that fewer kernels are compiled."""
    parameters = tuple(values)
    return parameters + (filler,) * (power_of_two(len(parameters)) - len(parameters))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
