"""A process that stays on a node and answers a client's messages, where Flower starts one process for each.

Such a process would import torch, load the data, begin with the state on the disk and play the round's earlier messages
again, for every message.  The first one starts a process that stays (*the client daemon*); it and all later ones hand
their message on to the client daemon, and its answer back, without importing torch.  The bits are the same.

A client daemon serves one run and one SuperNode.  It ends with its run, when no message has come for a while, and with
the process that started its first message.  Both ends talk over an abstract Unix socket, so that nothing is left on the
disk, and check that the other one belongs to the same user.  Only Linux has these sockets.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedkern.errors import UserError
from fedkern.files.inputs import parse_json
from fedkern.flower.runs.packed_message import Malformed, PackedMessage, Raw

STAYS = 600.0
"""Seconds that a client daemon waits for the next message, where the run-config does not say."""
_TRIES = 3
_LOOKS, _PAUSE = 100, 0.02
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fedkern.flower.runs.client_daemon_process import live; "
    "live(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))"
)
_LENGTH = struct.Struct(">Q")
_BACKLOG = 16
_CREDENTIALS = struct.Struct("3i")  # process, user and group

Notice = Callable[[str], None]


class Lost(Exception):
    """The client daemon has ended while it worked; the text says so in a sentence."""


class _Gone(Exception):
    """The client daemon has ended before it took the message."""


def ask(
    header: str,
    packed: PackedMessage,
    run_config: Mapping[str, Any],
    node: Mapping[str, Any],
    notice: Notice,
    stays: float = STAYS,
) -> PackedMessage | None:
    """The answer of the client daemon (see `node_process.answer`), which is started where there is none.

    A client daemon that is started now ends ``stays`` seconds after its last message.

    Returns:
        The answer; None where no client daemon can be had.

    Raises:
        Malformed, UserError: as `fedkern.flower.runs.node_process.answer`.
        RuntimeError: another exception of it.
        Lost: the client daemon has ended while it worked.
    """
    if not possible():
        return None
    request = {"header": header, "run_config": dict(run_config), "node": dict(node)}
    for _ in range(_TRIES):
        try:
            link = _connect_daemon(_name(_run(header), node), stays)
        except OSError:  # a system that hides processes, or forbids what a client daemon needs
            return None
        if link is None:
            return None
        with link, link.makefile("rb") as replies:
            try:
                return _asked(link, replies, request, packed, notice)
            except _Gone:
                continue
    return None


def possible() -> bool:
    """Whether this system has what client daemons need."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def end(run: str, node: Mapping[str, Any]) -> None:
    """Ends the client daemon of a run on the node of this configuration, if there is one."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(_name(run, node))
        if user_of(link) == os.geteuid():
            send(link, {"end": True})


def _run(header: str) -> str:
    values = parse_json(header)
    return str(values.get("run")) if isinstance(values, dict) else ""


def _name(run: str, node: Mapping[str, Any]) -> bytes:
    """The socket's name: another one for every run, configuration of the node, code, and SuperNode."""
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    space = str(Path("/proc/self/ns/pid").readlink())  # containers may share sockets, and number processes alike
    made_of = [run, dict(node), sys.path, sys.executable, parent, started, space, os.geteuid()]
    return b"\0fedkern-" + hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest().encode()


def _connect_daemon(name: bytes, stays: float) -> socket.socket | None:
    """A connection to the client daemon.

    None where the name is somebody else's, or nobody answers to it.
    """
    for _ in range(_LOOKS):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(name)
        except ConnectionRefusedError:
            link.close()
            if not _start(name, stays):
                time.sleep(_PAUSE)  # whoever has the name may be about to listen
            continue
        except BaseException:
            link.close()
            raise
        if user_of(link) != os.geteuid():
            link.close()
            return None
        return link
    return None


def _start(name: bytes, stays: float) -> bool:
    """Starts a client daemon.

    False where another process has taken the name.
    """
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


def _asked(
    link: socket.socket, replies: BinaryIO, request: Mapping[str, Any], packed: PackedMessage, notice: Notice
) -> PackedMessage:
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
        elif "malformed" in values:
            raise Malformed(values["malformed"])
        elif "refused" in values:
            raise UserError(values["refused"])
        elif "failed" in values:
            raise RuntimeError(values["failed"])
        else:
            return answer


# -- what both ends send -----------------------------------------------------------------------------------------------


def user_of(link: socket.socket) -> int:
    """The user whose process is at the other end."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def send(link: socket.socket, values: Mapping[str, Any], packed: PackedMessage | None = None) -> None:
    """Sends plain values and a packed: a length, that much JSON, and the arrays' bytes."""
    packed = packed or PackedMessage("", {})
    forms = [[name, raw.dtype, list(raw.shape), len(raw.data)] for name, raw in packed.tensors.items()]
    head = json.dumps({"told": values, "text": packed.text, "tensors": forms}).encode()
    link.sendall(_LENGTH.pack(len(head)) + head)
    for raw in packed.tensors.values():
        link.sendall(raw.data)


def receive(stream: BinaryIO) -> tuple[dict[str, Any], PackedMessage]:
    head = json.loads(_exactly(stream, *_LENGTH.unpack(_exactly(stream, _LENGTH.size))))
    tensors = {name: Raw(dtype, tuple(shape), _exactly(stream, size)) for name, dtype, shape, size in head["tensors"]}
    return head["told"], PackedMessage(head["text"], tensors)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
