"""Executor of torchrun: clients on all ranks, with the bits of :class:`Serial` for any number of ranks.

Rank 0 runs the round loop and serves; its own share of the clients works between two answers of other ranks.  The other
ranks (`fedkern.engine.rank`) work as worker processes do and get the same messages.  Answers are handed on in client
order, so that the server sums them in that order.

The clients of a round are dealt out in turn, and keep their rank within the round, because their ``round_cache`` is
there.  A client's state comes with its first message of a round, and returns with its answer where it has changed: it
is then in the checkpoint, from which torchrun's next attempt starts.  A lost rank is not replaced: the run ends, and
torchrun starts all ranks again if it may.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedkern.engine.context import RunContext
from fedkern.engine.executors.base import Answer, Played, States
from fedkern.engine.executors.connection import Connection, Ended, Lost
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.torchrun_group import GO_ON, TorchrunGroup
from fedkern.engine.executors.worker_messages import Cleared, Done, Forget, Job, Notice, Sum
from fedkern.engine.executors.workers import setup_of
from fedkern.engine.uploads.encoders import Encoder
from fedkern.errors import RunFailed, UserError
from fedkern.files.image_rows import FileRows
from fedkern.messages.packets import NotPortable, Packer, Unpacker
from fedkern.methods.base import ClientId, Message, Phase
from fedkern.methods.uploads import Kept
from fedkern.ops import Accumulator
from fedkern.process.interrupts import check
from fedkern.usercode import plugins

AHEAD = 2
"""Answers of rank 0's own clients that may wait for earlier clients on other ranks."""


