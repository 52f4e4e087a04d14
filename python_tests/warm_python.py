"""Python processes that begin with PyTorch and fedkern imported: forks of one process that has computed nothing.

The imports take longer than most work of a test's process.  A test of how a process starts, or of what it imports,
starts a real one.
"""

import atexit
import ctypes
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from fedkern.files.filesystem import fcntl

StartedPopen = subprocess.Popen
_LOCK = threading.Lock()
PRELOADED = ("fedkern.api", "fedkern.engine.run", "fedkern.engine.executors.worker")
MAX_FILES = 16
_PR_SET_CHILD_SUBREAPER = 36


@functools.cache
def warm_server(process_id: int) -> socket.socket:
    """Start the process that forks others for the process of this number, and return the connection that ends it."""
    connection, theirs = socket.socketpair()
    with theirs:
        process = StartedPopen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
            process_group=0, pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    atexit.register(process.wait)
    atexit.register(connection.close)
    return connection


class Popen(StartedPopen):  # type: ignore[type-arg]
    """``subprocess.Popen`` whose ``[sys.executable, "-m", ...]`` is a fork of the warm process.

    The fork is this process's child, as any other: its parent ends at once, and this process adopts it.
    """

    def _execute_child(self, args, *arguments) -> None:  # type: ignore[no-untyped-def]
        words = [os.fspath(word) for word in args if word != "-P"]
        if words[:2] != [sys.executable, "-m"]:
            super()._execute_child(args, *arguments)  # type: ignore[misc]
            return
        _, _, _, pass_fds, cwd, env, _, _, _, *pipes, _, _, _, _, _, is_session, group = arguments
        streams = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = {
            "words": words[2:], "folder": str(Path(cwd or ".").absolute()), "parent": os.getpid(),
            "group": 0 if is_session else group, "files": list(pass_fds),
            "environment": {**(os.environ if env is None else env)},
        }  # fmt: skip
        connection, prctl = warm_server(os.getpid()), ctypes.CDLL(None).prctl
        with _LOCK, tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.flush()
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(connection, [b"."], [file.fileno(), *streams, *pass_fds])
                if len(answer := connection.recv(4)) < 4:
                    raise OSError("the warm process has ended")
            finally:
                prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self.pid = int.from_bytes(answer, "big")
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


@contextmanager
def warm_fork_servers() -> Iterator[None]:
    """Start the fork servers of runs inside the block warm."""
    import pytest

    from fedkern.engine.executors import fork_server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_server, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Popen}))
        yield


def _serve(connection: socket.socket) -> None:
    """Fork a process for each request."""
    for name in PRELOADED:
        import_module(name)
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1, MAX_FILES)
        if not message:
            return
        if (child := os.fork()) == 0:
            if os.fork() == 0:
                _become(connection, files)
            os._exit(0)
        os.waitpid(child, 0)
        for file in files:
            os.close(file)


def _become(connection: socket.socket, files: list[int]) -> NoReturn:
    """Go on as a ``python`` that was started with the arguments of a request."""
    with os.fdopen(files.pop(0), "rb") as file:
        file.seek(0)
        request = json.load(file)
    while os.getppid() != request["parent"]:
        time.sleep(0.001)
    if request["group"] == 0:
        os.setsid()
    with connection:
        connection.sendall(os.getpid().to_bytes(4, "big"))
    free = max(2, *files, *request["files"]) + 1
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, free) for file in files]
    for file, number in zip(high, (0, 1, 2, *request["files"]), strict=True):
        os.dup2(file, number)
    os.closerange(free, free + MAX_FILES)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    sys.path[:] = [path for path in paths if path]
    code = 1
    try:
        sys.argv[:] = request["words"]
        sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
