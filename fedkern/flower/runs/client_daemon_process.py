"""The client daemon: the process that `fedkern.flower.runs.client_daemon` starts and asks."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from fedkern.errors import UserError
from fedkern.flower.runs.client_daemon import receive, send, user_of
from fedkern.flower.runs.packed_message import Malformed, PackedMessage

PATIENCE = 10.0
"""Seconds that a client daemon waits for the bytes of a message that has begun; others wait behind that message."""


def live(door: int, parent: int, stays: float) -> None:
    """Answers messages at the listening socket ``door`` until none has come for ``stays`` seconds.

    Both ``door`` and ``parent``, the process with which this one ends, are descriptors.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the SuperNode decides, and this process follows it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from fedkern.flower.runs import node_process

    with socket.socket(fileno=door) as listening:
        listening.settimeout(stays)
        while True:
            try:
                link, _ = listening.accept()
            except TimeoutError:
                return
            with link, suppress(EOFError, OSError):  # whoever asked is gone, or silent
                link.settimeout(PATIENCE)
                if user_of(link) == os.geteuid():
                    with link.makefile("rb") as requests:
                        if not _serve(link, requests, node_process.answer):
                            return


def _end_with(process: int) -> None:
    select.select([process], [], [])
    os._exit(0)  # whatever the main thread is computing: nobody waits for it


def _serve(link: socket.socket, requests: BinaryIO, answer: Callable[..., PackedMessage]) -> bool:
    """Answers one message.

    False where the run has ended and no other will come.
    """
    request, packed = receive(requests)
    if request.get("end"):
        return False
    send(link, {"begun": True})

    def notice(text: str) -> None:
        with suppress(OSError):
            send(link, {"notice": text})

    try:
        reply = answer(request["header"], packed, request["run_config"], request["node"], notice)
    except Malformed as why:
        send(link, {"malformed": str(why)})
    except UserError as error:
        send(link, {"refused": str(error)})
    except Exception as error:  # of a message that no server of fedkern sends
        send(link, {"failed": f"{type(error).__name__}: {error}"})
    else:
        send(link, {}, reply)
    return True
