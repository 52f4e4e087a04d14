"""Rank of torchrun other than 0, where clients work that rank 0 asks.

It loads no data and writes no file. Rank 0 sends settings, data and method, and prints all messages.
"""

from __future__ import annotations

import time
import traceback
from contextlib import suppress

import torch

from fedkern.engine.executors.worker import Worker, as_in_the_run
from fedkern.engine.executors.worker_messages import Setup
from fedkern.engine.transport.connection import Connection, Ended, Lost
from fedkern.engine.transport.torchrun_group import GO_ON, LEAVING, TorchrunGroup
from fedkern.errors import RunFailed, UserError
from fedkern.messages.packets import Unpacker
from fedkern.process import interrupts
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
