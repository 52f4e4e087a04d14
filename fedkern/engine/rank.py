"""A rank of torchrun other than 0: it waits for the clients that rank 0 asks it to have at work.

It loads no data and writes no file.  Rank 0 sends the settings, the data and the method, as a run's process sends them
to its workers, and says what there is to say.
"""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fedkern.engine.executors.connection import Connection, Ended, Lost
from fedkern.engine.executors.torchrun_group import GO_ON, LEAVING, TorchrunGroup
from fedkern.engine.executors.worker_messages import Clear, Done, Setup, Sum
from fedkern.engine.worker import Worker, as_in_the_run
from fedkern.errors import RunFailed, UserError
from fedkern.messages.packets import Unpacker
from fedkern.ops import Accumulator
from fedkern.process import interrupts
from fedkern.usercode import plugins

FAILED = 1


def serve(group: TorchrunGroup) -> int:
    """Works until rank 0 ends.

    Returns:
        The exit code of rank 0; 1 where this rank has failed and rank 0 says so; 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        RunFailed: rank 0 was lost.
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
        interrupts.ended()
        with suppress(Ended, Lost):  # rank 0 has the same signal, and is not to take this rank for lost
            _wait(connection)
        return 143 if isinstance(stop, interrupts.Terminated) else 130
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}."
        group.leave(FAILED, reason)
        try:
            _wait(connection)
        except Ended:  # rank 0 has heard it, and says it
            return FAILED
        except Lost:
            pass
        raise RunFailed(f"Rank {group.rank} failed: {reason}") from None
    return 0


class RankWorker(Worker):
    """A worker that can keep vectors of uploads, and add them up (see `Method.reduce`)."""

    def __init__(self, setup: Setup, connection: Connection) -> None:
        super().__init__(setup, connection)
        self._kept: dict[tuple[int, str], Tensor] = {}  # by client and name, until the next exchange
        self._serial.keep = self._keep

    def _heed(self, request: Any) -> None:
        if isinstance(request, Sum):
            total = Accumulator(request.size, exact=True)
            for client, name, weight in request.terms:
                total.add(self._kept[client, name], weight)
            self._send(Done(total.state_dict()))
            return
        if isinstance(request, Clear):
            self._kept.clear()
        super()._heed(request)

    def _keep(self, client: int, name: str, vector: Tensor) -> None:
        self._kept[client, name] = vector.clone()  # the next client may train in the same memory


def _serve(connection: Connection) -> None:
    plugins.receive(connection.told())
    setup: Setup = Unpacker().unpack(connection.receive())
    if setup.context.config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU on this machine, but on that of rank 0: give fedkern --device cpu.")
    with as_in_the_run(setup):
        RankWorker(setup, connection).serve()


def _wait(connection: Connection) -> None:
    """Waits until rank 0 ends, which raises Ended or Lost, or `LEAVING` seconds."""
    until = time.monotonic() + LEAVING
    while time.monotonic() < until:
        connection.get(0.5)