class Ranks:
    """The executor of several ranks (see :class:`~fedkern.engine.executors.base.Executor`).

    Args:
        context: of the run.
        here: the executor of this process, rank 0.
        handlers: objects whose ``client_update`` may be called, by name.
        states: where a client's state comes from when the client first works in a round.
        group: the ranks.
    """

    remote = False

    def __init__(
        self, context: RunContext, here: Serial, handlers: Mapping[str, Any], states: States, group: TorchrunGroup
    ) -> None:
        self.here, self._context, self._states, self._group = here, context, states, group
        self.count = group.size
        self._packer = Packer()
        self._connections: dict[int, Connection] = {}  # to the ranks that clients work on, beside this one
        # State of this round:
        self._at: dict[ClientId, int] = {}  # where a client works
        self._home: dict[ClientId, int] = {}  # as _at, with clients that are done
        self._begun: set[ClientId] = set()  # clients that have their state of the round on another rank
        self._readers: dict[ClientId, Any] = {}  # readers of the states that clients began the round with
        self._played: dict[ClientId, list[Played]] = {}
        self._changed: dict[ClientId, dict[str, Any]] = {}
        # State of this exchange:
        self._encoders: Mapping[ClientId, Encoder] = {}
        self._todo: list[ClientId] = []  # clients of this rank that have not worked yet
        self._ahead: dict[ClientId, Done] = {}  # answers of this rank's clients before their turn
        for rank, level in group.odd.items():
            context.warn(
                "other-kernels",
                f"Rank {rank} computes with other kernels than rank 0 (torch {level}): bits depend on where a client "
                "works.",
            )
        self._start(dict(handlers))

    def _start(self, handlers: dict[str, Any]) -> None:
        if self._group.place.here < self._group.size and _in_a_file(self._context.data):
            raise UserError(
                "The decoded images are in a file on rank 0's machine, which ranks on other machines cannot read: use "
                "ranks of one machine, or fewer or smaller images, which are kept in memory."
            )
        try:
            packet = self._packer.pack(setup_of(self._context, handlers))
        except NotPortable as error:
            self.count = 1
            self._context.warn(
                "no-workers",
                f"All clients work on rank 0, as {error} cannot be sent to other ranks: define it in a module of its "
                "own to have them side by side.",
            )
            return
        self._connections = self._group.connections
        for connection in self._connections.values():
            connection.say(plugins.sent(self._context.config.plugins))
            connection.send(packet)
        self._packer.clear()
        self._context.notice(f"clients work on {self.count} ranks")

    # -- the executor ----------------------------------------------------------------------------------------------

    def answers(
        self,
        asker: str,
        phase: Phase,
        messages: Mapping[ClientId, Message],
        encoders: Mapping[ClientId, Encoder] | None = None,
    ) -> Iterator[Answer]:
        """See :class:`~fedkern.engine.executors.base.Executor`.

        Vectors that encoders keep are added up by the accumulators of :meth:`accumulator`, until the next exchange
        begins.
        """
        self._encoders = encoders or {}
        self._deal(asker, phase, messages)
        for k in messages:
            yield self._answer(k, asker, phase, messages)
            self._played.setdefault(k, []).append((asker, phase, messages[k], self._encoders.get(k)))

    def _deal(self, asker: str, phase: Phase, messages: Mapping[ClientId, Message]) -> None:
        """Deals the clients out, and sends the other ranks what their clients are asked."""
        self._packer.clear()
        cleared = self._packer.pack(Cleared())
        for connection in self._connections.values():
            connection.forget()
            connection.send(cleared)
        self._todo.clear()
        self._ahead.clear()
        for k in messages:
            self._readers.setdefault(k, self._states(k))
            rank = self._at.setdefault(k, len(self._at) % self.count)
            if rank and not self._sent(k, rank, asker, phase, messages[k]):
                self._at[k] = rank = 0
            self._home[k] = rank
            if not rank:
                self._todo.append(k)

    def _sent(self, k: ClientId, rank: int, asker: str, phase: Phase, message: Message) -> bool:
        """Sends a client's message to its rank; False where the message cannot be sent."""
        fresh = k not in self._begun
        try:
            state = self._readers[k]() if fresh else None
            packet = self._packer.pack(Job(k, asker, phase, message, fresh, state, encoder=self._encoders.get(k)))
        except NotPortable:
            return False
        self._connections[rank].send(packet)
        self._begun.add(k)
        return True

    def _answer(self, k: ClientId, asker: str, phase: Phase, messages: Mapping[ClientId, Message]) -> Answer:
        """The answer of the next client in order; meanwhile this rank goes on with its later clients."""
        done = self._ahead.pop(k, None)
        while done is None:
            check()
            self._group.check()
            if not self._at[k]:
                self._todo.remove(k)
                done = self._work(k, asker, phase, messages[k])
                break
            idle = bool(self._todo) and len(self._ahead) < AHEAD
            done = self._heard(self._connections[self._at[k]], 0.0 if idle else 0.5)
            if done is None and idle:
                later = self._todo.pop(0)
                self._ahead[later] = self._work(later, asker, phase, messages[later])
        if done.failed is not None:
            raise done.failed
        if done.state is not None:
            self._changed[k] = done.state
        return done.answer

    def _work(self, k: ClientId, asker: str, phase: Phase, message: Message) -> Done:
        """Has a client work on this rank.  Its warnings and its exception wait for its turn, as another rank's do."""
        earlier, self._context.warnings = self._context.warnings, {}
        try:
            if k not in self.here.working():  # the client begins its round here
                self.here.take(k, self._readers[k](), self._played.get(k, ()))
            answer = self.here.ask(k, asker, phase, message, self._encoders.get(k))
            answer.warnings = self._context.warnings
        except Exception as error:
            return Done(None, failed=error)
        finally:
            self._context.warnings = earlier
        return Done(answer)

    def _heard(self, connection: Connection, seconds: float) -> Done | None:
        """The next answer of a rank; None where none has come within ``seconds``."""
        try:
            packet = connection.get(seconds)
        except (Lost, Ended):
            self._group.check()
            raise
        if packet is None:
            return None
        message = Unpacker().unpack(packet)
        if isinstance(message, Notice):
            self._context.notice(message.text)
            return None
        assert isinstance(message, Done)
        return message

    # -- sums --------------------------------------------------------------------------------------------------------

    def accumulator(self, local: Accumulator) -> Accumulator | Spread:
        """An accumulator for ``local``'s vectors that also adds those that have stayed on other ranks."""
        return Spread(local, self._summed) if local.exact else local

    def _summed(self, size: int, terms: Mapping[ClientId, list[tuple[Kept, float]]]) -> Accumulator:
        """The exact sum of vectors that have stayed on other ranks: one reduction of integers."""
        there: dict[int, list[tuple[int, str, float]]] = {rank: [] for rank in self._connections}
        weights = Accumulator(0, exact=True)
        for k, each in terms.items():
            for stand_in, weight in each:
                there[self._home[k]].append((k, stand_in.name, weight))
                weights.add(torch.empty(0, dtype=stand_in.dtype), weight)
        for rank, connection in self._connections.items():
            connection.send(self._packer.pack(Sum(size, tuple(there[rank]))))
        try:
            digits, top = self._group.reduced(Accumulator(size, exact=True), self._context.config.device)
        except Lost as lost:
            for _ in range(20):  # until this rank's connection to the lost one tells which it is
                self._group.check()
                time.sleep(0.1)
            raise RunFailed(f"A rank was lost, as {lost}: {GO_ON}.") from None
        total = Accumulator(size, exact=True)
        total.load_state_dict({**weights.state_dict(), "size": size, "digits": digits, "top": top})
        return total

    # -- the round ---------------------------------------------------------------------------------------------------

    def changed(self, client: ClientId) -> dict[str, Any] | None:
        if client in self._changed:
            return self._changed.pop(client)
        return self.here.changed(client)

    def working(self) -> list[ClientId]:
        return sorted({*self._at, *self.here.working()})

    def forget(self, client: ClientId) -> None:
        rank = self._at.pop(client, 0)
        if rank:
            self._connections[rank].send(self._packer.pack(Forget((client,))))
        self._changed.pop(client, None)
        self._played.pop(client, None)
        self.here.forget(client)

    def end_round(self) -> None:
        over = self._packer.pack(Forget())
        for connection in self._connections.values():
            connection.send(over)
            connection.forget()
        self._packer.clear()
        for table in (self._at, self._home, self._begun, self._readers, self._played, self._changed):
            table.clear()
        self.here.end_round()

    def close(self) -> None:
        """Drops what waits to be packed; the other ranks end with the command (see `torchrun_group.joined`)."""
        self._packer.clear()


