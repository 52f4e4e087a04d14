"""`run`: one federated run from its settings to its folder, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedkern.data.types import FederatedData
from fedkern.engine.executors.choice import executor_of, own_fork_server
from fedkern.engine.executors.worker_messages import Setup
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.parts.part import Part
from fedkern.engine.rounds.loop import Loop
from fedkern.engine.setup.order import filters_of, parts_of, restore, states_of
from fedkern.engine.setup.preparing import make_context, prepare
from fedkern.engine.setup.run_objects import Remote, Request, RunObjects, open_store
from fedkern.engine.store.extending import aside, check_extension, write_extension
from fedkern.engine.store.resuming import changes, check_place, finished_summary, repairs, resumed_settings
from fedkern.engine.store.run_folder import check_vacant, keep_settings, writing
from fedkern.engine.uploads.filters import Filter
from fedkern.listeners.events import Listener
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.messages.states import State
from fedkern.models import available
from fedkern.models.precision import computing
from fedkern.process.allocator import keep_freed_memory
from fedkern.process.interrupts import in_order
from fedkern.process.torch_modes import cpu_threads, current_gpu, reproducible
from fedkern.settings.config import RunConfig
from fedkern.usercode.code_identity import note_change


def run(
    config: RunConfig,
    *,
    out: str | Path,
    resume: bool = False,
    listener: Listener | None = None,
    data: FederatedData | None = None,
    trusted: Collection[str] = (),
    profile: bool = False,
    predictions: bool = False,
    script: ScriptObjects = ScriptObjects(),
    remote: Remote | None = None,
    check: Callable[[RunConfig], None] | None = None,
    rounds: int | None = None,
    at_once: int = 1,
) -> State:
    """Run a method and return the summary that also stands in ``out/summary.json``.

    With several threads, set ``GOMP_SPINCOUNT=10000`` in the environment before torch is imported, as the command line
    does.  OpenMP's threads otherwise spin for milliseconds while they wait for each other, and on a machine that does
    other work too a small network then trains several times slower than on one thread.

    From here on, memory that this process frees stays with it (see
    :func:`~fedkern.process.allocator.keep_freed_memory`).

    Args:
        config: all settings.  A resumed run must have its stored settings; only the data folder, the cache of
            decoded images, the device and the number of workers may differ.
        out: the run folder; unless ``resume`` it must hold nothing that a run writes.
        resume: continue from the last checkpoint (round 0 where there is none); a finished run returns its summary.
        listener: receives the run's events; several go into :class:`fedkern.listeners.Listeners`.
        data: federated data in memory instead of ``fedkern.data.load``; ``config`` should describe them.
        trusted: code that a resumed run may import, such as ``["MODULE:NAME"]`` or the name of a plugin; any
            other code that the run folder names is refused.
        script: network and functions that a script gives; a resumed run needs them again.
        profile: write a trace of one round to ``out/profile.json.gz``: the second round that is played, or the only
            one.  All clients of that round work in this process.
        predictions: write the final network's answer to every test image to ``out/predictions.csv`` (classification).
            A finished run without this file is evaluated once more.
        remote: makes the executor of clients that keep their data and states to themselves (see
            :attr:`~fedkern.engine.executors.executor.Executor.remote`); None: clients work on this machine, or on the
            ranks of torchrun.  With ``data``, their samples are not known here (:func:`declared_data`).
        check: called with the effective settings, what was found in data and files included, before anything is
            written; its UserError ends the run.
        rounds: communication rounds in all that a resumed run, finished or not, is to have: more than before.  Nothing
            of the run changes until it is certain that it can go on
            (:func:`~fedkern.engine.store.extending.check_extension`).
        at_once: most runs, this one included, that share the machine; the summary of more than one says so.

    Raises:
        UserError: anything the user can put right.  No half-written file is left.  A new run that has done no round
            leaves nothing at all.
        interrupts.Terminated: SIGTERM arrived.  The last checkpoint stands, as after Ctrl-C or ``kill -9``.
    """
    request = Request(
        Path(out), data, script, trusted, resume=resume, rounds=rounds, profile=profile, predictions=predictions,
        remote=remote, at_once=at_once,
    )  # fmt: skip
    with closing(ListenerGroup(listener or Listener())) as listeners, reproducible():
        config, stored, entry = script.describe_settings(config), None, None
        if resume:
            request = replace(request, rounds=check_extension(request.out, rounds, trusted=trusted))
            config, stored, entry = resumed_settings(config, request.out, trusted, request.rounds)
            finished = finished_summary(entry, request.out, predictions)
            if finished is not None:
                listeners.on_end(finished)
                return finished
            check_place(stored, entry, config.device, request.out, trusted, remote=remote is not None)
            script.check_given(stored, request.out)
        else:
            check_vacant(request.out)
        keep_freed_memory()
        with (
            cpu_threads(config.threads), in_order(), computing(config.precision), current_gpu(config.device),
            available(config.model, script.network),
        ):  # fmt: skip
            context = make_context(request, config, listeners.on_notice, stored, entry)
            if check is not None:
                check(context.config)
            objects = prepare(request, context, listeners, is_begun=entry is not None)
            with (
                own_fork_server(Setup.of(context, objects.handlers)),
                writing(request.out, fresh=not resume) as check_lock,
                closing(listeners),
            ):  # closed first: what a listener takes back is gone then
                keep_settings(context.config, request.out, fresh=not resume)
                try:
                    open_store(objects, check_lock)
                    return _play(objects)
                finally:
                    for group, table in script.code(context.config, context.data).items():
                        note_change(context.code[group], table)


def _play(run: RunObjects) -> State:
    """Play the rounds that are left, and return the summary."""
    store, listener, entry = run.store, run.listener, run.store.entry
    parts: list[Part] = []
    filters: list[Filter] = []
    store.part_states = partial(states_of, parts, filters)
    parts += parts_of(run)
    restore("parts", parts, run)
    if entry is not None:
        warnings = {**changes(entry["info"], run.config), **repairs(store.checkpoints, entry, run.out)}
        for name, text in warnings.items():
            run.notices.warn(name, text)
    executor = run.states.executor = executor_of(run)
    try:
        filters += filters_of(run)
        restore("filters", filters, run)
        loop = Loop(run, filters, parts)
        if run.request.rounds is not None and entry is not None:
            if write_extension(store.checkpoints, entry, run.out):
                listener.on_notice(f"results of the former network: {aside(run.out, entry['round'])}")
            if schedule_note := run.config.kind.schedule_note:
                rounds = f"a run of {run.request.rounds} rounds from the start"
                listener.on_notice(f"{schedule_note}: the network will not be that of {rounds}")
        for part in parts:
            part.begin(resumed=entry is not None)
        if (stop := loop.play()) is not None:
            listener.on_notice(f"the run ends here: {stop.reason}")
        store.checkpoints.write_at_once()
    finally:
        executor.close()
        store.checkpoints.close()
        for part in parts:
            part.close()
    summary = loop.finish(stop).entries
    listener.on_end(summary)
    return summary
