"""Links between rank 0 and the other ranks of torchrun: packets over torch.distributed's gloo, whole and in order.

Both ends are processes of one run, started by one torchrun: packets are pickles, as in torch.distributed's own object
collectives, and nothing else is ever read from a connection.

A thread sends and a thread receives, because a signal reaches no thread that waits inside gloo.  The main thread waits
in Python and can be interrupted at any time.  Both ends send a heartbeat where they have nothing else to send, so that
a machine that has vanished is noticed.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedkern.errors import UserError
from fedkern.messages.packets import Packet, PacketStream, mapped
from fedkern.process.interrupts import check

SILENCE = "FEDKERN_RANK_TIMEOUT"
"""Environment variable: seconds of silence after which a rank counts as lost."""

WINDOW = 2
"""Packets of a rank that are on their way to rank 0 or wait there: uploads wait where they were made."""

_PACKET, _BEAT, _MORE, _BYE = range(4)
_TICK = 0.5  # seconds after which a waiting thread looks around


def silence() -> float:
    """Seconds of silence after which a rank counts as lost.

    Raises:
        UserError: the environment variable is no positive number.
    """
    text, seconds = os.environ.get(SILENCE, "600"), math.nan
    with suppress(ValueError):
        seconds = float(text)
    if not 1 <= seconds <= 1e6:
        raise UserError(f'{SILENCE} must be a number of seconds from 1 on, not "{text}".')
    return seconds


@dataclass
class _Frame:
    """What is sent at once: kind, what is pickled, and the memory files that the other end lacks, as uint8 tensors."""

    kind: int
    value: Any = None
    files: dict[int, Tensor] = field(default_factory=dict)


class Lost(Exception):
    """The other end is gone without a word; the message says how, as a part of a sentence."""


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
        peer: the rank at the other end.
        serving: whether this is the end of a rank other than 0.

    Attributes:
        over: how the connection ended; None while it stands.
    """

    def __init__(self, peer: int, *, serving: bool) -> None:
        super().__init__()
        self.peer = peer
        self.over: Lost | Ended | None = None
        self._window = threading.Semaphore(WINDOW) if serving else None
        self._outgoing: queue.SimpleQueue[_Frame] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()  # None: the connection is over
        self._leaving: _Frame | None = None
        self._beat = min(15.0, silence() / 4)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send_all, self._receive_all)]
        for thread in self._threads:
            thread.start()

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, packet: Packet) -> None:
        """See :meth:`PacketStream.send`; it does not wait."""
        new = {number: descriptor for number, descriptor in packet.files.items() if number not in self._sent}
        self._sent.update(new)
        # The contents of memory files, uint8 [bytes], stay when the descriptors are closed.
        files = {each: torch.frombuffer(mapped(descriptor), dtype=torch.uint8) for each, descriptor in new.items()}
        self._outgoing.put(_Frame(_PACKET, packet.payload, files))

    def leave(self, code: int, reason: str = "") -> None:
        """Tells the other end, before anything that still waits to be sent, that this end ends.

        Args:
            code: exit code of this process.
            reason: why this end fails, as one sentence.
        """
        if self._leaving is None:
            self._leaving = _Frame(_BYE, (code, reason))
            self._outgoing.put(_Frame(_BEAT))  # wakes the thread that sends

    def left(self, until: float, *, heard: bool = False) -> None:
        """Waits until the other end has been told, and with ``heard`` has ended or answered.

        ``until`` is the time on the monotonic clock at which the wait ends in any case.
        """
        for thread in self._threads[: 1 + heard]:
            thread.join(max(0.0, until - time.monotonic()))

    def _send_all(self) -> None:
        try:
            last = time.monotonic()
            waiting: _Frame | None = None  # for the other end to take earlier ones
            while self._leaving is None:
                if waiting is None:
                    waiting = self._next()
                if waiting is not None and self._may(waiting):
                    self._transmit(waiting)
                    waiting, last = None, time.monotonic()
                elif time.monotonic() - last >= self._beat:
                    self._transmit(_Frame(_BEAT))
                    last = time.monotonic()
            self._transmit(self._leaving)
        except Exception as error:
            self._end(Lost(how(error)))

    def _next(self) -> _Frame | None:
        try:
            return self._outgoing.get(timeout=_TICK)
        except queue.Empty:
            return None

    def _may(self, frame: _Frame) -> bool:
        return frame.kind != _PACKET or self._window is None or self._window.acquire(timeout=_TICK)

    def _transmit(self, frame: _Frame) -> None:
        sizes = {number: content.numel() for number, content in frame.files.items()}
        head = pickle.dumps((frame.kind, frame.value, sizes))
        for piece in (len(head).to_bytes(8, "little"), head):
            dist.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), dst=self.peer)
        for content in frame.files.values():
            dist.send(content, dst=self.peer)

    # -- receiving -------------------------------------------------------------------------------------------------

    def get(self, seconds: float) -> Packet | None:
        """The next packet; None where none comes within ``seconds``.

        Raises:
            Lost: the other end is gone.
            Ended: the other end has said that it ends.
        """
        try:
            packet = self._incoming.get(timeout=seconds)
        except queue.Empty:
            return None
        if packet is None:
            self._incoming.put(None)  # for whoever asks again
            assert self.over is not None
            raise self.over
        if self._window is None:
            self._outgoing.put(_Frame(_MORE))
        return packet

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
                size = int.from_bytes(self._bytes(8), "little")
                kind, value, sizes = pickle.loads(self._bytes(size))
                if kind == _PACKET:
                    files = {number: self._bytes(length) for number, length in sizes.items()}
                    self._incoming.put(Packet(value, contents=files))
                elif kind == _MORE and self._window is not None:
                    self._window.release()
                elif kind == _BYE:
                    self._end(Ended(*value))
                    return
        except Exception as error:
            self._end(Lost(how(error)))

    def _bytes(self, size: int) -> memoryview:
        content = torch.empty(size, dtype=torch.uint8)
        dist.recv(content, src=self.peer)
        return content.numpy().data

    def _end(self, how: Lost | Ended) -> None:
        if self.over is None:
            self.over = how
            self._incoming.put(None)


def how(error: Exception) -> str:
    """What went wrong on a connection, as a part of a sentence."""
    text = str(error)
    if "imed out" in text or "imeout" in text:
        return f"it was silent for {silence():g} seconds"
    if any(words in text for words in ("closed", "reset", "Broken pipe", "refused")):
        return "its connection was closed"
    return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
