"""Copies of tensors between host and device: small ones without waiting, vectors at the bus's speed."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device, without waiting for the device's earlier work.

    ``tensor.to("cuda")`` of ordinary memory waits for every kernel that was launched before, so the GPU idles while the
    host prepares the next ones. From page-locked memory the copy is queued like a kernel. Locking takes a copy on the
    host, so this is for indices and figures, not for whole data sets.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    # Tensor.pin_memory() refuses an expanded tensor. The allocator keeps page-locked memory until the copy is done.
    staged = torch.empty_like(tensor, pin_memory=device.type == "cuda").copy_(tensor)
    return staged.to(device, non_blocking=True)


def to_host_async(tensor: Tensor) -> Tensor:
    """Copy to the host without waiting, for use after :func:`wait_for_stream`.

    From a GPU the copy is in page-locked memory, several times as fast. A tensor in the host's memory is returned
    itself.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def wait_for_stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def fetch(tensor: Tensor) -> Tensor:
    """Return the tensor in the host's memory, itself if it is there."""
    copied = to_host_async(tensor)
    wait_for_stream(tensor.device)
    return copied
