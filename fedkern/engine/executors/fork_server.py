"""Fork server: the process that forks workers. It has all that clients need, and has never computed anything."""

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
from typing import Any

import fedkern
from fedkern.engine.executors.executor import Setup
from fedkern.engine.executors.shared_tensors import Channel
from fedkern.messages.packets import Packer
from fedkern.process.forking import has_threads, read_positions
from fedkern.usercode import plugins


class _Forked:
    def __init__(self, process: int) -> None:
        self._process = process

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)  # only wait() reaps the child, so its process id is not reused

    def wait(self) -> None:
        os.waitpid(self._process, 0)


class Gone(Exception):
    """Loss of the fork server, or its failed start, as a part of a sentence."""


class ForkServer:
    """Process that loads what clients need and forks workers (see `fedkern.engine.executors.worker`)."""

    def __init__(
        self, process: _Forked | subprocess.Popen[bytes], end: socket.socket, *, prepared: bool = False
    ) -> None:
        self._process, self.channel, self.prepared, self._ready = process, Channel(end), prepared, False

    def ready(self) -> bool:
        """Return whether workers can be forked now, or raise Gone if they never can."""
        if not self._ready and select.select([self.channel], [], [], 0)[0]:
            if (answer := self._answer()) != "ready":
                raise Gone(f"a worker process could not be prepared ({answer})")
            self._ready = True
        return self._ready

    def fork(self) -> tuple[int, socket.socket]:
        """Fork a worker, and return its process id and this process's end of the connection to it."""
        ours, theirs = socket.socketpair()
        try:
            self.channel.say("fork", [theirs.fileno()])
            return int(self._answer()), ours
        except Gone:
            ours.close()
            raise
        finally:
            theirs.close()

    def how(self, process: int) -> str:
        """Return how a worker ended, as a part of a sentence."""
        try:
            self.channel.say(str(process))
            code = self._answer()
        except Gone:
            code = None
        return describe_end(code)

    def _answer(self) -> Any:
        try:
            return self.channel.receive_value()
        except (EOFError, OSError):
            raise Gone("the process that starts workers was lost") from None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.channel.close()


def describe_end(code: int | None) -> str:
    """Describe a process's end, as a part of a sentence."""
    if code is None:
        return "it ended"
    if code == -signal.SIGKILL:
        return "it was killed, as the system does where memory runs out"
    return f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"


_ahead: list[ForkServer] = []


def fork_server_of(setup: Setup) -> ForkServer:
    """Return the run's fork server: the one that was forked last, or a new process."""
    if _ahead and _ahead[-1].prepared:
        return _ahead.pop()
    packer = Packer()
    try:
        packet = packer.pack(setup)
        server = _ahead.pop() if _ahead else _start_process()
        paths = [path or str(Path.cwd()) for path in sys.path]
        server.channel.say((paths, plugins.sent_plugins(setup.context.config.plugins)))
        server.channel.send(packet)
    finally:
        packer.clear()
    return server


@contextmanager
def prefork_server(setup: Setup | None = None) -> Iterator[None]:
    """Fork a fork server from this process for a run inside the block, which ends with the block if unused.

    A new process would need seconds to load PyTorch. Without ``setup``, only the command line may call this, before
    anything is computed: a process whose OpenMP threads have run cannot be forked, and a user's script may have
    computed already.

    Args:
        setup: what clients need, if it cannot be sent.
    """
    if (server := _fork(setup)) is not None:
        _ahead.append(server)
    try:
        yield
    finally:
        if server in _ahead:
            _ahead.remove(server)
            server.close()


def _fork(setup: Setup | None) -> ForkServer | None:
    from fedkern.engine.executors import worker

    if has_threads():
        return None
    ours, theirs = socket.socketpair()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or both processes would write what is in the buffer
    parent, positions = os.getpid(), read_positions()
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
        worker.serve(theirs, parent, setup, positions)  # does not return
    theirs.close()
    return ForkServer(_Forked(child), ours, prepared=setup is not None)


def _start_process() -> ForkServer:
    """Start the fork server as a new process in its own group, which a terminal's Ctrl-C does not reach."""
    ours, theirs = socket.socketpair()
    paths = [str(Path(fedkern.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -I, -E, -O, -X ...
    words = [sys.executable, *flags, "-P", "-m", "fedkern.engine.executors.worker"]
    words += [str(theirs.fileno()), str(os.getpid())]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment, process_group=0
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return ForkServer(process, ours)
