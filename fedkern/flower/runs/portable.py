"""Messages between a run's server and its clients' nodes: a JSON text and named arrays of bytes; no pickle.

What arrives comes from another machine and is checked before anything is made of it.  A tensor keeps its strides:
channels-last images arrive as such, so that networks compute with the same kernels and give the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.files.inputs import parse_json
from fedkern.flower.array_bytes import raw_bytes
from fedkern.flower.runs.packed_message import Malformed, PackedMessage, Raw
from fedkern.messages.states import tree_of

DTYPES = {
    "float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
    "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
"""Element types that travel, by name."""

LONGEST_TEXT = 4 << 20
"""Most characters of the JSON text of a message."""
LARGEST_WHOLE = 1 << 64
"""Whole numbers of a message are smaller, and so are their negatives."""
LEAST_HALVED = 1024
"""Elements from which on an fp32 tensor may travel as bf16: small ones hold single figures, and weigh nothing."""
DEEPEST = 64
"""Most dicts and lists that stand in one another."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack(value: Any, *, half: bool = False) -> PackedMessage:
    """Packs tensors (of `DTYPES`), NumPy arrays, numbers, texts, None, and lists, tuples and dicts of these.

    A tensor that stands in several places travels once.

    Args:
        half: whether fp32 tensors of at least `LEAST_HALVED` elements travel as bf16, rounded to nearest; they arrive
            as fp32 again.

    Raises:
        TypeError: ``value`` holds something else; the message says where.
    """
    tensors: dict[str, Raw] = {}
    entries: dict[int, tuple[Any, dict[str, Any]]] = {}

    def tensor(value: Any, where: str) -> dict[str, Any]:
        if id(value) not in entries:
            entries[id(value)] = value, _tensor(value, f"t{len(tensors)}", where, tensors, half)
        return entries[id(value)][1]

    tree = tree_of(value, "message", tensor, LARGEST_WHOLE)
    return PackedMessage(json.dumps(tree, allow_nan=False, separators=(",", ":")), tensors)


def _tensor(value: Any, name: str, where: str, tensors: dict[str, Raw], half: bool) -> dict[str, Any]:
    array = isinstance(value, np.ndarray)
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if array else value.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in _NAMES:
        raise TypeError(f"{where} is a {tensor.layout} tensor of {tensor.dtype}, which cannot travel")
    plain = tensor.resolve_conj().resolve_neg().cpu()
    plain = torch.empty_like(plain).copy_(plain) if _gaps(tuple(plain.shape), plain.stride()) else plain
    flat = plain.as_strided((plain.numel(),), (1,)) if plain.numel() else plain.reshape(-1)
    halved = half and not array and tensor.dtype == torch.float32 and plain.numel() >= LEAST_HALVED
    if halved:
        flat = flat.bfloat16()
    tensors[name] = Raw(_NAMES[flat.dtype], tuple(plain.shape), raw_bytes(flat))
    kind = "array" if array else "halved" if halved else "tensor"
    return {kind: [name, list(plain.stride())]}


def _gaps(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements of a tensor do not lie side by side, each once, from its beginning on."""
    if not math.prod(shape):
        return False
    due = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step != due:
            return True
        due *= size
    return False


def unpack(packed: PackedMessage) -> Any:
    """The value that was packed, its tensors on the CPU, in memory of their own.

    Raises:
        Malformed: the packed message was not made by :func:`pack`.
    """
    if len(packed.text) > LONGEST_TEXT:
        raise Malformed(f"has a text of {len(packed.text):,} characters where {LONGEST_TEXT:,} is the most")
    try:
        tree = parse_json(packed.text)
    except ValueError:
        raise Malformed("has a text that is not JSON") from None
    cache: dict[str, Tensor] = {}
    value = _unpack_tree(tree, packed.tensors, cache, 0)
    if unnamed := [name for name in packed.tensors if name not in cache]:
        raise Malformed(f"holds an array, {unnamed[0][:80]!r}, that its text does not name")
    return value


def _unpack_tree(tree: Any, tensors: Mapping[str, Raw], cache: dict[str, Tensor], depth: int) -> Any:
    if depth > DEEPEST:
        raise Malformed("has dicts and lists that stand too deep in one another")
    if tree is None or isinstance(tree, (str, bool)):
        return tree
    if isinstance(tree, int):
        if abs(tree) >= LARGEST_WHOLE:
            raise Malformed("has a whole number of more than 64 bits")
        return tree
    if isinstance(tree, float) and math.isfinite(tree):
        return tree
    if not isinstance(tree, dict) or len(tree) != 1:
        raise Malformed("has a text that describes no message")
    ((kind, value),) = tree.items()
    if kind in ("tensor", "array", "halved"):
        tensor = _made(value, tensors, cache, kind == "halved")
        return tensor.numpy() if kind == "array" else tensor
    if kind == "float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind in ("list", "tuple") and isinstance(value, list):
        entries = [_unpack_tree(entry, tensors, cache, depth + 1) for entry in value]
        return entries if kind == "list" else tuple(entries)
    if kind == "dict" and isinstance(value, list):
        result: dict[Any, Any] = {}
        for pair in value:
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)):
                raise Malformed("has a dict that is none")
            result[pair[0]] = _unpack_tree(pair[1], tensors, cache, depth + 1)
        return result
    raise Malformed("has a text that describes no message")


def _made(value: Any, tensors: Mapping[str, Raw], cache: dict[str, Tensor], halved: bool) -> Tensor:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], list)):
        raise Malformed("has a tensor that is none")
    name, stride = value
    if name not in tensors:
        raise Malformed(f"names an array, {name[:80]!r}, that did not come with it")
    if name not in cache:
        tensor = _with_strides(name, tensors[name], stride)
        if halved and tensor.dtype != torch.bfloat16:
            raise Malformed(f"has {name} of {tensor.dtype} where bf16 is said to come")
        cache[name] = tensor.float() if halved else tensor
    return cache[name]


def _with_strides(name: str, raw: Raw, stride: list[Any]) -> Tensor:
    dtype, shape = DTYPES.get(raw.dtype), raw.shape
    if dtype is None:
        raise Malformed(f"has {name} of the type {raw.dtype[:80]!r}, which is not known")
    sizes = all(type(size) is int and 0 <= size < 1 << 48 for size in shape) and len(shape) <= 16
    if not sizes or math.prod(size for size in shape if size) >= 1 << 48:  # PyTorch has strides of empty tensors too
        raise Malformed(f"has {name} in a shape that no tensor has")
    if len(raw.data) != math.prod(shape) * dtype.itemsize:
        raise Malformed(f"has {name} of {len(raw.data)} bytes where {math.prod(shape) * dtype.itemsize} belong to it")
    if len(stride) != len(shape) or any(type(step) is not int or not 0 <= step < 1 << 60 for step in stride):
        raise Malformed(f"has {name} with strides that no tensor has")
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    if _gaps(shape, tuple(stride)):
        raise Malformed(f"has {name} with strides that leave gaps")
    # A copy: the bytes of a message cannot be written to, and a method may work in a received tensor.
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).as_strided(shape, stride)
