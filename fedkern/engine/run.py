"""One federated run from its settings to its folder, resumable at any point."""

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedkern.data.types import FederatedData
from fedkern.engine.executors.choice import executor_of, own_fork_server
from fedkern.engine.executors.executor import Setup
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.parts.part import Part
from fedkern.engine.rounds.loop import Loop
from fedkern.engine.setup.order import filters_of, parts_of, restore, states_of
from fedkern.engine.setup.run_objects import Remote, Request, RunObjects, make_context, open_store, prepare
from fedkern.engine.store.extending import check_extension, former_results_folder, write_extension
from fedkern.engine.store.resuming import check_place, finished_summary, resumed_settings, warn_changes, warn_damage
from fedkern.engine.store.run_folder import check_vacant, keep_settings, writing
from fedkern.engine.uploads.filters import Filter
from fedkern.listeners.events import Listener
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.messages.states import State
from fedkern.models import available
from fedkern.models.precision import compute_in
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
    """Run a method and return the summary of ``out/summary.json``.

    With several threads, set ``GOMP_SPINCOUNT=10000`` before torch is imported, as the command line does. OpenMP's
    threads otherwise spin while they wait, and on a busy machine a small network then trains several times slower than
    on one thread. From here on, freed memory stays with this process
    (:func:`~fedkern.process.allocator.keep_freed_memory`).

    Args:
        config: all settings. A resumed run needs its stored settings; only the data folder, the cache of decoded
            images, ``keep_items``, the device and the number of workers may differ.
        out: the run folder; for a new run it must hold no file of a run.
        resume: continue from the last checkpoint (round 0 without one); a finished run returns its summary.
        data: federated data in memory instead of ``fedkern.data.load``; ``config`` should describe them.
        trusted: code that a resumed run may import, such as ``["MODULE:NAME"]`` or the name of a plugin.
        script: a script's network and functions; a resumed run needs them again.
        profile: write a trace of one round to ``out/profile.json.gz``, in which all clients work in this process.
        predictions: write the final network's answer to every test image to ``out/predictions.csv`` (classification). A
            finished run without this file is evaluated again.
        remote: makes the executor of remote clients (:attr:`~fedkern.engine.executors.executor.Executor.remote`). The
            samples of ``data`` are then unknown here (:func:`~fedkern.settings.run_data.declared_data`).
        check: called with the effective settings before anything is written; its UserError ends the run.
        rounds: total communication rounds of a resumed run, more than before, checked before anything changes
            (:func:`~fedkern.engine.store.extending.check_extension`).
        at_once: largest number of runs on the machine at once, including this one; the summary reports more than one.

    Raises:
        UserError: anything the user can put right. No half-written file is left, and nothing of a new run without a
            round.
        interrupts.Terminated: SIGTERM arrived. The last checkpoint stands, as after Ctrl-C or ``kill -9``.
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
            if (finished := finished_summary(entry, request.out, predictions)) is not None:
                listeners.on_end(finished)
                return finished
            check_place(stored, entry, config.device, request.out, trusted, remote=remote is not None)
            script.check_given(stored, request.out)
        else:
            check_vacant(request.out)
        keep_freed_memory()
        with (
            cpu_threads(config.threads), in_order(), compute_in(config.precision), current_gpu(config.device),
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
            ):  # listeners close first, so that their files are gone before the folder's clean-up
                keep_settings(context.config, request.out, fresh=not resume)
                try:
                    open_store(objects, check_lock)
                    return _play(objects)
                finally:
                    for group, table in script.code(context.config, context.data).items():
                        note_change(context.code[group], table)


def _play(run: RunObjects) -> State:
    store, listener, entry = run.store, run.listener, run.store.entry
    parts: list[Part] = []
    filters: list[Filter] = []
    store.part_states = partial(states_of, parts, filters)
    parts += parts_of(run)
    restore("parts", parts, run)
    if entry is not None:
        run.notices.warn_all(warn_changes(entry["info"], run.config) | warn_damage(store.checkpoints, entry, run.out))
    executor = run.states.executor = executor_of(run)
    try:
        filters += filters_of(run)
        restore("filters", filters, run)
        loop = Loop(run, filters, parts)
        if run.request.rounds is not None and entry is not None:
            if write_extension(store.checkpoints, entry, run.out):
                listener.on_notice(f"results of the former network: {former_results_folder(run.out, entry['round'])}")
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
