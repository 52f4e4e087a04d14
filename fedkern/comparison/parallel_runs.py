"""Runs of a comparison that play at once, each in its own process."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fedkern.comparison.cells import Cell, most_threads
from fedkern.engine.executors.choice import find_worker_obstacle
from fedkern.engine.executors.fork_server import describe_end
from fedkern.engine.executors.worker import end_with_parent, with_kernels
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.errors import RunFailed, UserError, traceback_of
from fedkern.listeners.events import Listener, RunInfo
from fedkern.messages.packets import copy_error
from fedkern.methods import method_registry
from fedkern.ops._core import backend
from fedkern.process import machine
from fedkern.process.forking import has_threads
from fedkern.process.torch_modes import modes, set_modes
from fedkern.settings.config import RunConfig
from fedkern.usercode import plugins

PATIENCE = 10.0
"""Seconds that interrupted runs have to end in order before they are killed."""


def check_jobs(jobs: object, configs: Sequence[RunConfig]) -> None:
    if type(jobs) is not int or jobs < 1:
        raise UserError(f'--jobs must be a whole number from 1 on, not "{jobs}".')
    workers = {f"the runs have --workers {config.workers}" for config in configs if config.workers not in ("1", "auto")}
    if jobs > 1 and (why := min(workers, default=find_worker_obstacle("cpu"))):
        raise UserError(f"--jobs {jobs} plays runs in one process each, and {why}: leave one of the two out.")
    threads, cores = most_threads(configs), machine.usable_cores()
    if jobs > 1 and jobs * threads > cores:
        fewer = f", or --threads {cores // jobs}, which may change the bits" if jobs <= cores else ""
        raise UserError(
            f"--jobs {jobs} plays {jobs} runs of --threads {threads} at once, and this process may use {cores} "
            f"core{'s' * (cores > 1)}: give --jobs {max(1, cores // threads)}{fewer}."
        )


class _Forwarder(Listener):
    """Listener that sends a run's events to the process of the comparison."""

    def __init__(self, end: Connection) -> None:
        self._end = end

    def on_start(self, run: RunInfo) -> None:
        self._end.send(("on_start", replace(run, data=None, rounds=())))

    def on_round(self, record: Mapping[str, object]) -> None:
        self._end.send(("on_round", dict(record)))


class RunProcess:
    """The process of a run. Raises UserError if the run cannot be sent to another process, or none can be started.

    ``log`` takes what the run prints. ``play`` is :func:`fedkern.engine.run.run` with its arguments except ``script``.
    """

    def __init__(self, cell: Cell, log: Path, script: ScriptObjects, play: partial[dict[str, Any]]) -> None:
        config: RunConfig = play.args[0]
        # A fork has all that a script defines, but neither threads nor what the GPU's driver knows of the process.
        can_fork = config.device == "cpu" and most_threads([config]) == 1 and not has_threads()
        can_fork = can_fork and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if can_fork else "spawn")
        methods = {name: method_registry.GIVEN[name] for name in {config.method} & method_registry.GIVEN.keys()}
        kernels = backend.active_isa(), backend.forced_backend()
        state = plugins.loaded_plugins(), methods, modes(), *kernels, script.network
        self.cell, self.log = cell, log
        self.connection: Connection
        self.connection, end = context.Pipe()
        self.process = context.Process(target=play_run, args=(end, log, state, script, play))
        script_module = sys.modules["__main__"]
        if not can_fork:
            sys.modules["__main__"] = ModuleType("__main__")  # or the process would begin with the user's script
        try:
            with warnings.catch_warnings(), end:
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads: has_threads() has looked at them
                self.process.start()
        except Exception as error:  # an object may raise anything when it is pickled
            raise UserError(
                f"--jobs cannot start a process for a run ({str(error).partition(chr(10))[0]}): define classes and "
                "functions in a module of their own, or leave --jobs out."
            ) from None
        finally:
            sys.modules["__main__"] = script_module

    def fileno(self) -> int:
        """Return the connection's descriptor, for ``select``."""
        return self.connection.fileno()

    def receive(self) -> tuple[str, Any]:
        """Return the next event and its value. The last event, "end", has the run's error or None."""
        try:
            event, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            how, way = describe_end(self.process.exitcode), "give fewer --jobs, or a smaller --batch-size or --model"
            return "end", RunFailed(f"The process of the run was lost ({how}): {way}.")
        return event, value

    def close(self) -> None:
        """Wait `PATIENCE` seconds for the process to end, then kill it. Remove an empty log."""
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.connection.close()
        with suppress(OSError):
            if not self.log.stat().st_size:
                self.log.unlink()


def play_run(
    end: Connection, log: Path, state: Sequence[Any], script: ScriptObjects, play: Callable[..., object]
) -> None:
    """Run in this process, which exists for the run, and send events and outcome over ``end``.

    ``state`` has plugins, a script's methods, modes and kernels of the comparison's process, and the network of
    ``script``, which travels separately.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the comparison, which ends its runs
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    try:
        plugin_list, methods, mode_table, isa, backend_name, network = state
        plugins.receive(plugin_list)
        method_registry.GIVEN.update(methods)
        set_modes(mode_table)
        with with_kernels(isa, backend_name):
            play(script=replace(script, network=network), listener=_Forwarder(end))
        end.send(("end", None))
    except KeyboardInterrupt:  # SIGTERM
        return
    except (Exception, SystemExit) as error:
        failure = copy_error(error) if isinstance(error, Exception) else error
        vars(failure)["traceback"] = traceback_of(error)
        end.send(("end", failure))
