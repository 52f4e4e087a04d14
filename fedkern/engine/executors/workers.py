"""Parallel executor: clients in worker processes on the CPU, with the bits of :class:`Serial` for any worker count.

Answers are handed on in client order, whatever order they arrive in, so that the server sums them in that order.

A client keeps its worker within a round, because its ``round_cache`` is there.  In the next round any worker may get
the client, and is sent the client's state.  If a worker is lost, another worker starts from the client's state at the
beginning of the round and plays the client's messages of the round again.

Until the workers have started (a second or two, to load PyTorch), clients work in this process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.executors.base import Answer, Played, States
from fedkern.engine.executors.fork_server import ForkServer, Gone
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.shared_tensors import Channel
from fedkern.engine.executors.worker_messages import Cleared, Done, Forget, Job, Notice, Setup
from fedkern.engine.uploads.encoders import Encoder
from fedkern.errors import RunFailed
from fedkern.messages.packets import NotPortable, Packer, Unpacker
from fedkern.methods.base import ClientId, Message, Phase
from fedkern.ops._core import backend
from fedkern.process.interrupts import check
from fedkern.process.torch_modes import modes

HELD_BYTES = 1 << 30
"""Limit on the bytes of uploads that wait for earlier clients.  Beyond it, only the next client in order gets a
worker."""

LOSSES = 3
"""The run ends when a client's worker is lost this many times in one round."""

WORTH_STARTING = 3.0
"""Seconds that the clients' remaining work must take in this process for ``--workers auto`` to start workers."""


@dataclass(eq=False)
class _Worker:
    """A worker process: process id, connection, the client it works for (None: idle), the last exchange it has seen."""

    process: int
    channel: Channel
    client: ClientId | None = None
    exchange: int = 0


@dataclass
class _Round:
    """The clients of a round.

    Attributes:
        at: where a client works; None is this process.
        readers: readers of the states that clients began the round with.
        played: the messages that a client has answered.
        changed: states that clients have changed.
        losses: how often a client's worker was lost.
    """

    at: dict[ClientId, _Worker | None] = field(default_factory=dict)
    readers: dict[ClientId, Any] = field(default_factory=dict)
    played: dict[ClientId, list[Played]] = field(default_factory=dict)
    changed: dict[ClientId, dict[str, Any]] = field(default_factory=dict)
    losses: dict[ClientId, int] = field(default_factory=dict)


