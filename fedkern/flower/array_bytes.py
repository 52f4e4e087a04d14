"""Arrays of Flower messages as tensors and back, without copies or pickle: ``.npy`` bytes, or one flat vector.

A run's messages are bytes of a safetensors file with a JSON tree, without pickle. The bytes come from another machine
and are checked before use. Tensors keep the order of their strides, so that networks compute with the same kernels and
give the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import io
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkern.errors import Malformed
from fedkern.files.filesystem import parse_json
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


NUMPY = "numpy.ndarray"
"""Flower's own encoding: the bytes of a ``.npy`` file."""
FLAT = "fedkern.flat"
"""Name and encoding of a vector ``[P]`` of all floating entries, as raw little-endian bytes."""
LISTING = "fedkern.layout"
"""Name and encoding of the JSON that lists the entries of a flat record."""

FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
"""Floating dtypes by name. Only flat vectors can be bfloat16."""
DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000  # of NumPy's own limit, above which a header's evaluation may take too long
_MOST_SIZES, _MOST_ELEMENTS = 64, 2**48
# Not the attributes of ctypes.pythonapi, whose types others may set.
_new_bytes: Any = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


class Misfit(Exception):
    """A reply that does not fit, with a word for the fault as ``reason`` (see `averaging.LeftOut`)."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class FlowerArray(Protocol):
    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


class Header(NamedTuple):
    """Form of an array: dtype as in ``numpy.dtype.name`` or "bfloat16", and shape.

    ``order`` is the memory order, ``begin`` the offset of the first element. ``swapped`` means the foreign byte order.
    """

    dtype: str
    shape: tuple[int, ...]
    order: Literal["C", "F"] = "C"
    begin: int = 0
    swapped: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(array: FlowerArray, name: str) -> Header:
    """Return the form of an array, plain or flat, or raise Misfit if its bytes do not match it."""
    data = array.data
    if array.stype == FLAT:
        if array.dtype not in FLOATS or len(array.shape) != 1 or not is_shape(array.shape):
            raise Misfit("dtypes", f"has {name} of another form than that of a flat vector")
        form, size = Header(array.dtype, tuple(array.shape)), FLOATS[array.dtype].itemsize
    elif array.stype == NUMPY:
        start = 10 if data[6:7] == b"\x01" else 12
        length = start + int.from_bytes(data[8:start], "little")
        if data[:6] != _MAGIC or length > min(len(data), _LONGEST_HEADER):
            raise Misfit("size", f"has {name} without the header of a .npy file")
        try:
            form, size = _parse_header(data[:length])
        except Exception as error:  # the header is a client's: NumPy may raise what it likes
            kind = type(error).__name__
            raise Misfit("dtypes", f"has {name} with a header that NumPy cannot read ({kind})") from None
    else:
        raise Misfit("dtypes", f"has {name} in the encoding {str(array.stype)[:80]!r}, which is not known")
    if len(data) - form.begin != form.elements * size:
        raise Misfit(
            "size", f"has {name} of {len(data) - form.begin} bytes where {form.elements * size} belong to its shape"
        )
    return form


@functools.lru_cache(maxsize=4096)  # the models of a round have the same headers
def _parse_header(data: bytes) -> tuple[Header, int]:
    stream = io.BytesIO(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise TypeError(dtype)
    if not is_shape(shape):
        raise ValueError("shape")
    return Header(dtype.name, tuple(shape), "F" if fortran else "C", len(data), not dtype.isnative), dtype.itemsize


def is_shape(sizes: Sequence[int]) -> bool:
    """Return whether an array of these sizes can fit into memory. Sizes of 0 count as 1."""
    if len(sizes) > _MOST_SIZES or any(type(size) is not int or not 0 <= size <= _MOST_ELEMENTS for size in sizes):
        return False
    return math.prod(max(size, 1) for size in sizes) <= _MOST_ELEMENTS


def as_tensor(array: FlowerArray, form: Header) -> Tensor:
    """Return a floating array as a read-only vector ``[n]`` in the array's memory.

    Arrays in Fortran order or foreign byte order are copied.
    """
    dtype, data, begin, count = FLOATS[form.dtype], array.data, form.begin, form.elements
    if form.order == "F" or form.swapped:
        return torch.from_numpy(np.array(as_numpy(array, form), order="C").reshape(-1))
    if not count:
        return torch.empty(0, dtype=dtype)
    address = _address(data)
    if (address + begin) % dtype.itemsize:  # only a foreign writer's header has such a length
        data, begin = data[begin:], 0
        address = _address(data)
    return _share_memory(data, address, dtype, count, begin)


def join_tensors(arrays: Sequence[tuple[FlowerArray, Header]]) -> Tensor:
    """Join floating arrays into one vector. A single array is not copied."""
    if len(arrays) == 1:
        return as_tensor(*arrays[0])
    dtype = arrays[0][1].dtype
    if any(form.dtype != dtype or form.order == "F" or form.swapped for _, form in arrays):
        return torch.cat([as_tensor(*array) for array in arrays])
    data = bytearray().join([memoryview(array.data)[form.begin :] for array, form in arrays])
    return torch.frombuffer(data, dtype=FLOATS[dtype]) if data else torch.empty(0, dtype=FLOATS[dtype])


def _address(data: bytes) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def as_numpy(array: FlowerArray, form: Header) -> np.ndarray:
    dtype = np.dtype(form.dtype)
    stored = dtype.newbyteorder() if form.swapped else dtype
    if not form.elements:
        return np.empty(form.shape, dtype)
    view = np.frombuffer(array.data, stored, form.elements, form.begin).reshape(form.shape, order=form.order)
    return np.asarray(view, dtype)


def npy_bytes(vector: np.ndarray, shape: tuple[int, ...]) -> bytes:
    """Return a contiguous array as a ``.npy`` file of the given shape, with one copy."""
    flat: Any = vector.reshape(-1)
    return b"".join((npy_header(vector.dtype.str, shape), flat.view(np.uint8).data))


@functools.lru_cache(maxsize=4096)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def allocate_bytes(head: bytes, dtype: torch.dtype, count: int) -> tuple[bytes, Tensor]:
    """Return new bytes that begin with ``head``, and a vector of ``count`` uninitialised elements in them.

    Write to the vector only until other code sees the bytes. CPython allows that for bytes that
    PyBytes_FromStringAndSize made without a string.
    """
    if not count:
        return bytes(head), torch.empty(0, dtype=dtype)
    data: bytes = _new_bytes(None, len(head) + count * dtype.itemsize)
    address = _address(data)
    ctypes.memmove(address, head, len(head))
    return data, _share_memory(data, address, dtype, count, len(head))


def _share_memory(data: bytes, address: int, dtype: torch.dtype, count: int, begin: int) -> Tensor:
    """Return a vector in the memory of ``data`` at ``address``. The vector keeps ``data`` alive."""
    # torch.frombuffer warns of read-only bytes.
    memory: Any = (ctypes.c_char * len(data)).from_address(address)
    memory.owner = data
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)


def raw_bytes(vector: Tensor) -> bytes:
    return bytes(vector.view(torch.uint8).numpy().data) if vector.numel() else b""
