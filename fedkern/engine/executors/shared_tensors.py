"""Connection between two processes of one machine, for whole packets over a socket."""

import array
import contextlib
import os
import pickle
import socket
import struct

from fedkern.messages.packets import Packet, PacketStream

_HEADER = struct.Struct("<Q")  # bytes of the pickle that follows; 0: the first file holds it
_INLINE = 1 << 15  # bytes; a longer pickle goes through a memory file, so that no message fills the socket's buffer
_MOST_FILES = 250  # most files of one message (SCM_MAX_FD is 253)


class Channel(PacketStream):
    """One end of a connection between two processes of one machine (see :class:`PacketStream`)."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__()
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, packet: Packet) -> None:
        """Send a packet, with its further descriptors after those of its files."""
        new = {number: descriptor for number, descriptor in packet.files.items() if number not in self._sent}
        payload = pickle.dumps((list(new), packet.payload))
        spilt = len(payload) > _INLINE
        descriptors = [*new.values(), *packet.extra]
        if len(descriptors) + spilt > _MOST_FILES:
            raise ValueError(f"packet: expected at most {_MOST_FILES} files, given {len(descriptors) + spilt}")
        with contextlib.ExitStack() as stack:
            if spilt:
                file = stack.enter_context(os.fdopen(os.memfd_create("fedkern", os.MFD_CLOEXEC), "wb"))
                file.write(payload)
                file.flush()
                descriptors.insert(0, file.fileno())
            header = _HEADER.pack(0 if spilt else len(payload))
            with contextlib.suppress(ConnectionError):
                sent = socket.send_fds(self._end, [header], descriptors)
                self._end.sendall(header[sent:] + (b"" if spilt else payload))
        self._sent.update(new)

    def receive(self) -> Packet:
        try:
            data, rights, _, _ = self._end.recvmsg(
                _HEADER.size, socket.CMSG_LEN(_MOST_FILES * 4), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise EOFError
            data += self._exactly(_HEADER.size - len(data))
            descriptors = [descriptor for _, _, content in rights for descriptor in array.array("i", content)]
            (size,) = _HEADER.unpack(data)
            if size:
                payload = self._exactly(size)
            else:
                with os.fdopen(descriptors.pop(0), "rb") as file:
                    file.seek(0)
                    payload = file.read()
        except ConnectionError:
            raise EOFError from None
        numbers, inner = pickle.loads(payload)
        return Packet(inner, dict(zip(numbers, descriptors, strict=False)), extra=descriptors[len(numbers) :])

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            if not (part := self._end.recv(size - len(parts))):
                raise EOFError
            parts += part
        return bytes(parts)

    def close(self) -> None:
        self._end.close()
