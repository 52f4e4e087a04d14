"""Client order, replay of a round's messages and changed states: what all executors share whose clients work elsewhere.

Answers are handed on in client order, whatever order they arrive in, so that the server sums them in that order.

A client keeps its process within a round, because its ``round_cache`` is there.  A process that has not worked for the
client in this round starts from the client's state at the beginning of the round, and plays the messages again that the
client has answered since.  A message that cannot be sent to another process has the client work in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Answer, Request, States
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.worker_messages import Clear, Done, Forget, Job, Notice
from fedkern.engine.uploads.encoders import Encoder
from fedkern.messages.packets import NotPortable, Packer, Packet, PacketStream, Unpacker
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Messages, Phase
from fedkern.process.interrupts import check


class Ordered:
    """An executor over a transport (see :class:`~fedkern.engine.executors.executor.Executor`).

    A transport derives from it: :meth:`_begin` and :meth:`_advance` send ``_requests`` and fill ``_replies``.

    Args:
        context: of the run.
        serial: the executor of this process.
        states: where a client's state comes from when the client first works in a round.
    """

    count = 1
    remote = False

    def __init__(self, context: RunContext, serial: Serial, states: States) -> None:
        self.here, self._context, self._states = serial, context, states
        self._processes: Sequence[PacketStream] = []  # packet streams to the other processes that clients work in
        self._packer = Packer()
        # State of this round:
        self._readers: dict[ClientId, Callable[[], State]] = {}  # of states that clients began the round with
        self._at: dict[ClientId, Any] = {}  # the process that has begun a client's round; None: this process
        self._played: dict[ClientId, list[Request]] = {}  # messages that a client has answered
        self._changed: dict[ClientId, State] = {}
        # State of this exchange:
        self._requests: dict[ClientId, Request] = {}
        self._todo: list[ClientId] = []  # clients that nothing works for yet
        self._replies: dict[ClientId, Done] = {}  # that wait for their turn

    def answers(
        self, asker: str, phase: Phase, messages: Messages, encoders: Mapping[ClientId, Encoder] | None = None
    ) -> Iterator[Answer]:
        """See :class:`~fedkern.engine.executors.executor.Executor`."""
        encoders = encoders or {}
        self._requests = {k: (asker, phase, message, encoders.get(k)) for k, message in messages.items()}
        for k in messages:
            self._readers.setdefault(k, self._states(k))
        self._todo = list(messages)
        self._replies.clear()
        self._clear()
        self._begin()
        for k in messages:
            yield self._answer(k)

    def _answer(self, k: ClientId) -> Answer:
        """Return the answer of the next client in order."""
        while True:
            check()
            self._advance(k)
            if k in self._replies:
                break
        reply = self._replies.pop(k)
        if reply.failed is not None:
            raise reply.failed
        if reply.state is not None:
            self._changed[k] = reply.state
        if not self.remote:  # a remote client's node keeps what it may have to play again
            self._played.setdefault(k, []).append(self._requests[k])
        answer: Answer = reply.answer
        return answer

    def changed_state(self, client: ClientId) -> State | None:
        if client in self._changed:
            return self._changed.pop(client)
        return self.here.changed_state(client)

    def working(self) -> list[ClientId]:
        return sorted({*self._readers, *self.here.working()})

    def forget(self, client: ClientId) -> None:
        process = self._at.pop(client, None)
        if process is not None:
            self._tell(process, Forget(client))
        for table in (self._readers, self._played, self._changed):
            table.pop(client, None)
        self.here.forget(client)

    def end_round(self) -> None:
        self._clear(round_over=True)
        for table in (self._readers, self._at, self._played, self._changed, self._requests, self._replies):
            table.clear()
        self.here.end_round()

    def close(self) -> None:
        self._packer.clear()

    # -- what a transport does -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begins an exchange."""

    def _advance(self, k: ClientId) -> None:
        """Goes on with the exchange until there may be a reply of client ``k``, the next in order."""
        raise NotImplementedError

    # -- what a transport uses -------------------------------------------------------------------------------------

    def _send(self, process: PacketStream, k: ClientId) -> bool:
        """Has client ``k`` work in another process.

        False where its message cannot be sent there.
        """
        try:
            self._tell(process, self._job(k, process))
        except NotPortable:
            self._at[k] = None
            return False
        self._todo.remove(k)
        return True

    def _work(self, k: ClientId) -> None:
        """Has client ``k`` work in this process."""
        self._todo.remove(k)
        self._replies[k] = self.here.reply(self._job(k, None))

    def _job(self, k: ClientId, process: PacketStream | None) -> Job:
        """Return what client ``k`` has to do.

        It begins its round in ``process`` where it has not worked there yet.
        """
        begun = k in self.here.working() if process is None else self._at.get(k) is process
        self._at[k] = process
        if begun:
            return Job(k, self._requests[k])
        self._changed.pop(k, None)  # of a process that was lost: the client's next state is a later one
        return Job(k, self._requests[k], self._readers[k](), tuple(self._played.get(k, ())))

    def _read(self, packet: Packet) -> Done | None:
        """Return the reply that another process has sent.

        None where it has sent a notice, which is passed on.
        """
        message = Unpacker().unpack(packet)
        if isinstance(message, Notice):
            self._context.notices.notice(message.text)
            return None
        assert isinstance(message, Done)
        return message

    def _tell(self, process: PacketStream, message: object) -> None:
        process.send(self._packer.pack(message))

    def _clear(self, *, round_over: bool = False) -> None:
        """Has no later packet refer to tensors of earlier ones, which all processes drop."""
        self._packer.clear()
        for process in self._processes:
            process.forget()
            self._tell(process, Clear(round_over))
