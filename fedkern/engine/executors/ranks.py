"""Executor of torchrun: clients on all ranks, with the bits of :class:`Serial` for any number of ranks.

Rank 0 runs the round loop and serves; its own share of the clients works between two answers of other ranks.  The other
ranks (`fedkern.engine.rank`) work as worker processes do and get the same messages.

The clients of a round are dealt out in turn, and keep their rank within the round (see
`fedkern.engine.executors.ordered`).  A client's state comes with its first message of a round, and returns with its
answer where it has changed: it is then in the checkpoint, from which torchrun's next attempt starts.  A lost rank is
not replaced: the run ends, and torchrun starts all ranks again if it may.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedkern.data.sources.items import Items
from fedkern.engine.context import RunContext
from fedkern.engine.executors.base import States
from fedkern.engine.executors.connection import Connection
from fedkern.engine.executors.ordered import Ordered
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.torchrun_group import TorchrunGroup
from fedkern.engine.executors.worker_messages import Done, Setup, Sum
from fedkern.errors import UserError
from fedkern.files.image_rows import FileRows
from fedkern.messages.packets import NotPortable, Packet
from fedkern.methods.base import ClientId
from fedkern.methods.uploads import Kept
from fedkern.ops import Accumulator
from fedkern.process.interrupts import check
from fedkern.settings.run_data import DataRecipe
from fedkern.usercode import plugins

AHEAD = 2
"""Answers of rank 0's own clients that may wait for earlier clients on other ranks."""


class Ranks(Ordered):
    """The executor of several ranks (see :class:`~fedkern.engine.executors.base.Executor`).

    Args:
        context: of the run.
        here: the executor of this process, rank 0.
        handlers: objects whose ``client_update`` may be called, by name.
        states: where a client's state comes from when the client first works in a round.
        group: the ranks.
    """

    def __init__(
        self, context: RunContext, here: Serial, handlers: Mapping[str, Any], states: States, group: TorchrunGroup
    ) -> None:
        super().__init__(context, here, states)
        self._group = group
        self._processes: list[Connection] = []
        self._home: dict[ClientId, Any] = {}  # as _at, with clients of this round that are done
        for rank, level in group.odd.items():
            context.notices.warn(
                "other-kernels",
                f"Rank {rank} computes with other kernels than rank 0 (torch {level}): bits depend on where a client "
                "works.",
            )
        self._start(handlers)

    def _start(self, handlers: Mapping[str, Any]) -> None:
        tests = self._context.config.own_networks
        if self._group.launched.here < self._group.size and _in_a_file(self._context.data, tests):
            raise UserError(
                "The decoded images are in a file on rank 0's machine, which ranks on other machines cannot read: use "
                "ranks of one machine, or fewer or smaller images, which are kept in memory."
            )
        try:
            packet = self._pack(Setup.of(self._context, handlers))
        except NotPortable as error:
            self._context.notices.warn(
                "no-workers",
                f"All clients work on rank 0, as {error} cannot be sent to other ranks: define it in a module of its "
                "own to have them side by side.",
            )
            return
        self._processes = list(self._group.connections.values())
        for connection in self._processes:
            connection.say(plugins.sent_plugins(self._context.config.plugins))
            connection.send(packet)
        self._packer.clear()
        self._context.notices.notice(f"clients work on {self._group.size} ranks")

    def _pack(self, setup: Setup) -> Packet:
        """Pack the setup, with a recipe in place of items that cannot be sent.

        Raises:
            NotPortable: something cannot be sent.
        """
        data = self._context.data
        try:
            return self._packer.pack(setup)
        except NotPortable:
            if not isinstance(data.validation, Items):
                raise
        context = copy.copy(self._context)
        context.data = DataRecipe(context.config, data)
        return self._packer.pack(replace(setup, context=context))

    # -- the executor ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Deals the clients out, and sends the other ranks what their clients are asked.

        Vectors that encoders keep are added up by the accumulators of :meth:`accumulator`, until the next exchange
        begins.
        """
        ranks = (None, *self._processes)
        for k in self._requests:
            rank = self._at[k] if k in self._at else ranks[len(self._at) % len(ranks)]
            if rank is None or not self._send(rank, k):
                self._at[k] = None
        self._home.update(self._at)

    def _advance(self, k: ClientId) -> None:
        """Hears the rank of the next client in order; meanwhile this rank goes on with its later clients."""
        self._group.check()
        if (rank := self._at[k]) is not None:
            idle = bool(self._todo) and len(self._replies) < AHEAD
            if (reply := self._hear_rank(rank, 0.0 if idle else 0.5)) is not None:
                self._replies[k] = reply
            elif idle:
                self._work(self._todo[0])
        elif k in self._todo:
            self._work(k)

    # -- sums --------------------------------------------------------------------------------------------------------

    def accumulator(self, local: Accumulator) -> Accumulator | Spread:
        """An accumulator for ``local``'s vectors that also adds those that have stayed on other ranks."""
        return Spread(local, self._sum_on_ranks) if local.exact else local

    def _sum_on_ranks(self, size: int, terms: Sequence[tuple[Kept, float]]) -> Accumulator:
        """Return the exact sum of vectors that have stayed on other ranks, each of which sends a sum of its own."""
        there: dict[Connection, list[tuple[int, str, float]]] = {}
        for stand_in, weight in terms:
            there.setdefault(self._home[stand_in.client], []).append((stand_in.client, stand_in.name, weight))
        for rank, vectors in there.items():
            self._tell(rank, Sum(size, tuple(vectors)))
        total = Accumulator(size, exact=True)
        for rank in there:
            while (reply := self._hear_rank(rank, 0.5)) is None:
                check()
            part = Accumulator(size, exact=True)
            part.load_state_dict(reply.answer)
            total.merge(part)
        return total

    def _hear_rank(self, rank: Connection, seconds: float) -> Done | None:
        packet = self._group.heard(rank, seconds)
        return None if packet is None else self._read(packet)

    def end_round(self) -> None:
        self._home.clear()
        super().end_round()


def _in_a_file(data: Any, tests: bool) -> bool:
    """Whether images or masks that other ranks need are read from a file when they are needed."""
    splits = (*data.clients, data.validation, *((*data.tests.values(), *data.client_tests) if tests else ()))
    return any(isinstance(part, FileRows) for split in splits for part in (split.images, split.labels))


class Spread:
    """An exact accumulator some of whose vectors have stayed on other ranks (compare :class:`fedkern.ops.Accumulator`).

    Args:
        local: adds the vectors of this rank.
        summed: gives the sum of the others, from the length of the vectors, and their stand-ins and weights.
    """

    def __init__(self, local: Accumulator, summed: Callable[[int, Sequence[tuple[Kept, float]]], Accumulator]) -> None:
        self._own, self._sum_on_ranks = local, summed
        self._far: list[tuple[Kept, float]] = []

    def add(self, vector: Tensor | Kept, weight: float | Tensor = 1.0) -> None:
        """Adds ``weight * vector``; a vector on another rank is only noted."""
        if isinstance(vector, Kept):
            self._far.append((vector, float(weight)))
        else:
            self._own.add(vector, weight)

    def mean(self) -> Tensor:
        """The weighted mean of all vectors, ``[P]``: the other ranks add theirs up now."""
        if self._far:
            self._own.merge(self._sum_on_ranks(self._own.size, self._far))
            self._far = []
        return self._own.mean()
