"""Executor of torchrun: clients on all ranks, with the bits of :class:`Serial` for any number of ranks.

Rank 0 runs the round loop and the server. Its own clients work between two answers of other ranks, which work as worker
processes do (:func:`serve`): they load no data and write no file. Rank 0 sends settings, data and method, and prints
all messages.

The clients of a round are dealt out in turn and keep their rank. A changed state returns with the answer, so that it is
in the checkpoint from which torchrun's next attempt starts. A lost rank is not replaced: the run ends, and torchrun may
start all ranks again.
"""

import copy
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from fedkern.data.sources.items import Items
from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Handler, Setup, States
from fedkern.engine.executors.ordered import Ordered
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.worker import Worker, as_in_the_run
from fedkern.engine.transport.connection import Connection, Ended, Lost
from fedkern.engine.transport.torchrun_group import GO_ON, LEAVING, TorchrunGroup
from fedkern.errors import RunFailed, UserError
from fedkern.files.image_rows import FileRows
from fedkern.messages.packets import NotPortable, Packet, Unpacker
from fedkern.methods.base import ClientId
from fedkern.process import interrupts
from fedkern.settings.run_data import DataRecipe
from fedkern.usercode import plugins

FAILED = 1


def serve(group: TorchrunGroup) -> int:
    """Work until rank 0 ends.

    Returns:
        The exit code of rank 0; 1 if this rank failed and rank 0 says so; 130 after Ctrl-C, 143 after SIGTERM.
    """
    connection = group.connections[0]
    try:
        _serve(connection)
    except Ended as end:
        group.leave(end.code)
        return end.code
    except Lost as lost:
        raise RunFailed(f"Rank {group.rank} lost rank 0, as {lost}: {GO_ON}.") from None
    except KeyboardInterrupt as stop:
        _, code = interrupts.end_by(stop)
        with suppress(Ended, Lost):  # rank 0 has the same signal, and must not count this rank as lost
            _wait(connection)
        return code
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}."
        group.leave(FAILED, reason)
        try:
            _wait(connection)
        except Ended:  # rank 0 prints the reason
            return FAILED
        except Lost:
            pass
        raise RunFailed(f"Rank {group.rank} failed: {reason}") from None
    return 0


def _serve(connection: Connection) -> None:
    plugins.receive(connection.receive_value())
    setup: Setup = Unpacker().unpack(connection.receive())
    if setup.context.config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU on this machine, but on that of rank 0: give fedkern --device cpu.")
    with as_in_the_run(setup):
        Worker(setup, connection).serve()


def _wait(connection: Connection) -> None:
    until = time.monotonic() + LEAVING
    while time.monotonic() < until:
        connection.get(0.5)


AHEAD = 2
"""Most answers of rank 0's own clients that wait for earlier clients on other ranks."""


class Ranks(Ordered):
    """Executor of several ranks (see :class:`~fedkern.engine.executors.executor.Executor`)."""

    def __init__(
        self, context: RunContext, serial: Serial, handlers: Mapping[str, Handler], states: States, group: TorchrunGroup
    ) -> None:
        super().__init__(context, serial, states)
        self._group = group
        self._processes: list[Connection] = []
        for rank, level in group.other_isas.items():
            context.notices.warn(
                "other-kernels",
                f"Rank {rank} computes with other kernels than rank 0 (torch {level}): bits depend on where a client "
                "works.",
            )
        self._start(handlers)

    def _start(self, handlers: Mapping[str, Handler]) -> None:
        data = self._context.data
        tests = (*data.tests.values(), *data.client_tests) if self._context.config.own_networks else ()
        parts = (part for split in (*data.clients, data.validation, *tests) for part in (split.images, split.labels))
        if self._group.launched.local_size < self._group.size and any(isinstance(part, FileRows) for part in parts):
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
        """Pack the setup, with a recipe in place of items that cannot be sent."""
        data = self._context.data
        try:
            return self._packer.pack(setup)
        except NotPortable:
            if not isinstance(data.validation, Items):
                raise
        context = copy.copy(self._context)
        context.data = DataRecipe(context.config, data)  # type: ignore[assignment]  # unpickles as the data
        return self._packer.pack(replace(setup, context=context))

    # -- the executor ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        ranks = (None, *self._processes)
        for k in self._requests:
            rank = self._at[k] if k in self._at else ranks[len(self._at) % len(ranks)]
            if rank is None or not self._send(rank, k):
                self._at[k] = None

    def _advance(self, k: ClientId) -> None:
        """Listen to the next client's rank, and work for this rank's later clients meanwhile."""
        self._group.check()
        if (rank := self._at[k]) is not None:
            idle = bool(self._todo) and len(self._replies) < AHEAD
            packet = self._group.receive_from(rank, 0.0 if idle else 0.5)
            if (reply := None if packet is None else self._read(packet)) is not None:
                self._replies[k] = reply
            elif idle:
                self._work(self._todo[0])
        elif k in self._todo:
            self._work(k)
