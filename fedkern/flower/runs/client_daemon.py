"""A process that stays on a node and answers a client's messages, where Flower starts one process for each.

Flower's process would import torch, load the data and replay the round for every message. Instead it hands the message,
without importing torch, to a *client daemon*, which the first process started. The bits are the same.

A daemon works for one run and one SuperNode. It ends with its run, after a while without messages, and with the process
that started its first message. Both ends talk over an abstract Unix socket (only on Linux), which leaves no file, and
check the other end's user.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedkern.errors import Malformed, UserError
from fedkern.files.filesystem import parse_json
from fedkern.flower.runs.node_config import STAYS, UserConfig

PATIENCE = 10.0
"""Seconds to wait for the bytes of a message that has begun, while other messages queue."""
_TRIES = 3
_LOOKS, _PAUSE = 100, 0.02
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fedkern.flower.runs.client_daemon import live; "
    "live(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))"
)
_LENGTHS = struct.Struct(">QQ")  # of the JSON and of the message
_BACKLOG = 16
_CREDENTIALS = struct.Struct("3i")  # process, user and group

Notice = Callable[[str], None]


class Lost(Exception):
    """The client daemon ended while it worked."""


class _Gone(Exception):
    """The client daemon ended before it took the message."""


def ask_daemon(
    header: str, packed: bytes, run_config: UserConfig, node: UserConfig, notice: Notice, stays: float = STAYS
) -> bytes | None:
    """Return the daemon's answer, None if no daemon can be had. Start a daemon if there is none.

    Raises:
        Malformed, UserError: as in `fedkern.flower.runs.node_process.answer_message`.
        RuntimeError: any other exception there.
        Lost: the daemon ended while it worked.
    """
    if not is_possible():
        return None
    request = {"header": header, "run_config": dict(run_config), "node": dict(node)}
    for _ in range(_TRIES):
        try:
            link = _connect_daemon(_name(_run(header), node), stays)
        except OSError:  # also of a system that hides processes, or forbids what a client daemon needs
            return None
        with suppress(_Gone), link, link.makefile("rb") as replies:
            return _exchange(link, replies, request, packed, notice)
    return None


def is_possible() -> bool:
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def end_daemon(run: str, node: UserConfig) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(_name(run, node))
        if user_of(link) == os.geteuid():
            send(link, {"end": True})


def _run(header: str) -> str:
    values = parse_json(header)
    return str(values.get("run")) if isinstance(values, dict) else ""


def _name(run: str, node: UserConfig) -> bytes:
    """Return the socket's name, which differs by run, node configuration, code and SuperNode."""
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    space = str(Path("/proc/self/ns/pid").readlink())  # containers may share sockets, and number processes alike
    made_of = [run, dict(node), sys.path, sys.executable, parent, started, space, os.geteuid()]
    return b"\0fedkern-" + hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest().encode()


def _connect_daemon(name: bytes, stays: float) -> socket.socket:
    """Connect to the client daemon, or raise OSError, also if the name is another user's or nobody answers."""
    for _ in range(_LOOKS):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(name)
            if user_of(link) != os.geteuid():
                raise PermissionError
            return link
        except ConnectionRefusedError:
            link.close()
            if not _start(name, stays):
                time.sleep(_PAUSE)  # another process has the name and may be about to listen
        except BaseException:
            link.close()
            raise
    raise TimeoutError


def _start(name: bytes, stays: float) -> bool:
    """Start a client daemon, False if another process has taken the name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        try:
            door.bind(name)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        door.listen(_BACKLOG)
        parent = os.pidfd_open(os.getppid())
        try:
            words = [json.dumps(sys.path), str(door.fileno()), str(parent), repr(stays)]
            subprocess.Popen(
                [sys.executable, "-c", _MAIN, *words], stdin=subprocess.DEVNULL, pass_fds=(door.fileno(), parent)
            )
        finally:
            os.close(parent)
    return True


def _exchange(
    link: socket.socket, replies: BinaryIO, request: Mapping[str, object], packed: bytes, notice: Notice
) -> bytes:
    try:
        send(link, request, packed)
        receive(replies)  # that it has begun
    except (EOFError, OSError) as error:
        raise _Gone from error
    while True:
        try:
            values, answer = receive(replies)
        except (EOFError, OSError):
            raise Lost(
                "The process of this client ended before it had answered: the machine's log says why; it may have had "
                "too little memory."
            ) from None
        if "notice" in values:
            notice(values["notice"])
            continue
        for name, kind in (("malformed", Malformed), ("refused", UserError), ("failed", RuntimeError)):
            if name in values:
                raise kind(values[name])
        return answer


# -- what both ends send -----------------------------------------------------------------------------------------------


def user_of(link: socket.socket) -> int:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def send(link: socket.socket, values: Mapping[str, object], packed: bytes = b"") -> None:
    head = json.dumps(values).encode()
    link.sendall(_LENGTHS.pack(len(head), len(packed)) + head)
    link.sendall(packed)


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    head, size = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    return json.loads(_exactly(stream, head)), _exactly(stream, size)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


# -- the client daemon -----------------------------------------------------------------------------------------------


def live(door: int, parent: int, stays: float) -> None:
    """Answer messages at the socket ``door`` until none has come for ``stays`` seconds or the process ``parent`` ends.

    ``door`` and ``parent`` are descriptors.
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
            with link, suppress(EOFError, OSError):  # the asking process is gone, or silent
                link.settimeout(PATIENCE)
                if user_of(link) == os.geteuid():
                    with link.makefile("rb") as requests:
                        if not _serve(link, requests, node_process.answer_message):
                            return


def _end_with(process: int) -> None:
    select.select([process], [], [])
    os._exit(0)  # no process waits for what the main thread is computing


def _serve(link: socket.socket, requests: BinaryIO, answer: Callable[..., bytes]) -> bool:
    """Answer one message, False if the run has ended."""
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
