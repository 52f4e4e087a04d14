"""Packets: pickled objects between two processes of one machine, with their tensors in shared memory.

A packet is a pickle and the memory files (``memfd_create``) of its tensors. A tensor that a :class:`Packer` has packed
before is only referred to, and its reader gets the same tensor object again.

The files are sealed, so that no process can change what another reads, and mapped privately, so that a process writes
to its own copy. They have no name: the memory is freed with the last process that maps it, however that ends.

Both ends are processes of one run: a packet is never read from a file. `engine/executors/shared_tensors.py` sends
packets over a socket, `engine/transport/connection.py` over a network. Nothing else in fedkern pickles.
"""

import io
import itertools
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fedkern.errors import describe_error
from fedkern.files.filesystem import fcntl

_ALIGNED = 64
_OPEN_FILES = 64  # most recent files that a packer keeps open, unless a message needs more


class NotPortable(Exception):
    """Error whose message names what cannot be sent, as the subject of a sentence."""


@dataclass(frozen=True)
class _Place:
    """Place of a tensor: number of the memory file, offset in bytes, dtype, shape and stride."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Packet:
    """A pickle and the memory files of its tensors, by file number: their descriptors, or their contents."""

    payload: bytes
    files: dict[int, int] = field(default_factory=dict)
    contents: dict[int, memoryview] = field(default_factory=dict)
    extra: Sequence[int] = ()

    @property
    def value(self) -> Any:
        return pickle.loads(self.payload)


class PacketStream:
    """One end of a connection between two processes of a run, over which packets travel whole and in order."""

    def __init__(self) -> None:
        self._sent: set[int] = set()  # memory files that the other end has

    def send(self, packet: Packet) -> None:
        """Send a packet, with the memory files that the other end does not have yet.

        After the connection's end packets are dropped, and only :meth:`receive` raises.
        """
        raise NotImplementedError

    def receive(self) -> Packet:
        """Return the next packet, however long it takes, or raise if the other end is gone."""
        raise NotImplementedError

    def say(self, value: object, extra: Sequence[int] = ()) -> None:
        """Send an object without tensors, with ``extra`` descriptors."""
        self.send(Packet(pickle.dumps(value), extra=extra))

    def receive_value(self) -> Any:
        return self.receive().value

    def forget(self) -> None:
        """Forget which files the other end has, when it drops them too."""
        self._sent.clear()


class Packer:
    """Packs objects, and keeps the last tensors and their files open until :meth:`clear`.

    Older tensors are packed again, so that few files are open, however many clients have states.
    """

    _numbers = itertools.count()  # file numbers, unique over all packers of the process

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[_Place, Tensor]] = {}
        self._files: dict[int, int] = {}

    def pack(self, value: object) -> Packet:
        """Pickle ``value``."""
        pickler = _Pickler(self._known, next(self._numbers))
        _dump(pickler, value)
        if pickler.fresh:
            self._files[pickler.number] = _write(pickler.fresh, pickler.size)
            pickler.used.add(pickler.number)
        for tensor, place in pickler.placed:
            self._known[_key(tensor)] = place, tensor
        for number in sorted(pickler.used):
            self._files[number] = self._files.pop(number)  # most recently used
        self._close(list(self._files)[: -max(_OPEN_FILES, len(pickler.used))])
        return Packet(pickler.file.getvalue(), {number: self._files[number] for number in sorted(pickler.used)})

    def clear(self) -> None:
        self._close([*self._files])
        self._known.clear()

    def _close(self, numbers: list[int]) -> None:
        if not numbers:
            return
        for number in numbers:
            os.close(self._files.pop(number))
        gone = set(numbers)
        self._known = {key: entry for key, entry in self._known.items() if entry[0].file not in gone}


def check_portable(value: object) -> None:
    """Raise NotPortable as :meth:`Packer.pack` does, without copying tensors and arrays."""
    _dump(_Light(io.BytesIO(), protocol=5), value)


def _dump(pickler: pickle.Pickler, value: object) -> None:
    try:
        pickler.dump(value)
    except NotPortable:
        raise
    except Exception as error:  # an object may raise anything when it is pickled
        raise NotPortable(f"something that cannot be pickled ({str(error).partition(chr(10))[0]})") from None


def only_code_bars(value: object) -> bool:
    """Return whether only functions, classes and modules prevent sending, so that a fork shares nothing open."""
    try:
        _Held(io.BytesIO(), protocol=5).dump(value)
    except Exception:  # an object may raise anything when it is pickled
        return False
    return True


class _Held(pickle.Pickler):
    def persistent_id(self, value: object) -> str | None:
        code = (type, FunctionType, BuiltinFunctionType, ModuleType)
        return "not looked at" if isinstance(value, (*code, Tensor, np.ndarray)) else None

    def reducer_override(self, value: object) -> Any:
        parametrized = isinstance(value, nn.Module) and is_parametrized(value)  # torch refuses to pickle those
        return (object, (), vars(value)) if parametrized else NotImplemented


class _Light(pickle.Pickler):
    def persistent_id(self, value: object) -> str | None:
        if isinstance(value, (type, FunctionType)) and value.__module__ == "__main__":
            raise NotPortable(f"{value.__qualname__}, which is defined in __main__,")
        return "values" if isinstance(value, (Tensor, np.ndarray)) else None


class _Pickler(pickle.Pickler):
    def __init__(self, tensors: dict[tuple[int, int], tuple[_Place, Tensor]], number: int) -> None:
        self.number = number  # number of the file that new tensors go to
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=5)
        self._known = tensors
        self.fresh: list[tuple[int, Tensor]] = []  # offset and a contiguous view
        self.placed: list[tuple[Tensor, _Place]] = []
        self._new: dict[tuple[int, int], _Place] = {}
        self.used: set[int] = set()
        self.size = 0

    def persistent_id(self, value: object) -> _Place | None:
        if type(value) is not Tensor:
            if isinstance(value, (type, FunctionType)) and value.__module__ == "__main__":
                raise NotPortable(f"{value.__qualname__}, which is defined in __main__,")
            return None
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            return None
        key = _key(value)
        if key in self._known:
            place = self._known[key][0]
            if value.numel():
                self.used.add(place.file)
            return place
        if key not in self._new:
            self._new[key] = self._place(value)
            self.placed.append((value, self._new[key]))
        return self._new[key]

    def _place(self, value: Tensor) -> _Place:
        plain = value.detach().resolve_conj().resolve_neg()
        dense = torch.empty_like(plain, device="meta").stride()  # a dense tensor's own strides: channels-last stays
        if plain.stride() != dense:
            plain = torch.empty_like(plain).copy_(plain)
        offset = -(-self.size // _ALIGNED) * _ALIGNED
        bytes_ = plain.numel() * plain.element_size()
        if bytes_:
            flat = plain.as_strided((plain.numel(),), (1,))
            self.fresh.append((offset, flat.view(torch.uint8)))
            self.size = offset + bytes_
        return _Place(self.number, offset, plain.dtype, tuple(plain.shape), tuple(plain.stride()))


def _key(tensor: Tensor) -> tuple[int, int]:
    """Return a held tensor's identity and version, so that a changed tensor is packed again."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _write(pieces: list[tuple[int, Tensor]], size: int) -> int:
    descriptor = os.memfd_create("fedkern", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        for offset, piece in pieces:
            unwritten = memoryview(piece.numpy().data)
            while unwritten:
                written = os.pwrite(descriptor, unwritten, offset)
                unwritten, offset = unwritten[written:], offset + written
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_file(descriptor: int) -> memoryview:
    """Return the content of a memory file, mapped privately, which outlives its descriptor.

    Python's own ``mmap`` would hold a second descriptor for as long.
    """
    size = os.fstat(descriptor).st_size
    name = f"/proc/self/fd/{descriptor}"
    return torch.from_file(name, shared=False, size=size, dtype=torch.uint8).numpy().data


class Unpacker:
    """Unpacks packets. Until :meth:`clear`, a tensor that came before is the same object again."""

    def __init__(self) -> None:
        self._maps: dict[int, memoryview] = {}
        self._tensors: dict[_Place, Tensor] = {}

    def unpack(self, packet: Packet) -> Any:
        self._maps.update(packet.contents)
        for number, descriptor in packet.files.items():
            if number not in self._maps:
                self._maps[number] = map_file(descriptor)
            os.close(descriptor)
        return _Unpickler(packet.payload, self).load()

    def tensor(self, place: _Place) -> Tensor:
        if place not in self._tensors:
            if count := math.prod(place.shape):
                flat = torch.frombuffer(self._maps[place.file], dtype=place.dtype, count=count, offset=place.offset)
                self._tensors[place] = flat.as_strided(place.shape, place.stride)
            else:
                self._tensors[place] = torch.empty(place.shape, dtype=place.dtype)
        return self._tensors[place]

    def clear(self) -> None:
        self._tensors.clear()
        self._maps.clear()


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, unpacker: Unpacker) -> None:
        super().__init__(io.BytesIO(payload))
        self._unpacker = unpacker

    def persistent_load(self, place: _Place) -> Tensor:
        return self._unpacker.tensor(place)


def copy_error(error: Exception) -> Exception:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(describe_error(error))
    return copy if type(copy) is type(error) else RuntimeError(describe_error(error))
