"""Server of the cases of :mod:`differential` in processes of their own, so that a crash is an ordinary failure.

``python case_server.py`` loads torch and the core once, reads pickled ``(operator, case)`` from standard input and
answers with the failure's text, "" for none.  Forks run the cases in batches: a crash takes only the fork with it,
and the case that it was at is known.
"""

import ctypes
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

LIMIT_S = 60
"""What one case may take."""
BATCH = 200
"""Cases that one process runs."""


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the server of cases ended")
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


class Cases:
    """Client of a server of cases."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def failure(self, operator: str, case: dict[str, Any], backend: str) -> str:
        """Return the fault of a case, or "".

        Args:
            operator: a key of ``differential.OPERATORS``.
            case: drawn by its strategy.
            backend: an ISA level of the CPU core, "reference", or "" for the default dispatch.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, (operator, case, backend))
        return str(_receive(self._process.stdout))


@contextmanager
def cases() -> Iterator[Cases]:
    """Start a server of cases for the ``with`` block, on the package and the search path of this process."""
    import fedkern
    from python_tests import warm_python

    path = [str(Path(fedkern.__file__).parent.parent), *sys.path]
    process = warm_python.Popen(
        [sys.executable, "-P", "-m", "python_tests.ops.case_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
    )
    with process:  # which closes both pipes, and waits
        yield Cases(process)


def _run(operator: str, case: dict[str, Any], backend: str) -> str:
    import torch

    from fedkern.ops._core.backend import use_backend, use_isa
    from python_tests.ops import differential

    if operator == "crash":  # for the test of this server
        ctypes.string_at(0)
    torch.manual_seed(0)
    try:
        with use_backend("reference") if backend == "reference" else use_isa(backend) if backend else nullcontext():
            differential.check(operator, case)
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


class _Worker:
    """Fork that runs cases one after another until it is told to end, or crashes."""

    def __init__(self) -> None:
        self.cases = 0
        mine, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            mine.close()
            with theirs.makefile("rwb") as stream, suppress(EOFError):
                while True:
                    _send(stream, _run(*_receive(stream)))
            os._exit(0)
        theirs.close()
        self._socket, self._stream = mine, mine.makefile("rwb")
        mine.settimeout(LIMIT_S)

    def failure(self, request: tuple[str, dict[str, Any], str]) -> tuple[str, bool]:
        """Return the fault of a case, and whether this worker lives on."""
        self.cases += 1
        try:
            _send(self._stream, request)
            return _receive(self._stream), True
        except TimeoutError:
            os.kill(self._pid, signal.SIGKILL)
            self.end()
            return f"took more than {LIMIT_S} s", False
        except (EOFError, ConnectionError):
            status = self.end()
            if os.WIFSIGNALED(status):
                return f"crashed: {signal.Signals(os.WTERMSIG(status)).name}", False
            return f"ended its process with exit code {os.waitstatus_to_exitcode(status)}", False

    def end(self) -> int:
        with suppress(OSError):
            self._stream.close()
        self._socket.close()
        return os.waitpid(self._pid, 0)[1]


def _serve() -> None:
    # Answers go to a descriptor of their own: what a library prints must not get between them.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    from fedkern.ops._core import backend
    from python_tests.ops import differential  # noqa: F401 (workers are forked with it)

    torch.set_num_threads(1)
    backend.cpu_core()
    worker: _Worker | None = None
    while True:
        try:
            operator, case, name = _receive(sys.stdin.buffer)
        except EOFError:
            if worker:
                worker.end()
            return
        worker = worker or _Worker()
        answer, alive = worker.failure((operator, case, name))
        if alive and (answer or worker.cases == BATCH):  # what a failure leaves behind meets no other case
            worker.end()
            alive = False
        worker = worker if alive else None
        _send(answers, answer)


if __name__ == "__main__":
    _serve()
