"""Client order, replay and changed states, for executors whose clients work in other processes.

Answers are handed on in client order, so that the server sums them in that order.

A client keeps its process within a round, because its ``round_cache`` is there. A process that is new to the client
starts from the state at the beginning of the round and replays the answered messages. A client whose message cannot be
sent works in this process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Answer, Clear, Done, Forget, Job, Notice, Request, States
from fedkern.engine.executors.serial import Serial
from fedkern.engine.uploads.encoders import Encoder
from fedkern.messages.packets import NotPortable, Packer, Packet, PacketStream, Unpacker
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Messages, Phase
from fedkern.process.interrupts import check


class Ordered:
    """Executor over a transport (see :class:`~fedkern.engine.executors.executor.Executor`).

    A transport overrides :meth:`_begin` and :meth:`_advance`, which send ``_requests`` and fill ``_replies``.
    """

    count = 1
    remote = False

    def __init__(self, context: RunContext, serial: Serial, states: States) -> None:
        self.here, self._context, self._states = serial, context, states
        self._processes: Sequence[PacketStream] = []  # packet streams to other processes
        self._packer = Packer()
        # State of this round:
        self._readers: dict[ClientId, Callable[[], State]] = {}  # of states at the beginning of the round
        self._at: dict[ClientId, Any] = {}  # each client's process in this round; None: this process
        self._played: dict[ClientId, list[Request]] = {}  # messages that a client has answered
        self._changed: dict[ClientId, State] = {}
        # State of this exchange:
        self._requests: dict[ClientId, Request] = {}
        self._todo: list[ClientId] = []  # clients without a process in this exchange
        self._replies: dict[ClientId, Done] = {}  # waiting for their turn

    def answers(
        self, callee: str, phase: Phase, messages: Messages, encoders: Mapping[ClientId, Encoder] | None = None
    ) -> Iterator[Answer]:
        encoders = encoders or {}
        self._requests = {k: (callee, phase, message, encoders.get(k)) for k, message in messages.items()}
        for k in messages:
            self._readers.setdefault(k, self._states(k))
        self._todo = list(messages)
        self._replies.clear()
        self._clear()
        self._begin()
        for k in messages:
            yield self._answer(k)

    def _answer(self, k: ClientId) -> Answer:
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
        if not self.remote:  # a remote client's node keeps messages to replay
            self._played.setdefault(k, []).append(self._requests[k])
        answer: Answer = reply.answer
        return answer

    def changed_state(self, client: ClientId) -> State | None:
        return self._changed.pop(client) if client in self._changed else self.here.changed_state(client)

    def working(self) -> list[ClientId]:
        return sorted({*self._readers, *self.here.working()})

    def forget(self, client: ClientId) -> None:
        if (process := self._at.pop(client, None)) is not None:
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
        """Begin an exchange."""

    def _advance(self, k: ClientId) -> None:
        """Continue the exchange until client ``k``, the next in order, may have replied."""
        raise NotImplementedError

    # -- what a transport uses -------------------------------------------------------------------------------------

    def _send(self, process: PacketStream, k: ClientId) -> bool:
        """Give client ``k`` to another process, or return False if its message cannot be sent."""
        try:
            self._tell(process, self._job(k, process))
        except NotPortable:
            self._at[k] = None
            return False
        self._todo.remove(k)
        return True

    def _work(self, k: ClientId) -> None:
        self._todo.remove(k)
        self._replies[k] = self.here.reply(self._job(k, None))

    def _job(self, k: ClientId, process: PacketStream | None) -> Job:
        """Return the client's job, with its state and earlier messages if it is new to ``process``."""
        begun = k in self.here.working() if process is None else self._at.get(k) is process
        self._at[k] = process
        if begun:
            return Job(k, self._requests[k])
        self._changed.pop(k, None)  # the state of a lost process is stale
        return Job(k, self._requests[k], self._readers[k](), tuple(self._played.get(k, ())))

    def _read(self, packet: Packet) -> Done | None:
        """Return the reply from another process, or None for a notice, which is passed on."""
        message = Unpacker().unpack(packet)
        if isinstance(message, Notice):
            self._context.notices.notice(message.text)
            return None
        assert isinstance(message, Done)
        return message

    def _tell(self, process: PacketStream, message: object) -> None:
        process.send(self._packer.pack(message))

    def _clear(self, *, round_over: bool = False) -> None:
        """Make all processes drop tensors of earlier packets, to which no later packet refers."""
        self._packer.clear()
        for process in self._processes:
            process.forget()
            self._tell(process, Clear(round_over))
