"""Python processes that begin with PyTorch and fedkern imported: forks of one process that has computed nothing.

The imports take a process longer than most of what tests ask of it.  A test of how a process starts, or of what it
imports, starts a real one.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

StartedPopen = subprocess.Popen
PRELOADED = ("fedkern.api", "fedkern.engine.run", "fedkern.engine.worker")
MAX_FILES = 16
FREE = 200
"""Descriptors from here on are free in a process that has just begun."""


class WarmServer:
    """The process that forks others, until the connection to it is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            self._process = StartedPopen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], stdin=subprocess.DEVNULL, env=environment,
                pass_fds=[theirs.fileno()], process_group=0,
            )  # fmt: skip

    def start(self, request: dict[str, Any], files: list[int]) -> tuple[int, socket.socket]:
        """Start a process, and return its number and the socket that tells how the process ends."""
        told, tells = socket.socketpair()
        with tells, self._lock, tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.flush()
            socket.send_fds(self._connection, [b"."], [file.fileno(), tells.fileno(), *files])
        return int.from_bytes(told.recv(4), "big"), told

    def close(self) -> None:
        """End the process, which waits for those that it has forked."""
        self._connection.close()
        self._process.wait()


@functools.cache
def warm_server() -> WarmServer:
    """Return the server of this process, which starts with the first call."""
    server = WarmServer()
    atexit.register(server.close)
    return server


class Popen(StartedPopen):  # type: ignore[type-arg]
    """``subprocess.Popen`` that forks the warm process for ``[sys.executable, flags, -m or -c or a file, ...]``."""

    _told: socket.socket | None = None

    def _execute_child(self, args: Any, *others: Any) -> None:
        if isinstance(args, (str, bytes, os.PathLike)) or args[0] != sys.executable:
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        _, _, _, pass_fds, cwd, env, _, _, _, *pipes, _, _, _, _, _, is_session, group = others
        request = {
            "words": [os.fspath(word) for word in args[1:]], "folder": os.fspath(cwd or "."), "group": group,
            "environment": dict(os.environ if env is None else env), "is_session": is_session, "files": list(pass_fds),
        }  # fmt: skip
        streams = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        self.pid, self._told = warm_server().start(request, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._told is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]
        try:
            status = self._told.recv(4, socket.MSG_DONTWAIT if wait_flags else socket.MSG_WAITALL)
        except BlockingIOError:
            return 0, 0
        self._told.close()
        return self.pid, int.from_bytes(status, "big")

    def _internal_poll(self, *given: Any, **more: Any) -> int | None:
        if self._told is None:
            return super()._internal_poll(*given, **more)  # type: ignore[misc, no-any-return]
        with self._waitpid_lock:  # type: ignore[attr-defined]
            if self.returncode is None:
                process, status = self._try_wait(os.WNOHANG)
                if process:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


@contextmanager
def warm_fork_servers() -> Iterator[None]:
    """Have runs inside the block start their fork servers warm."""
    import pytest

    from fedkern.engine.executors import fork_server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_server, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Popen}))
        yield


# -- in the warm process -----------------------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> None:
    """Fork a process for each request, with a parent that waits for it."""
    for name in PRELOADED:
        import_module(name)
    base = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    gc.collect()
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1, MAX_FILES)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            break
        if not os.fork():
            connection.close()
            _wait_for_another(files, base)
        for file in files:
            os.close(file)
    signal.alarm(20)  # for what a failed test has left
    with suppress(ChildProcessError):
        while os.wait():
            pass


def _wait_for_another(files: list[int], base: list[str]) -> NoReturn:
    """Fork the process that was asked for, say its number, and how it ends."""
    with os.fdopen(files[0], "rb") as file:
        file.seek(0)
        request = json.load(file)
    tells = socket.socket(fileno=files[1])
    process = os.fork()
    if not process:
        tells.close()
        _become(request, files[2:], base)
    for file in files[2:]:
        os.close(file)
    tells.sendall(process.to_bytes(4, "big"))
    status = os.waitpid(process, 0)[1]
    with suppress(OSError):
        tells.sendall(status.to_bytes(4, "big"))
    os._exit(0)


def _become(request: dict[str, Any], files: list[int], base: list[str]) -> NoReturn:
    """Go on as ``python`` does that was started with the words of the request."""
    if request["is_session"]:
        os.setsid()
    elif request["group"] != -1:
        os.setpgid(0, request["group"])
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, FREE) for file in files]
    for file, number in zip(high, (0, 1, 2, *request["files"]), strict=True):
        os.dup2(file, number)
    os.closerange(FREE, FREE + MAX_FILES)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    words, is_safe = request["words"], False
    while words[0] not in ("-m", "-c") and words[0].startswith("-"):
        is_safe |= words.pop(0) in ("-P", "-I")
    code = 0
    try:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [path for path in paths if path] + base
        run_words(words, is_safe=is_safe or bool(os.environ.get("PYTHONSAFEPATH")))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def run_words(words: list[str], *, is_safe: bool) -> None:
    """Run the module, code or file that the words of a command line name."""
    if words[0] == "-m":
        sys.path[:0] = [] if is_safe else [str(Path.cwd())]
        sys.argv[:] = words[1:]
        if words[1] == "fedkern.engine.worker":
            sys.argv[-1] = str(os.getppid())  # whose end is this process's
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[:0] = [] if is_safe else [""]
        sys.argv[:] = ["-c", *words[2:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.path[:0] = [] if is_safe else [str(Path(words[0]).resolve().parent)]
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
