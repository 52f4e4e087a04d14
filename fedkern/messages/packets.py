"""Packets: objects sent between two processes of one machine, pickled, with their tensors in shared memory.

A packet is a pickle and the memory files (``memfd_create``) that hold its tensors.  A tensor that a :class:`Packer` has
packed before is referred to, not written again; a reader that unpacks both packets gets the same tensor object.

The files are sealed, so that no process can change what another process reads.  They are mapped privately, so that a
process that writes to a tensor writes to its own copy.  They have no name in the file system: the memory is freed when
the last process that maps it ends, however it ends.

Both ends are processes of one run: a packet is never read from a file.  `engine/executors/shared_tensors.py` sends
packets over a socket, `engine/transport/connection.py` over a network.  Nothing else in fedkern pickles.
"""

from __future__ import annotations

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
_OPEN_FILES = 64  # files that a packer keeps open, those used last, where a message does not need more


class NotPortable(Exception):
    """Something cannot be sent to another process.

    The message says what, as the subject of a sentence.
    """


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: number of the memory file, offset in bytes, dtype, shape and stride."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Packet:
    """A pickle and the memory files that hold its tensors, by file number: their descriptors, or their contents.

    Attributes:
        more: descriptors that travel beside the files, between processes of one machine.
    """

    payload: bytes
    files: dict[int, int] = field(default_factory=dict)
    contents: dict[int, memoryview] = field(default_factory=dict)
    extra: Sequence[int] = ()

    @property
    def value(self) -> Any:
        """The object, which holds no tensors."""
        return pickle.loads(self.payload)


class PacketStream:
    """One end of a connection between two processes of a run, over which packets travel whole and in order."""

    def __init__(self) -> None:
        self._sent: set[int] = set()  # memory files that the other end has

    def send(self, packet: Packet) -> None:
        """Send a packet, with the memory files that the other end does not have yet.

        A connection that is over takes packets and drops them: :meth:`receive` tells.
        """
        raise NotImplementedError

    def receive(self) -> Packet:
        """Return the next packet, however long it takes.

        Raises where the other end is gone.
        """
        raise NotImplementedError

    def say(self, value: object, extra: Sequence[int] = ()) -> None:
        """Send an object that holds no tensors, with ``more`` descriptors."""
        self.send(Packet(pickle.dumps(value), extra=extra))

    def receive_value(self) -> Any:
        """Receives an object that the other end sent with :meth:`say`."""
        return self.receive().value

    def forget(self) -> None:
        """Forgets which files the other end has.

        Called when the other end drops them too.
        """
        self._sent.clear()


class Packer:
    """Packs objects.  It holds the tensors packed last, and keeps their files open, until :meth:`clear`.

    A tensor that was not packed for long is packed anew, so that however many clients have states of their own, few
    files are open.
    """

    _numbers = itertools.count()  # file numbers, unique over all packers of the process

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[_Place, Tensor]] = {}
        self._files: dict[int, int] = {}

    def pack(self, value: object) -> Packet:
        """Pickles ``value``.

        Raises:
            NotPortable: something in it is defined in ``__main__``, or cannot be pickled.
        """
        pickler = _Pickler(self._known, next(self._numbers))
        try:
            pickler.dump(value)
        except NotPortable:
            raise
        except Exception as error:  # an object may raise anything when it is pickled
            raise NotPortable(f"something that cannot be pickled ({str(error).partition(chr(10))[0]})") from None
        if pickler.fresh:
            self._files[pickler.number] = _write(pickler.fresh, pickler.size)
            pickler.used.add(pickler.number)
        for tensor, place in pickler.placed:
            self._known[_key(tensor)] = place, tensor
        for number in sorted(pickler.used):
            self._files[number] = self._files.pop(number)  # used last
        self._close(list(self._files)[: -max(_OPEN_FILES, len(pickler.used))])
        return Packet(pickler.file.getvalue(), {number: self._files[number] for number in sorted(pickler.used)})

    def clear(self) -> None:
        """Close the files.

        A process that has mapped one keeps the memory.
        """
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
    """Raise NotPortable as :meth:`Packer.pack` does.

    Tensors and arrays are not copied for it.
    """
    try:
        _Light(io.BytesIO(), protocol=5).dump(value)
    except NotPortable:
        raise
    except Exception as error:
        raise NotPortable(f"something that cannot be pickled ({str(error).partition(chr(10))[0]})") from None


def only_code_bars(value: object) -> bool:
    """Whether everything but functions, classes and modules could be sent, so that nothing open would be shared."""
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
    """Key of a held tensor: its identity and version, so that a changed tensor is packed again."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _write(pieces: list[tuple[int, Tensor]], size: int) -> int:
    """Write the pieces to a sealed memory file and return its descriptor."""
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
    """Return the content of a memory file, mapped privately.

    It stays when the descriptor is closed.

    Python's own ``mmap`` would hold a second descriptor for as long.
    """
    size = os.fstat(descriptor).st_size
    name = f"/proc/self/fd/{descriptor}"
    return torch.from_file(name, shared=False, size=size, dtype=torch.uint8).numpy().data


class Unpacker:
    """Unpacks packets.  Until :meth:`clear`, a tensor that came before is the same object again."""

    def __init__(self) -> None:
        self._maps: dict[int, memoryview] = {}
        self._tensors: dict[_Place, Tensor] = {}

    def unpack(self, packet: Packet) -> Any:
        """Unpickles the packet's object and closes the packet's descriptors."""
        self._maps.update(packet.contents)
        for number, descriptor in packet.files.items():
            if number not in self._maps:
                self._maps[number] = map_file(descriptor)
            os.close(descriptor)
        return _Unpickler(packet.payload, self).load()

    def tensor(self, place: _Place) -> Tensor:
        if place not in self._tensors:
            self._tensors[place] = self._make(place)
        return self._tensors[place]

    def _make(self, place: _Place) -> Tensor:
        count = math.prod(place.shape)
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self._maps[place.file], dtype=place.dtype, count=count, offset=place.offset)
        return flat.as_strided(place.shape, place.stride)

    def clear(self) -> None:
        """Forgets the tensors.

        A tensor that is still in use keeps its memory.
        """
        self._tensors.clear()
        self._maps.clear()


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, unpacker: Unpacker) -> None:
        super().__init__(io.BytesIO(payload))
        self._unpacker = unpacker

    def persistent_load(self, place: _Place) -> Tensor:
        return self._unpacker.tensor(place)


def portable(error: Exception) -> Exception:
    """Return a copy of an exception that another process can raise.

    A RuntimeError where pickling does not preserve it.
    """
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(describe_error(error))
    return copy if type(copy) is type(error) else RuntimeError(describe_error(error))
