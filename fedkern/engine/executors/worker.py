"""Worker processes of a run: ``python -m fedkern.engine.executors.worker DESCRIPTOR PARENT``, started by the run alone.

The fork server receives the run's settings and data and forks workers, so that PyTorch is loaded and the data are
mapped once. It never computes, because a process whose OpenMP threads have run cannot be forked, and never sees the
user's ``__main__``.

A worker works as a :class:`~fedkern.engine.executors.serial.Serial` does. It ends with its connection to the run's
process or with its parent. It ignores SIGINT, which a terminal sends to every process in the foreground: the run's
process handles that.

Message classes are in `fedkern.engine.executors.executor`: as ``__main__``, this module would define other
classes than the run's process imports.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import NoReturn

import torch

from fedkern.engine.executors.executor import Clear, Done, Forget, Job, Notice, Setup
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.shared_tensors import Channel
from fedkern.messages.packets import NotPortable, Packer, PacketStream, Unpacker, copy_error
from fedkern.methods import method_registry
from fedkern.models import MODELS
from fedkern.models.precision import compute_in
from fedkern.ops._core import backend, loading
from fedkern.process.allocator import keep_freed_memory
from fedkern.process.forking import cut_connections, has_threads, read_positions, reopen_files
from fedkern.process.standard_streams import tolerate_lost_output
from fedkern.process.torch_modes import reproducible, set_modes
from fedkern.usercode import plugins

_PR_SET_PDEATHSIG = 1


class Worker:
    def __init__(self, setup: Setup, channel: PacketStream) -> None:
        self._channel = channel
        set_modes(setup.modes)
        MODELS.update({entry.name: entry for entry in setup.entries})
        method_registry.GIVEN.update(setup.methods)
        self._context = setup.context
        self._context.notices.on_notice = lambda text: channel.send(Packer().pack(Notice(text)))
        threads = self._context.config.client_threads
        torch.set_num_threads(threads)
        self._serial = Serial(self._context, setup.handlers, lambda _: dict, threads)
        self._packer, self._unpacker = Packer(), Unpacker()

    def serve(self) -> None:
        while True:
            packet = self._channel.receive()
            self._heed(self._unpacker.unpack(packet))  # without a reference, as a message would live until the next one

    def _heed(self, request: Clear | Forget | Job) -> None:
        if isinstance(request, Clear):
            self._unpacker.clear()
            if request.round_over:
                self._serial.end_round()
        elif isinstance(request, Forget):
            self._serial.forget(request.client)
        else:
            self._send(self._serial.reply(request))

    def _send(self, done: Done) -> None:
        if done.failed is not None:
            done.failed = copy_error(done.failed)
        sys.stdout.flush()  # shows what a client's code has printed: a worker may be killed at any time
        try:
            packet = self._packer.pack(done)
        except NotPortable as error:
            client = done.answer.client
            failed = RuntimeError(f"client {client} has {error} in its upload, report or state, which must be tensors")
            packet = self._packer.pack(Done(None, failed=failed))
        self._channel.send(packet)
        self._packer.clear()
        self._channel.forget()


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def with_kernels(isa: str, backend_name: str | None) -> ExitStack:
    forced = ExitStack()
    if isa != "none":
        forced.enter_context(backend.use_isa(isa))
    if backend_name is not None:
        forced.enter_context(backend.use_backend(backend_name))
    return forced


@contextmanager
def as_in_the_run(setup: Setup) -> Iterator[None]:
    keep_freed_memory()
    with with_kernels(setup.isa, setup.backend), compute_in(setup.context.config.precision), reproducible():
        yield


def _work(setup: Setup, end: socket.socket) -> None:
    warnings.simplefilter("ignore", loading.Slower)  # the run's own process warns
    with as_in_the_run(setup):
        if setup.context.config.client_threads > 1:
            backend.trust_fork()
        with suppress(EOFError):
            Worker(setup, Channel(end)).serve()


def serve(
    end: socket.socket, parent: int, setup: Setup | None = None, positions: dict[int, int] | None = None
) -> NoReturn:
    """Run the fork server until its connection to the run's process closes.

    Requests and their answers:

    * import paths with the plugins, then the setup: "ready", or a sentence on what went wrong;
    * "fork" with a connection: the process id of the new worker, which has that connection;
    * the process id of a worker: how the worker ended.

    Args:
        parent: process id of the run's process.
        setup: what clients need, if this process was forked with it. It then computes on one thread, as OpenMP's
            threads do not survive a fork.
        positions: positions in the files that the run's process had open at the fork, or None.
    """
    if setup is not None:
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        end_with_parent()
        if os.getppid() == parent:
            with suppress(EOFError):
                _serve(end, setup, positions)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _serve(end: socket.socket, setup: Setup | None, positions: dict[int, int] | None) -> None:
    channel, unpacker = Channel(end), Unpacker()

    # A started process gets the setup by packet, a forked one has it already.
    if setup is None:
        sys.path[:], plugin_list = channel.receive_value()
        packet = channel.receive()
        try:
            plugins.receive(plugin_list)
            setup = unpacker.unpack(packet)
        except Exception as error:
            channel.say(f"{type(error).__name__}: {error}")
            return
    else:  # networks stay with the run's process
        make, arguments = setup.context.__reduce__()
        setup = replace(setup, context=make(*arguments))

    # A fork shares positions and connections with the run's process until they are reopened and cut.
    if positions is not None:
        cut_connections(end.fileno())
    try:
        reopen_files(read_positions() if positions is None else positions)
    except OSError as error:
        channel.say(f"an open file cannot be opened again: {error}")
        return

    # A process with threads cannot be forked again.
    if has_threads():
        channel.say("modules that it imports start threads")
        return
    channel.say("ready")

    # Requests are "fork", or the process id of a worker whose end is asked for.
    while True:
        request = channel.receive()
        if request.value != "fork":
            channel.say(_wait_for_end(int(request.value)))
            continue
        ours, positions = os.getpid(), read_positions()
        if child := os.fork():
            os.close(request.extra[0])
            channel.say(child)
            continue
        # The child leaves if the fork server died before it could be bound to its end.
        end_with_parent()
        if os.getppid() == ours:
            end.close()
            reopen_files(positions)
            assert setup is not None
            _work(setup, socket.socket(fileno=request.extra[0]))
        os._exit(0)


def _wait_for_end(process: int) -> int | None:
    """Return a worker's exit code, or None if it is alive or unknown."""
    with suppress(ChildProcessError):
        for _ in range(50):  # the worker's connection closes a little before the worker has ended
            child, status = os.waitpid(process, os.WNOHANG)
            if child:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    return None


if __name__ == "__main__":
    tolerate_lost_output()
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
