"""`run`: one federated run from its settings to its folder, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from fedkern.engine.executors.choice import Remote, executor_of, own_fork_server
from fedkern.engine.executors.worker_messages import Setup
from fedkern.engine.loop import Loop
from fedkern.engine.order import filters_of, parts_of, restore, states_of
from fedkern.engine.parts.base import Part
from fedkern.engine.preparing import Prepared, prepare, with_data
from fedkern.engine.run_objects import opened
from fedkern.engine.script_objects import ScriptObjects
from fedkern.engine.store.extending import aside, check_extension, write_extension
from fedkern.engine.store.resuming import changes, check_place, finished_summary, repairs, resumed_settings
from fedkern.engine.store.run_folder import check_vacant, keep_settings, writing
from fedkern.engine.uploads.filters import Filter
from fedkern.listeners.events import Listener
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.models import available
from fedkern.models.precision import computing
from fedkern.process.allocator import keep_freed_memory
from fedkern.process.interrupts import in_order
from fedkern.process.torch_modes import cpu_threads, current_gpu, reproducible
from fedkern.settings.config import RunConfig
from fedkern.usercode.identity import note_change


def run(
    config: RunConfig,
    *,
    out: str | Path,
    resume: bool = False,
    listener: Listener | None = None,
    data: Any = None,
    trusted: Collection[str] = (),
    profile: bool = False,
    predictions: bool = False,
    script: ScriptObjects = ScriptObjects(),
    remote: Remote | None = None,
    check: Callable[[RunConfig], None] | None = None,
    rounds: int | None = None,
    at_once: int = 1,
) -> dict[str, Any]:
    """Runs a method and returns the summary that also stands in ``out/summary.json``.

    With several threads on a machine that does other work too, set ``OMP_WAIT_POLICY=PASSIVE`` in the environment
    before torch is imported.  OpenMP's threads otherwise spin while they wait for each other, and a small network then
    trains several times slower than on one thread.  The command line sets this variable there, and
    ``GOMP_SPINCOUNT=10000`` where nothing else runs.

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
            :attr:`~fedkern.engine.executors.base.Executor.remote`); None: clients work on this machine, or on the ranks
            of torchrun.  With ``data``, their samples are not known here (:func:`declared_data`).
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
    out = Path(out)
    with closing(ListenerGroup(listener or Listener())) as listeners, reproducible():
        config = script.described(config)
        stored = entry = None
        if resume:
            rounds = check_extension(out, rounds, trusted=trusted)
            config, stored, entry = resumed_settings(config, out, trusted, rounds)
            finished = finished_summary(entry, out, predictions)
            if finished is not None:
                listeners.on_end(finished)
                return finished
            check_place(stored, entry, config.device, out, trusted, remote=remote is not None)
            script.check_given(stored, out)
        else:
            check_vacant(out)
        keep_freed_memory()
        with (
            cpu_threads(config.threads), in_order(), computing(config.precision), current_gpu(config.device),
            available(config.model, script.network),
        ):  # fmt: skip
            local = data is None or remote is None
            context = with_data(config, data, listeners.on_notice, script, stored, entry, out, trusted, known=local)
            if check is not None:
                check(context.config)
            if at_once > 1:
                text = f"Up to {at_once} runs shared the machine: their seconds are not those of runs alone."
                context.warn("shared-machine", text)
            prepared = prepare(context, known=local, begun=entry is not None, profile=profile, predictions=predictions)
            with (
                own_fork_server(Setup.of(context, prepared.handlers)),
                writing(out, fresh=not resume) as alone,
                closing(listeners),
            ):  # closed first: what a listener takes back is gone then
                keep_settings(context.config, out, fresh=not resume)
                try:
                    return _played(prepared, out, listeners, alone, resume=resume, remote=remote, rounds=rounds)
                finally:
                    for group, table in script.code(context.config, context.data).items():
                        note_change(context.code[group], table)


def _played(
    prepared: Prepared,
    out: Path,
    listener: ListenerGroup,
    alone: Callable[[], object],
    *,
    resume: bool,
    remote: Remote | None,
    rounds: int | None,
) -> dict[str, Any]:
    """Plays the rounds that are left, and returns the summary."""
    parts: list[Part] = []
    filters: list[Filter] = []
    states = partial(states_of, parts, filters)
    run = opened(prepared, out, listener, alone, states, resume=resume, remote=remote is not None, rounds=rounds)
    parts += parts_of(run)
    restore("parts", parts, run)
    if run.entry is not None:
        warnings = {**changes(run.entry["info"], run.config), **repairs(run.checkpoints, run.entry, out)}
        for name, text in warnings.items():
            run.context.warn(name, text)
    executor = run.states.executor = executor_of(run, remote)
    try:
        filters += filters_of(run)
        restore("filters", filters, run)
        loop = Loop(
            run.plan, run.hooks, run.pooling, run.context, run.server, run.progress, run.participation,
            executor, run.states, run.log, filters, parts,
        )  # fmt: skip
        if rounds is not None and run.entry is not None:
            if write_extension(run.checkpoints, run.entry, out):
                listener.on_notice(f"results of the former network: {aside(out, run.entry['round'])}")
            if spans := run.config.kind.spans:
                listener.on_notice(f"{spans}: the network will not be that of a run of {rounds} rounds from the start")
        for part in parts:
            part.begin(resumed=run.entry is not None)
        if (stop := loop.play()) is not None:
            listener.on_notice(f"the run ends here: {stop.reason}")
        run.checkpoints.write_at_once()
    finally:
        executor.close()
        run.checkpoints.close()
        for part in parts:
            part.close()
    summary = loop.finish(stop).entries
    listener.on_end(summary)
    return summary
