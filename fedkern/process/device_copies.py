"""Tensors between the host and the device: small ones without waiting for it, vectors at the bus's speed."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device.

    The host does not wait for the device's earlier work.

    ``tensor.to("cuda")`` of ordinary memory returns when the copy is done, and the copy is queued behind every kernel
    that was launched before: a training step that picks its batch so leaves the GPU idle while the host prepares the
    next kernels.  From page-locked memory the copy is queued like a kernel.  Locking takes a copy on the host, so this
    is for indices and a batch's figures, not for whole data sets.

    Args:
        tensor: any shape and dtype, on any device; a tensor that is on ``device`` already is returned as it is.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    # Tensor.pin_memory() refuses an expanded tensor. The allocator keeps page-locked memory until the copy is done.
    staged = torch.empty_like(tensor, pin_memory=device.type == "cuda").copy_(tensor)
    return staged.to(device, non_blocking=True)


def to_host_async(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host without waiting for the device.

    The copy is valid after :func:`wait_for_stream`.  A tensor in the host's memory is returned itself.

    From a GPU it comes in page-locked memory, several times as fast as in ordinary memory, and nothing waits for it.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def wait_for_stream(device: torch.device) -> None:
    """Wait for the current stream's work."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def fetch(tensor: Tensor) -> Tensor:
    """Return the tensor in the host's memory.

    As it is where it is there already.
    """
    copied = to_host_async(tensor)
    wait_for_stream(tensor.device)
    return copied