def _in_a_file(data: Any) -> bool:
    """Whether clients' or validation images or masks are read from a file when they are needed."""
    splits = (*data.clients, data.validation)
    return any(isinstance(part, FileRows) for split in splits for part in (split.images, split.labels))


class Spread:
    """An exact accumulator some of whose vectors have stayed on other ranks (compare :class:`fedkern.ops.Accumulator`).

    Args:
        local: adds the vectors of this rank.
        summed: gives the sum of the others, from the length of the vectors, and their stand-ins and weights by client.
    """

    def __init__(
        self, local: Accumulator, summed: Callable[[int, Mapping[ClientId, list[tuple[Kept, float]]]], Accumulator]
    ) -> None:
        self._own, self._summed = local, summed
        self._far: dict[ClientId, list[tuple[Kept, float]]] = {}

    def add(self, vector: Tensor | Kept, weight: float | Tensor = 1.0) -> None:
        """Adds ``weight * vector``; a vector on another rank is only noted."""
        if isinstance(vector, Kept):
            self._far.setdefault(vector.client, []).append((vector, float(weight)))
        else:
            self._own.add(vector, weight)

    def mean(self) -> Tensor:
        """The weighted mean of all vectors, ``[P]``: the other ranks add theirs up now."""
        if self._far:
            self._own.merge(self._summed(self._own.size, self._far))
            self._far = {}
        return self._own.mean()
