"""flat: the place of each of a module's tensors in its flat vector."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

# (owner, attribute, qualified name, tensor, is parameter)
Entry = tuple[nn.Module, str, str, Tensor, bool]


class FlatGroup(NamedTuple):
    """The flat tensors of one dtype.

    Attributes:
        vector: ``[P + Q]``, all elements of that dtype.
        parameters: ``[P]``, its first elements: the module's parameters in the order of ``module.parameters()``.
        buffers: ``[Q]``, the rest: floating buffers in the order of ``module.buffers()``.
    """

    vector: Tensor
    parameters: Tensor
    buffers: Tensor


class Slot(NamedTuple):
    """One tensor of the module and its place in the vector."""

    owner: nn.Module
    key: str  # attribute of the owner
    name: str  # qualified name, as in state_dict
    tensor: Tensor
    is_parameter: bool
    vector: Tensor
    stride: tuple[int, ...]
    offset: int  # in elements, within its group's vector

    def current(self) -> Tensor | None:
        return (self.owner._parameters if self.is_parameter else self.owner._buffers).get(self.key)

    def in_place(self) -> bool:
        tensor = self.current()
        if tensor is None or tensor.dtype != self.vector.dtype or tensor.stride() != self.stride:
            return False
        # Relative to the vector, whose storage may be freed and reallocated; a tensor without elements has no place.
        place = self.vector.data_ptr() + self.offset * self.vector.element_size()
        return not tensor.numel() or (tensor.device == self.vector.device and tensor.data_ptr() == place)


def tensors_of(module: nn.Module) -> Iterator[Entry]:
    """Yields (owner, attribute, qualified name, tensor, is parameter); a shared tensor once, under its first name."""
    seen: set[int] = set()
    for is_parameter in (True, False):
        for prefix, owner in module.named_modules():
            members = owner._parameters if is_parameter else owner._buffers
            for key, tensor in members.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                yield owner, key, f"{prefix}.{key}" if prefix else key, tensor, is_parameter


def check_tensors(found: list[Entry]) -> None:
    device: torch.device | None = None
    for _, _, name, tensor, is_parameter in found:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name!r} is not initialised yet; run the lazy module once before flattening it")
        if type(tensor) is not Tensor and not (is_parameter and type(tensor) is nn.Parameter):
            raise TypeError(
                f"{name!r} is a {type(tensor).__name__}; only plain tensors and parameters can be flattened"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name!r} has layout {tensor.layout}; only strided tensors can be flattened")
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name!r} is on the meta device; give it values (to_empty, load_state_dict) before flattening"
            )
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(
                f"all tensors must be on one device: {name!r} is on {tensor.device}, others are on {device}"
            )


def flatten_group(entries: list[Entry]) -> tuple[FlatGroup, list[Slot]]:
    # Tensors that view exactly the same memory (weight = other.weight.data) keep sharing it.
    placed: dict[tuple[int, torch.Size, tuple[int, ...]], int] = {}
    offsets, sources, taken, end, parameters = [], [], [], 0, 0
    for _, _, name, tensor, is_parameter in entries:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in placed:
            offsets.append(placed[key])
        else:
            placed[key] = end
            offsets.append(end)
            sources.append((tensor, end))
            taken.append((tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name))
            end += tensor.numel()
        if is_parameter:
            parameters = end
    taken.sort()
    for (_, stop, name), (start, _, other) in itertools.pairwise(taken):
        if start < stop:
            raise ValueError(f"{name!r} and {other!r} overlap in memory without being the same tensor")
    first = entries[0][3]
    vector = torch.empty(end, dtype=first.dtype, device=first.device)
    slots = []
    with torch.no_grad():
        strides = {id(tensor): _dense_stride(tensor) for _, _, _, tensor, _ in entries}
        for tensor, offset in sources:
            torch.as_strided(vector, tensor.shape, strides[id(tensor)], offset).copy_(tensor)
        for (owner, key_, name, tensor, is_parameter), offset in zip(entries, offsets, strict=True):
            stride = strides[id(tensor)]
            slot = Slot(owner, key_, name, tensor, is_parameter, vector, stride, offset)
            tensor.data = view_of(vector, slot)
            slots.append(slot)
    return FlatGroup(vector, vector[:parameters], vector[parameters:]), slots


def view_of(flat: Tensor, slot: Slot) -> Tensor:
    """The slot's piece of ``flat``, in the slot's shape and strides."""
    return flat[slot.offset : slot.offset + slot.tensor.numel()].as_strided(slot.tensor.shape, slot.stride)


def shaped(piece: Tensor, slot: Slot) -> Tensor:
    """A piece of a vector in the slot's shape and strides, by differentiable views that vmap supports."""
    order = sorted(range(slot.tensor.dim()), key=lambda axis: (-slot.stride[axis], -slot.tensor.shape[axis]))
    in_memory = piece.view([slot.tensor.shape[axis] for axis in order])
    back = sorted(range(len(order)), key=lambda position: order[position])
    return in_memory.permute(back)


def _extent(tensor: Tensor) -> int:
    """Bytes from the start of the first element to the end of the last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides if it fills its memory without gaps or overlaps, else those of a dense copy in its order."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
