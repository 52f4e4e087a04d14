"""Links between rank 0 and the other ranks of torchrun: packets over TCP, whole and in order.

Packets are pickles, as in torch.distributed's own object collectives. Nothing is read from a connection whose other end
has not shown the run's token (`fedkern.engine.transport.torchrun_group`).

One thread sends and one receives, so that no end waits for the other to take what it sends. Heartbeats reveal a machine
that has vanished.
"""

import math
import os
import pickle
import queue
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import torch

from fedkern.errors import UserError
from fedkern.messages.packets import Packet, PacketStream, map_file
from fedkern.process.interrupts import check

SILENCE = "FEDKERN_RANK_TIMEOUT"
"""Environment variable: seconds of silence after which a rank counts as lost."""

WINDOW = 2
"""Packets of a rank that wait on rank 0; later uploads wait on their rank."""

_PACKET, _BEAT, _BYE = range(3)
_TICK = 0.5  # seconds between checks of a waiting main thread


def silence() -> float:
    """Return the seconds of silence after which a rank counts as lost."""
    text, seconds = os.environ.get(SILENCE, "600"), math.nan
    with suppress(ValueError):
        seconds = float(text)
    if not 1 <= seconds <= 1e6:
        raise UserError(f'{SILENCE} must be a number of seconds from 1 on, not "{text}".')
    return seconds


_Frame = tuple[int, Any, dict[int, memoryview]]
"""Unit of sending: kind, pickled value, and new memory files by number."""


class Lost(Exception):
    """Loss of the other end without a word, as a part of a sentence."""


class Ended(Exception):
    """Announced end of the other end.

    Attributes:
        code: its exit code.
        said: why it failed, as one sentence, or empty.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.said = code, reason


class Connection(PacketStream):
    """One end of a connection between rank 0 and another rank (see :class:`PacketStream`).

    Args:
        window: packets that may wait at this end; 0: any number.

    Attributes:
        over: how the connection ended, or None.
    """

    def __init__(self, end: socket.socket, window: int = 0) -> None:
        super().__init__()
        end.settimeout(None)
        with suppress(OSError):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.over: Lost | Ended | None = None
        self._end, self._silence = end, silence()
        self._outgoing: queue.SimpleQueue[_Frame] = queue.SimpleQueue()
        self._incoming: queue.Queue[Packet] = queue.Queue(window)
        self._leaving: _Frame | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send_all, self._receive_all)]
        for thread in self._threads:
            thread.start()

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, packet: Packet) -> None:
        new = {number: descriptor for number, descriptor in packet.files.items() if number not in self._sent}
        self._sent.update(new)
        # The contents of memory files stay when the descriptors are closed.
        files = {number: map_file(descriptor) for number, descriptor in new.items()}
        self._outgoing.put((_PACKET, packet.payload, files))

    def leave(self, code: int, reason: str = "") -> None:
        """Announce this process's end, with its exit code and a sentence, before anything that waits to be sent."""
        if self._leaving is None:
            self._leaving = _BYE, (code, reason), {}
            self._outgoing.put((_BEAT, None, {}))  # wakes the thread that sends

    def wait_until_told(self, until: float, *, heard: bool = False) -> None:
        """Wait until the other end has been told, and with ``heard`` has ended or answered."""
        self._threads[0].join(max(0.0, until - time.monotonic()))
        with suppress(Lost, Ended):
            while heard and time.monotonic() < until:
                self.get(0.01)  # drops the packets before the answer

    def _send_all(self) -> None:
        try:
            while self._leaving is None:
                frame: _Frame = _BEAT, None, {}
                with suppress(queue.Empty):
                    frame = self._outgoing.get(timeout=min(15.0, self._silence / 4))
                self._transmit(*frame)
            self._transmit(*self._leaving)
        except OSError as error:
            self._lose(error)

    def _transmit(self, kind: int, value: object, files: dict[int, memoryview]) -> None:
        head = pickle.dumps((kind, value, {number: len(content) for number, content in files.items()}))
        self._end.sendall(len(head).to_bytes(8, "little") + head)
        for content in files.values():
            self._end.sendall(content)

    # -- receiving -------------------------------------------------------------------------------------------------

    def get(self, seconds: float) -> Packet | None:
        """Return the next packet, or None if none comes within ``seconds``."""
        if self.over is None:
            with suppress(queue.Empty):
                return self._incoming.get(timeout=seconds)
        if self.over is not None:
            raise self.over
        return None

    def receive(self) -> Packet:
        while True:
            check()
            if (packet := self.get(_TICK)) is not None:
                return packet

    def _receive_all(self) -> None:
        try:
            while True:
                kind, value, sizes = pickle.loads(self._bytes(int.from_bytes(self._bytes(8), "little")))
                files = {number: self._bytes(size) for number, size in sizes.items()}
                if kind == _PACKET:
                    self._incoming.put(Packet(value, contents=files))
                elif kind == _BYE:
                    self.over = self.over or Ended(*value)
                    return
        except (OSError, EOFError) as error:
            self._lose(error)

    def _bytes(self, size: int) -> memoryview:
        content: memoryview = torch.empty(size, dtype=torch.uint8).numpy().data
        unread = content
        while unread:
            if not select.select([self._end], [], [], self._silence)[0]:
                raise TimeoutError
            if not (count := self._end.recv_into(unread)):
                raise EOFError
            unread = unread[count:]
        return content

    def _lose(self, error: Exception) -> None:
        silent = isinstance(error, TimeoutError)
        how = f"it was silent for {self._silence:g} seconds" if silent else "its connection was closed"
        self.over = self.over or Lost(how)
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)  # wakes the other thread
