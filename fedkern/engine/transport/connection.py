"""Links between rank 0 and the other ranks of torchrun: packets over TCP, whole and in order.

Both ends are processes of one run, started by one torchrun: packets are pickles, as in torch.distributed's own object
collectives, and nothing is read from a connection whose other end has not shown the run's token
(`fedkern.engine.transport.torchrun_group`).

A thread sends and a thread receives, so that no end waits for the other one to take what it sends.  Both ends send a
heartbeat where they have nothing else to send, so that a machine that has vanished is noticed.
"""

from __future__ import annotations

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
"""Packets of a rank that wait on rank 0: later uploads wait where they were made."""

_PACKET, _BEAT, _BYE = range(3)
_TICK = 0.5  # seconds after which a waiting main thread looks around


def silence() -> float:
    """Return the seconds of silence after which a rank counts as lost.

    Raises:
        UserError: the environment variable is no positive number.
    """
    text, seconds = os.environ.get(SILENCE, "600"), math.nan
    with suppress(ValueError):
        seconds = float(text)
    if not 1 <= seconds <= 1e6:
        raise UserError(f'{SILENCE} must be a number of seconds from 1 on, not "{text}".')
    return seconds


_Frame = tuple[int, Any, dict[int, memoryview]]
"""What is sent at once: kind, what is pickled, and the memory files that the other end lacks, by number."""


class Lost(Exception):
    """The other end is gone without a word.

    The message says how, as a part of a sentence.
    """


class Ended(Exception):
    """The other end has said that it ends.

    Attributes:
        code: its exit code.
        said: why it failed, as one sentence; empty where it did not.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.said = code, reason


class Connection(PacketStream):
    """One end of a connection between rank 0 and another rank (see :class:`PacketStream`).

    Args:
        end: the socket.
        window: packets that may wait at this end; 0: any number.

    Attributes:
        over: how the connection ended; None while it stands.
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
        """See :meth:`PacketStream.send`.

        It does not wait.
        """
        new = {number: descriptor for number, descriptor in packet.files.items() if number not in self._sent}
        self._sent.update(new)
        # The contents of memory files stay when the descriptors are closed.
        files = {number: map_file(descriptor) for number, descriptor in new.items()}
        self._outgoing.put((_PACKET, packet.payload, files))

    def leave(self, code: int, reason: str = "") -> None:
        """Tell the other end, before anything that still waits to be sent, that this end ends.

        Args:
            code: exit code of this process.
            reason: why this end fails, as one sentence.
        """
        if self._leaving is None:
            self._leaving = _BYE, (code, reason), {}
            self._outgoing.put((_BEAT, None, {}))  # wakes the thread that sends

    def wait_until_told(self, until: float, *, heard: bool = False) -> None:
        """Wait until the other end has been told, and with ``heard`` has ended or answered.

        ``until`` is the time on the monotonic clock at which the wait ends in any case.
        """
        self._threads[0].join(max(0.0, until - time.monotonic()))
        with suppress(Lost, Ended):
            while heard and time.monotonic() < until:
                self.get(0.01)  # makes room for the answer behind what nobody takes

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
        """Return the next packet.

        None where none comes within ``seconds``.

        Raises:
            Lost: the other end is gone.
            Ended: the other end has said that it ends.
        """
        if self.over is None:
            with suppress(queue.Empty):
                return self._incoming.get(timeout=seconds)
        if self.over is not None:
            raise self.over
        return None

    def receive(self) -> Packet:
        """See :meth:`PacketStream.receive`.

        Raises:
            Lost, Ended: see :meth:`get`.
        """
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
            count = self._end.recv_into(unread)
            if not count:
                raise EOFError
            unread = unread[count:]
        return content

    def _lose(self, error: Exception) -> None:
        silent = isinstance(error, TimeoutError)
        how = f"it was silent for {self._silence:g} seconds" if silent else "its connection was closed"
        self.over = self.over or Lost(how)
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)  # wakes the other thread
