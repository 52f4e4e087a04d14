"""Connection between two processes of one machine: packets over a socket, whole."""

from __future__ import annotations

import array
import contextlib
import os
import pickle
import socket
import struct
from collections.abc import Iterable
from typing import Any

from fedkern.messages.packets import Packet

_HEADER = struct.Struct("<QI")  # bytes of the pickle, number of memory files
_INLINE = 1 << 15  # bytes; a longer pickle goes through a memory file, so that no message fills the socket's buffer
_MOST_FILES = 250  # most files of one message (SCM_MAX_FD is 253)


class Channel:
    """One end of a connection between two processes, over which packets travel whole."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sent: set[int] = set()  # files that the other end has

    def fileno(self) -> int:
        """The connection's descriptor, for ``select``."""
        return self._end.fileno()

    def send(self, packet: Packet, more: Iterable[int] = ()) -> None:
        """Sends a packet, the descriptors of files that the other end does not have yet, then ``more`` descriptors.

        Raises:
            OSError: the other end is gone.
        """
        new = {number: descriptor for number, descriptor in packet.files.items() if number not in self._sent}
        payload = pickle.dumps((list(new), packet.payload))
        spilt = len(payload) > _INLINE
        descriptors = [*new.values(), *more]
        if len(descriptors) + spilt > _MOST_FILES:
            raise ValueError(f"packet: expected at most {_MOST_FILES} files, given {len(descriptors) + spilt}")
        with contextlib.ExitStack() as stack:
            if spilt:
                file = stack.enter_context(os.fdopen(os.memfd_create("fedkern", os.MFD_CLOEXEC), "wb"))
                file.write(payload)
                file.flush()
                descriptors.insert(0, file.fileno())
            header = _HEADER.pack(0 if spilt else len(payload), len(descriptors))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            sent = self._end.sendmsg([header], rights)
            self._end.sendall(header[sent:] + (b"" if spilt else payload))
        self._sent.update(new)

    def receive(self) -> tuple[Packet, list[int]]:
        """A packet and the descriptors that came beside its files.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            data, ancillary, _, _ = self._end.recvmsg(
                _HEADER.size, socket.CMSG_LEN(_MOST_FILES * 4), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise EOFError
            data += self._exactly(_HEADER.size - len(data))
            size, count = _HEADER.unpack(data)
            descriptors: list[int] = []
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    length = len(content) - len(content) % 4
                    descriptors += array.array("i", content[:length]).tolist()
            if size:
                payload = self._exactly(size)
            else:
                with os.fdopen(descriptors.pop(0), "rb") as file:
                    file.seek(0)
                    payload = file.read()
        except ConnectionError:
            raise EOFError from None
        numbers, inner = pickle.loads(payload)
        files = dict(zip(numbers, descriptors, strict=False))
        return Packet(inner, files), descriptors[len(numbers) : count]

    def say(self, value: Any, more: Iterable[int] = ()) -> None:
        """Sends an object that holds no tensors, with ``more`` descriptors.

        Raises:
            OSError: the other end is gone.
        """
        self.send(Packet(pickle.dumps(value), {}), more)

    def told(self) -> tuple[Any, list[int]]:
        """Receives an object that the other end sent with :meth:`say`, and the descriptors that came with it.

        Raises:
            EOFError: the other end is gone.
        """
        packet, descriptors = self.receive()
        return pickle.loads(packet.payload), descriptors

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._end.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def forget(self) -> None:
        """Forgets which files the other end has; called when the other end drops them too."""
        self._sent.clear()

    def close(self) -> None:
        """Closes this end."""
        self._end.close()
