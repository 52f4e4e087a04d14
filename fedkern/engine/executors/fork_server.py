"""The fork server: the process that forks workers.  It has all that clients need, and has never computed anything."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

import fedkern
from fedkern.engine.executors.shared_tensors import Channel
from fedkern.engine.executors.sizing import unavailable
from fedkern.engine.executors.worker_messages import Setup
from fedkern.messages.packets import NotPortable, Packer, check_portable, only_code_bars
from fedkern.usercode import plugins


class _Process(Protocol):
    """A child process."""

    def kill(self) -> None: ...

    def wait(self) -> Any: ...


class _Forked:
    """A child process made with ``os.fork``."""

    def __init__(self, process: int) -> None:
        self._process = process

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)  # only wait() reaps the child, so its process id is not reused

    def wait(self) -> None:
        os.waitpid(self._process, 0)


_early: list[tuple[_Process, socket.socket]] = []


def fork_early() -> None:
    """Forks the fork server from this process, which has PyTorch loaded; a new process needs seconds to load it.

    Only the command line does this, before anything is computed: a process whose OpenMP threads have run cannot be
    forked.  A user's script may have computed before it starts a run, so a run started there starts a new process.
    """
    if (server := _fork(None)) is not None:
        _early.append(server)


_own: list[tuple[_Process, socket.socket]] = []


@contextmanager
def own_fork_server(setup: Setup) -> Iterator[None]:
    """Context of a run whose fork_server is forked from its process where what clients need cannot be sent to another.

    The run has no thread of its own yet, and the fork server and its workers compute on one thread.
    """
    config = setup.context.config
    barred = unavailable(config.device) or torch.cuda.is_initialized()
    if config.workers != "1" and config.client_threads == 1 and not barred:
        try:
            check_portable(setup)
        except NotPortable:
            # What is open, such as a file of samples, would have one position for all processes.
            if only_code_bars(setup) and (server := _fork(setup)) is not None:
                _own.append(server)
    try:
        yield
    finally:
        _end(_own)


def _fork(setup: Setup | None) -> tuple[_Process, socket.socket] | None:
    """A forked fork server; None where the system allows no process more."""
    from fedkern.engine import worker

    ours, theirs = socket.socketpair()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or both processes would write what is in the buffer
    parent = os.getpid()
    try:
        with warnings.catch_warnings():
            # The warning is about NumPy's threads, which cope with a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError:  # starting a new process later may still work
        ours.close()
        theirs.close()
        return None
    if not child:
        ours.close()
        os.setpgid(0, 0)
        worker.serve(theirs, parent, setup)  # does not return
    theirs.close()
    return _Forked(child), ours


def end_early() -> None:
    """Ends the fork server of :func:`fork_early` if no run has taken it."""
    _end(_early)


def _end(servers: list[tuple[_Process, socket.socket]]) -> None:
    while servers:
        process, end = servers.pop()
        process.kill()
        process.wait()
        end.close()


def _started() -> tuple[_Process, socket.socket]:
    """Starts the fork server as a new process, in a group of its own: a terminal's Ctrl-C must not reach it."""
    ours, theirs = socket.socketpair()
    folder = str(Path(fedkern.__file__).parents[1])
    paths = [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -I, -E, -O, -X ...
    words = [sys.executable, *flags, "-P", "-m", "fedkern.engine.worker", str(theirs.fileno()), str(os.getpid())]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment, process_group=0
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


class Gone(Exception):
    """The fork server is lost or could not be prepared; the message says why, as a part of a sentence."""


class ForkServer:
    """The fork server process, which loads once what clients need and forks workers (see `fedkern.engine.worker`).

    Raises:
        NotPortable: the setup cannot be sent to another process.
        OSError: no process can be started.
    """

    def __init__(self, setup: Setup) -> None:
        self._ready = False
        if _own:
            self._process, ours = _own.pop()
            self._channel = Channel(ours)
            return
        packer = Packer()
        packet = packer.pack(setup)
        try:
            self._process, ours = _early.pop() if _early else _started()
        except OSError:
            packer.clear()
            raise
        self._channel = Channel(ours)
        try:
            paths = [path or str(Path.cwd()) for path in sys.path]
            self._channel.say((paths, plugins.sent(setup.context.config.plugins)))
            self._channel.send(packet)
        except OSError:
            pass  # ready() will find that the process is lost
        finally:
            packer.clear()

    def ready(self, wait: bool) -> bool:
        """Whether workers can be forked by now.

        Args:
            wait: wait until they can.

        Raises:
            Gone: they never can.
        """
        if self._ready:
            return True
        if not wait and not select.select([self._channel], [], [], 0)[0]:
            return False
        answer = self._answer()
        if answer != "ready":
            raise Gone(f"a worker process could not be prepared ({answer})")
        self._ready = True
        return True

    def fork(self) -> tuple[int, Channel]:
        """Forks a worker.

        Returns:
            Its process id, and the connection to it.

        Raises:
            Gone: the fork server is lost.
        """
        ours, theirs = socket.socketpair()
        try:
            self._channel.say("fork", [theirs.fileno()])
            return int(self._answer()), Channel(ours)
        except (OSError, Gone):
            ours.close()
            raise Gone("the process that starts workers was lost") from None
        finally:
            theirs.close()

    def how(self, process: int) -> str:
        """How a worker ended, as a part of a sentence."""
        try:
            self._channel.say(str(process))
            code = self._answer()
        except (OSError, Gone):
            code = None
        if code is None:
            return "it ended"
        if code == -signal.SIGKILL:
            return "it was killed, as the system does where memory runs out"
        return f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"

    def _answer(self) -> Any:
        try:
            return self._channel.told()[0]
        except (EOFError, OSError):
            raise Gone("the process that starts workers was lost") from None

    def close(self) -> None:
        """Ends the fork server, and with it all its workers."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
