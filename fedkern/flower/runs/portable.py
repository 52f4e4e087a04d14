"""Messages between a run's server and its nodes: bytes of a safetensors file with a JSON tree, without pickle.

The bytes come from another machine and are checked before use. Tensors keep the order of their strides, so that
networks compute with the same kernels and give the same bits.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkern.errors import Malformed
from fedkern.files.inputs import parse_json
from fedkern.messages.states import ABOUT, check_tensor, tree_of, value_of

LONGEST_TEXT = 4 << 20
"""Most bytes of a message beside its tensors."""
LARGEST_WHOLE = 1 << 64
LEAST_HALVED = 1024
"""Fewest elements of a tensor that may travel as bf16. Small tensors hold single figures and weigh nothing."""


def pack_value(value: object, *, half: bool = False) -> bytes:
    """Pack tensors, NumPy arrays, numbers, texts, None, and lists, tuples and dicts of these, or raise TypeError.

    A tensor in several places travels once. With ``half``, large fp32 tensors travel as bf16 and arrive as fp32.
    """
    tensors: dict[str, Tensor] = {}
    # The values are kept, so that no other object gets their ids.
    entries: dict[int, tuple[Tensor | np.ndarray, list[object]]] = {}

    def keep(value: Tensor | np.ndarray, where: str) -> list[object]:
        if id(value) not in entries:
            check_tensor(value, where)
            name = f"t{len(tensors)}"
            if isinstance(value, np.ndarray):
                tensor, can_halve = torch.from_numpy(np.ascontiguousarray(value)), False
            else:
                tensor, can_halve = value.detach(), half and value.dtype == torch.float32
            # Dimensions of one element go last among equal strides: PyTorch takes their strides for a memory format.
            order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], tensor.shape[dim] == 1))
            dense = tensor.permute(order).cpu().clone(memory_format=torch.contiguous_format)
            halved = can_halve and tensor.numel() >= LEAST_HALVED
            tensors[name] = dense.bfloat16() if halved else dense
            entries[id(value)] = value, [name, order, halved]
        return entries[id(value)][1]

    tree = tree_of(value, "message", keep, LARGEST_WHOLE)
    return save(tensors, {ABOUT: json.dumps(tree, allow_nan=False, separators=(",", ":"))})


def unpack_value(data: bytes) -> object:
    size = int.from_bytes(data[:8], "little")
    if size > LONGEST_TEXT:
        raise Malformed(f"has a text of {size:,} bytes where {LONGEST_TEXT:,} is the most")
    try:
        tensors = load(data)
        tree = parse_json(parse_json(data[8 : 8 + size].decode())["__metadata__"][ABOUT])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Malformed(f"cannot be read ({error})") from None
    known: dict[str, Tensor] = {}

    def tensor(entry: object) -> Tensor:
        name, order, halved = entry if isinstance(entry, list) and len(entry) == 3 else ("", [], False)
        if name not in tensors or not isinstance(order, list):
            raise Malformed("has a tensor that did not come with it")
        if name not in known:
            dense = tensors[name]
            if sorted(order) != [*range(dense.dim())]:
                raise Malformed(f"has {name} with dimensions that it does not have")
            plain = dense.permute([order.index(dim) for dim in range(dense.dim())])
            known[name] = plain.float() if halved else plain
        return known[name]

    return value_of(tree, tensor, LARGEST_WHOLE)