class Workers:
    """The executor of several processes (see :class:`~fedkern.engine.executors.base.Executor`).

    Args:
        context: of the run.
        here: the executor of this process.
        handlers: objects whose ``client_update`` may be called, by name.
        states: where a client's state comes from when the client first works in a round.
        count: number of workers.
        asks: how often the plan will still ask clients in the whole run.  Workers are then started only if enough work
            is left for them to pay.  None: they are started at once.
        patient: whether to wait for the workers instead of beginning without them.
    """

    remote = False

    def __init__(
        self,
        context: RunContext,
        here: Serial,
        handlers: Mapping[str, Any],
        states: States,
        count: int,
        *,
        asks: int | None = None,
        patient: bool = False,
    ) -> None:
        self.here, self._context, self._handlers, self._states, self.count = (
            here,
            context,
            dict(handlers),
            states,
            count,
        )
        self._patient = patient
        self._left, self._asked, self._seconds = asks, 0, 0.0
        self._fork_server: ForkServer | None = None
        self._given_up = False
        self._workers: list[_Worker] = []
        self._packer = Packer()
        self._exchange = 0
        self._round = _Round()
        # State of this exchange:
        self._encoders: Mapping[ClientId, Encoder] = {}
        self._todo: list[ClientId] = []  # clients that are not at work yet
        self._found: dict[ClientId, tuple[Done, int]] = {}  # replies, with the bytes of their tensors
        if asks is None:
            self._start()

    # -- the executor ----------------------------------------------------------------------------------------------

    def answers(
        self,
        asker: str,
        phase: Phase,
        messages: Mapping[ClientId, Message],
        encoders: Mapping[ClientId, Encoder] | None = None,
    ) -> Iterator[Answer]:
        self._exchange += 1
        self._encoders = encoders or {}
        self._packer.clear()
        self._found.clear()
        self._todo = list(messages)
        for k in messages:
            self._round.readers.setdefault(k, self._states(k))
        for k in messages:
            yield self._answer(k, asker, phase, messages)
            self._round.played.setdefault(k, []).append((asker, phase, messages[k], self._encoders.get(k)))

    def _answer(self, k: ClientId, asker: str, phase: Phase, messages: Mapping[ClientId, Message]) -> Answer:
        """The answer of the next client in order; meanwhile workers go on with later clients."""
        while True:
            check()
            self._hear(0.0)
            self._hire()
            self._hand_out(k, asker, phase, messages)
            if k in self._found:
                done, _ = self._found.pop(k)
                if done.failed is not None:
                    raise done.failed
                if done.state is not None:
                    self._round.changed[k] = done.state
                answer = done.answer
                break
            if k in self._todo:
                self._todo.remove(k)
                answer = self._ask_here(k, asker, phase, messages[k])
                break
            self._hear(1.0)
        self._count(answer)
        return answer

    def changed(self, client: ClientId) -> dict[str, Any] | None:
        if client in self._round.changed:
            return self._round.changed.pop(client)
        return self.here.changed(client)

    def working(self) -> list[ClientId]:
        return sorted({*self._round.readers, *self.here.working()})

    def forget(self, client: ClientId) -> None:
        worker = self._round.at.pop(client, None)
        if worker is not None:
            self._tell(worker, Forget((client,)))
        self._round.changed.pop(client, None)
        self._round.played.pop(client, None)
        self._round.readers.pop(client, None)
        self.here.forget(client)

    def end_round(self) -> None:
        for worker in list(self._workers):
            self._tell(worker, Forget())
            worker.channel.forget()
        self._packer.clear()
        self._round = _Round()
        self.here.end_round()

    def close(self) -> None:
        """Ends all processes, whatever they are doing."""
        for worker in self._workers:
            # Nobody has waited for the worker yet, so its process id is not another process's.
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process, signal.SIGKILL)
            worker.channel.close()
        self._workers.clear()
        self._packer.clear()
        if self._fork_server is not None:
            self._fork_server.close()
            self._fork_server = None

    # -- this process ----------------------------------------------------------------------------------------------

    def _ask_here(self, k: ClientId, asker: str, phase: Phase, message: Message) -> Answer:
        if k not in self.here.working():  # the client begins its round here
            self._round.at[k] = None
            self.here.take(k, self._round.readers[k](), self._round.played.get(k, ()))
        return self.here.ask(k, asker, phase, message, self._encoders.get(k))

    def _count(self, answer: Answer) -> None:
        """Counts an answer, and starts workers if enough work is left for them to pay."""
        self._asked += 1
        self._seconds += answer.seconds
        if self._left is None or self._fork_server is not None or self._given_up:
            return
        seconds = (self._left - self._asked) * self._seconds / self._asked
        if seconds > WORTH_STARTING:
            self._start()

    # -- the workers -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            self._fork_server = ForkServer(setup_of(self._context, self._handlers))
        except NotPortable as error:
            self._give_up(f"{error} cannot be sent to worker processes", "define it in a module of its own")
        except OSError as error:
            self._give_up(f"worker processes cannot be started ({error.strerror or error})", "")

    def _give_up(self, why: str, way: str) -> None:
        self._given_up = True
        self._context.warn(
            "no-workers",
            f"Clients work one after another, as {why}" + (f": {way} to have them side by side." if way else "."),
        )

    def _hire(self) -> None:
        """Forks workers up to ``count``, once the fork server is ready."""
        if self._fork_server is None or len(self._workers) >= self.count:
            return
        try:
            if not self._fork_server.ready(self._patient):
                return
            while len(self._workers) < self.count:
                self._workers.append(_Worker(*self._fork_server.fork()))
        except Gone as error:
            self._fork_server.close()
            self._fork_server = None
            self._give_up(str(error), "")

    def _hand_out(self, first: ClientId, asker: str, phase: Phase, messages: Mapping[ClientId, Message]) -> None:
        """Gives every idle worker the next client that it may have."""
        for worker in list(self._workers):
            if worker.client is not None:
                continue
            for k in list(self._todo):
                if self._round.at.get(k, worker) is not worker:
                    continue  # another worker or this process has the client in this round
                if k != first and sum(size for _, size in self._found.values()) > HELD_BYTES:
                    break
                if self._send(worker, k, asker, phase, messages[k]):
                    self._todo.remove(k)
                    break
                if worker not in self._workers:
                    break

    def _send(self, worker: _Worker, k: ClientId, asker: str, phase: Phase, message: Message) -> bool:
        fresh = self._round.at.get(k) is not worker
        state = self._round.readers[k]() if fresh else None
        played = tuple(self._round.played.get(k, ())) if fresh else ()
        if worker.exchange != self._exchange:
            worker.exchange = self._exchange
            worker.channel.forget()
            if not self._tell(worker, Cleared()):
                return False
        try:
            if not self._tell(worker, Job(k, asker, phase, message, fresh, state, played, self._encoders.get(k))):
                return False
        except NotPortable:
            self._round.at[k] = None  # the message cannot be sent, so the client works in this process in this round
            return False
        worker.client, self._round.at[k] = k, worker
        return True

    def _tell(self, worker: _Worker, what: Any) -> bool:
        """Sends ``what`` to a worker; False where the worker is lost."""
        packet = self._packer.pack(what)
        try:
            worker.channel.send(packet)
        except OSError:
            self._lost(worker)
            return False
        return True

    def _hear(self, seconds: float) -> None:
        """Receives what workers have sent, waiting up to ``seconds`` for the first of it."""
        busy = [worker for worker in self._workers if worker.client is not None]
        if not busy:
            return
        heard, _, _ = select.select([worker.channel for worker in busy], [], [], seconds)
        for worker in [worker for worker in busy if worker.channel in heard]:
            try:
                packet, _ = worker.channel.receive()
            except (EOFError, OSError):
                self._lost(worker)
                continue
            size = sum(os.fstat(descriptor).st_size for descriptor in packet.files.values())
            message = Unpacker().unpack(packet)
            if isinstance(message, Notice):
                self._context.notice(message.text)
                continue
            assert worker.client is not None  # it was busy
            self._found[worker.client] = message, size
            worker.client = None

    def _lost(self, worker: _Worker) -> None:
        """Frees the clients of a worker that has ended, so that they begin their round again elsewhere.

        Raises:
            RunFailed: the worker of one client was lost `LOSSES` times in the round.
        """
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        worker.channel.close()
        how = self._fork_server.how(worker.process) if self._fork_server is not None else "it ended"
        for k in [k for k, at in self._round.at.items() if at is worker]:
            del self._round.at[k]
        if worker.client is None:
            return
        k = worker.client
        self._round.losses[k] = self._round.losses.get(k, 0) + 1
        if self._round.losses[k] >= LOSSES:
            raise RunFailed(
                f"The worker process of client {self._context.data.client_label(k)} was lost {LOSSES} times in this "
                f"round ({how}): give fewer --workers, or a smaller --batch-size, --model or --width."
            )
        self._context.warn("lost-worker", f"A worker process was lost ({how}); another one repeated its clients' work.")
        self._todo.insert(0, k)


def setup_of(context: RunContext, handlers: dict[str, Any]) -> Setup:
    """Everything that clients in another process need about the run."""
    return Setup(
        context=context,
        handlers=handlers,
        entries=context.added_models,
        backend=backend.forced_backend(),
        isa=backend.active_isa(),
        modes=modes(),
    )
