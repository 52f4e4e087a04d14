"""`run`: one federated run from its settings to its folder, resumable at any point."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedkern import atomic, plugins
from fedkern.allocator import keep_freed_memory
from fedkern.data import used_cache
from fedkern.data.identity import data_fingerprint, of_memory
from fedkern.engine import initial_weights, own_model, own_training
from fedkern.engine.client_states import ClientStates
from fedkern.engine.clients import Everybody, compare_teachers
from fedkern.engine.context import RunContext
from fedkern.engine.evaluate import client_sets, test_sets
from fedkern.engine.executors import team
from fedkern.engine.executors.base import Executor, ServerSide
from fedkern.engine.executors.choice import executor_of
from fedkern.engine.executors.nursery import own_nursery
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.sizing import worker_bytes
from fedkern.engine.executors.workers import setup_of
from fedkern.engine.ledger import Ledger
from fedkern.engine.loop import Loop
from fedkern.engine.own_training import OwnTraining
from fedkern.engine.participants import sample_clients
from fedkern.engine.parts.answers import Answers
from fedkern.engine.parts.artifacts import Artifacts
from fedkern.engine.parts.base import Part
from fedkern.engine.parts.budgets import MaxBytes, MaxSeconds
from fedkern.engine.parts.checkpointing import Checkpointing
from fedkern.engine.parts.diagnoses import Diagnoses
from fedkern.engine.parts.evaluation import Evaluation
from fedkern.engine.parts.listening import Listening
from fedkern.engine.parts.oracle import Oracle
from fedkern.engine.parts.privacy import Privacy
from fedkern.engine.parts.records import Records
from fedkern.engine.parts.results import Results
from fedkern.engine.parts.server_figures import ServerFigures
from fedkern.engine.parts.stopping import Patience, StopAt
from fedkern.engine.parts.trace import Trace
from fedkern.engine.parts.traffic import Traffic
from fedkern.engine.parts.warnings import Warnings
from fedkern.engine.preparing import Prepared, prepare
from fedkern.engine.round_log import RoundLog
from fedkern.engine.store import records, saved_model
from fedkern.engine.store.artifacts import Gallery
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.predictions import FILE as PREDICTIONS
from fedkern.engine.store.releases import Releases
from fedkern.engine.store.resuming import (
    changes,
    check_kernels,
    check_same,
    check_unedited,
    facts_of,
    repairs,
    with_identity,
)
from fedkern.engine.store.run_folder import NODES, check_vacant, writing
from fedkern.engine.store.scribe import Scribe
from fedkern.engine.timing import Timing
from fedkern.engine.uploads.bytes import Bytes
from fedkern.engine.uploads.declared import Declared
from fedkern.engine.uploads.digests import ClientDigests, ServerDigests
from fedkern.engine.uploads.filters import Filter
from fedkern.engine.uploads.norm_bounds import NormBounds
from fedkern.engine.uploads.private_mean import PrivateMean
from fedkern.engine.uploads.reduction import Following, Reduction, has_room
from fedkern.errors import UserError
from fedkern.interrupts import in_order
from fedkern.listeners.audience import Audience
from fedkern.listeners.events import Listener, RunInfo
from fedkern.methods.base import Method
from fedkern.models import available
from fedkern.models.freezing import frozen_norms
from fedkern.models.own import unwrapped
from fedkern.models.precision import computing
from fedkern.settings.config import RunConfig
from fedkern.settings.grounds import files_identity
from fedkern.settings.run_data import caveats, check_data, decided, effective, kept_data, load_data
from fedkern.settings.run_format import NAME as SETTINGS
from fedkern.settings.stored import load_settings
from fedkern.torch_modes import cpu_threads, current_gpu, reproducible


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
    model: nn.Module | None = None,
    own: OwnTraining | None = None,
    elsewhere: Callable[[ServerSide], Executor] | None = None,
    check: Callable[[RunConfig], None] | None = None,
) -> dict[str, Any]:
    """Runs a method and returns the summary that also stands in ``out/summary.json``.

    With several threads on a machine that does other work too, set ``OMP_WAIT_POLICY=PASSIVE`` in the environment
    before torch is imported.  OpenMP's threads otherwise spin while they wait for each other, and a small network then
    trains several times slower than on one thread.  The command line sets this variable there, and
    ``GOMP_SPINCOUNT=10000`` where nothing else runs.

    From here on, memory that this process frees stays with it (see
    :func:`~fedkern.allocator.keep_freed_memory`).

    Args:
        config: all settings.  A resumed run must have its stored settings; only the data folder, the cache of
            decoded images, the device and the number of workers may differ.
        out: the run folder; unless ``resume`` it must hold nothing that a run writes.
        resume: continue from the last checkpoint (round 0 where there is none); a finished run returns its summary.
        listener: receives the run's events; several go into :class:`fedkern.listeners.Listeners`.
        data: federated data in memory instead of ``fedkern.data.load``; ``config`` should describe them.
        trusted: code that a resumed run may import, such as ``["python:MODULE:NAME"]`` or the name of a plugin; any
            other code that the run folder names is refused.
        model: the run's network, instead of ``config.model``: a module whose weights are the initial weights.  It is
            copied.  A resumed run needs it again.
        own: functions that the user trains with; a resumed run needs them again.
        profile: write a trace of one round to ``out/profile.json.gz``: the second round that is played, or the only
            one.  All clients of that round work in this process.
        predictions: write the final network's answer to every test image to ``out/predictions.csv`` (classification).
            A finished run without this file is evaluated once more.
        elsewhere: makes the executor of clients that keep their data and states to themselves (see
            :attr:`~fedkern.engine.executors.base.Executor.apart`); None: clients work on this machine, or on the ranks
            of torchrun.  With ``data``, their samples are not known here (:func:`declared_data`).
        check: called with the effective settings, what was found in data and files included, before anything is
            written; its UserError ends the run.

    Raises:
        UserError: anything the user can put right.  No half-written file is left.  A new run that has done no round
            leaves nothing at all.
        fedkern.interrupts.Terminated: SIGTERM arrived.  The last checkpoint stands, as after Ctrl-C or ``kill -9``.
    """
    out = Path(out)
    with closing(Audience(listener or Listener())) as audience, reproducible():
        own_training.check_method(config, own)
        if model is not None:
            model = unwrapped(model)
            config = own_model.of_module(config, model)
        if resume:
            stored = load_settings(out, trusted=trusted, device=config.device)  # the stored device may not exist here
            config = config.replace(
                client_threads=config.client_threads or stored.client_threads, plugins=plugins.now(stored.plugins)
            )
            config = config.replace(**{name: getattr(stored, name) for name in config.left_open})
            _compare(config if config.augment else config.replace(augment=stored.augment), stored, out)
            entry = Checkpoints(out).peek()
            if entry is not None:
                check_unedited(stored, entry, out)
            finished = _finished(entry, out)
            if finished is not None and not (predictions and not (out / PREDICTIONS).exists()):
                audience.on_end(finished)
                return finished
            if entry is not None:
                _check_place(out, elsewhere is not None)
                check_kernels(entry["info"], config.device, out)
            stored.check_code(out, trusted)
            own_model.check_given(stored, model, out, own)
        else:
            entry = None
            check_vacant(out)
        keep_freed_memory()
        with (
            cpu_threads(config.threads), in_order(), computing(config.precision), current_gpu(config.device),
            available(config.model, model),
        ):  # fmt: skip
            known = data is None or elsewhere is None
            if data is None:
                data = load_data(config, notice=audience.on_notice, identify=entry is None)
                config, identity = decided(config, data), data.identity
            else:
                identity = of_memory(data) if known and entry is None else data.identity
            config = effective(config, data)
            data = kept_data(config, data)
            if entry is None:
                config = config.replace(identity={**identity, **files_identity(config)})
            else:
                config = with_identity(config, entry)
            if resume:
                _compare(config, stored, out)
            check_data(config, data)
            if (data.form.lacks or own is not None) and team.place() is not None:
                raise UserError(
                    "Data sets of PyTorch and functions that train are in the memory of this process, and torchrun's "
                    "other ranks have none: start the script without torchrun, with workers=N."
                )
            config, data, changed = own_model.settled(config, data, stored if resume else None, out, known)
            config = own_training.settled(RunContext(config, data), own, stored if resume else None, out)
            for sentence in (*caveats(data), *changed):
                audience.on_notice(sentence)
            if check is not None:
                check(config)
            context = RunContext(config, data, audience.on_notice, own=own)
            prepared = prepare(
                config, context, known=known, begun=entry is not None, profile=profile, predictions=predictions
            )
            with (
                own_nursery(setup_of(context, prepared.askers)),
                writing(out, fresh=not resume) as alone,
                closing(audience),
            ):  # closed first: what a listener takes back is gone then
                plugins.remember(config.plugins)
                if config.cache is not None or not resume:
                    used_cache.remember(out, config.cache)
                if not resume:
                    initial_weights.keep(config.init)
                    atomic.write_bytes(out / SETTINGS, config.to_toml().encode())
                return _played(
                    prepared, out, audience, alone,
                    resume=resume, profile=profile, predictions=predictions, elsewhere=elsewhere,
                )  # fmt: skip


def _upload_filters(
    prepared: Prepared, executor: Executor, ledger: Ledger, releases: Releases | None, parameters: int
) -> list[Filter]:
    """What the uploads of a run pass on their way to the server, in order."""
    config, private = prepared.config, prepared.private
    bounds = NormBounds(config.max_update_norm, config.clip_update_norm)
    bounded = bool(config.max_update_norm or config.clip_update_norm)
    # Vectors can stay on their ranks, or on the GPU, where nobody but the server's sum wants to see them.
    ranks = isinstance(executor, Ranks) and config.sums == "exact"
    gpu = executor is executor.here and has_room(prepared.context.device, parameters)
    unseen = (ranks or gpu) and prepared.server.aggregator is None
    if gpu:
        prepared.server.summing = Following
    return [
        *([ClientDigests(releases)] if releases is not None and private is None else []),
        Bytes(ledger, hidden=prepared.silent),
        *([Reduction(gpu)] if unseen and not (bounded or releases is not None or private is not None) else []),
        Declared(),
        *([bounds] if bounded else []),
        *([PrivateMean(private, config, prepared.method, prepared.server)] if private is not None else []),
        *([ServerDigests(releases)] if releases is not None and private is not None else []),
    ]


def _played(
    prepared: Prepared,
    out: Path,
    listener: Audience,
    alone: Callable[[], object],
    *,
    resume: bool,
    profile: bool,
    predictions: bool,
    elsewhere: Callable[[ServerSide], Executor] | None,
) -> dict[str, Any]:
    """Plays the rounds that are left, and returns the summary."""
    config, context, server, progress = prepared.config, prepared.context, prepared.server, prepared.progress
    scribe, metrics, timing = Scribe(), records.Metrics(out), Timing()
    store, ledger = Checkpoints(out, scribe, config.trained_clients), Ledger(config.trained_clients)
    entry = store.open(fresh=not resume, begun=resume and metrics.path.exists())
    facts, wire = facts_of(config, context.data, data_fingerprint(context.data)), dict[str, int]()
    if entry is not None:
        check_same(entry, facts, prepared.plan, out)
        server.state = store.server_state()
        progress.done, progress.planned = entry["round"], entry["plan"]
    here = Serial(context, prepared.askers, store.reader, config.client_threads)
    states = ClientStates(here, store, context, progress, prepared.amplified)
    log = RoundLog(context, progress, states, listener, silent=prepared.silent, hint=_undeclared(prepared))
    releases = None if prepared.said is None else Releases(store.folder)
    network = context.build()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sets, own_sets, told = test_sets(context), client_sets(context), context.disclosure
    everybody, gallery = Everybody(context, store), Gallery(out, prepared.rounds)
    method, code, rounds = prepared.method, prepared.code, prepared.rounds

    def info() -> RunInfo:
        executor = states.executor
        workers = 1 if isinstance(executor, Ranks) or executor.apart else executor.count
        return RunInfo(
            config=config,
            out=out,
            first_round=progress.done,
            samples=context.federation.samples,
            parameters=parameters,
            frozen=sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad),
            frozen_norms=len(frozen_norms(network)),
            rounds=tuple(entry for entry in prepared.plan if not entry.one_off),
            test_sets={prefix[:-1]: len(data) for prefix, data in sets.items()},
            data=context.data,
            private=not told.clients,
            guarantee=prepared.said,
            model=context.model_name,
            workers=workers,
            worker_bytes=worker_bytes(context, parameters) if workers > 1 else 0,
        )

    words, hooks = any(one.booked for one in prepared.plan if not one.one_off), prepared.hooks["method"]
    figures = Evaluation(method, hooks, code, context, sets, own_sets, clients=told.clients)
    parts: list[Part] = [
        Traffic(ledger, context, server, store, wire, shared_words=words, secret=prepared.amplified),
        Artifacts(server, gallery, progress, told.server),
        figures,
        ServerFigures(server, told),
        *([] if elsewhere is not None else [Oracle(method, server, code, everybody, sets, told)]),
        Privacy(prepared.said, prepared.private, releases, context, store, progress, rounds),
        *([StopAt(config.stop_at, context)] if config.stop_at is not None else []),
        *([Patience(config.patience, out, context, hooks, figures.latest)] if config.patience is not None else []),
        *([MaxSeconds(config.max_seconds, timing)] if config.max_seconds is not None else []),
        *([MaxBytes(config.max_bytes, ledger)] if config.max_bytes is not None else []),
        Diagnoses(method, code, context, sets, clients=told.clients),
        Answers(out, context, sets, alone, counts=told.clients, each=predictions),
        Records(metrics, context, log, timing),
        Warnings(context, listener),
        Listening(listener, info),
        Results(out, context, sets, progress, timing),
        *([Trace(out)] if profile else []),
    ]

    def kept() -> dict[str, Any]:
        return {part.name: state for part in parts if (state := part.state())}

    parts.append(
        Checkpointing(
            store, out, facts=facts, states=kept, every=config.checkpoint_every, server=server, progress=progress,
            timing=timing, ledger=ledger, metrics=metrics, releases=releases, alone=alone,
        )
    )  # fmt: skip
    if entry is None:
        compare_teachers(context, facts["data"])
    else:
        for part in parts:
            if part.name in entry["info"]["parts"]:
                part.restore(entry["info"]["parts"][part.name])
        for name, text in {**changes(entry["info"], config), **repairs(store, entry, out)}.items():
            context.warn(name, text)
    if elsewhere is None:
        executor = executor_of(prepared, here, store.reader, parameters)
    else:
        promised = prepared.said is not None
        executor = elsewhere(
            ServerSide(context, here, prepared.hooks, store, progress, out, facts["data"], promised, wire)
        )
    states.executor = executor
    draw = partial(sample_clients, config) if prepared.private is None else prepared.private.participants
    loop = Loop(
        prepared.plan, prepared.hooks, prepared.pooling, context, server, progress, draw, executor, states,
        log, _upload_filters(prepared, executor, ledger, releases, parameters), parts,
    )  # fmt: skip
    try:
        for part in parts:
            part.begin(resumed=entry is not None)
        if (stop := loop.play()) is not None:
            listener.on_notice(f"the run ends here: {stop.reason}")
        store.write_at_once()
    finally:
        executor.close()
        scribe.close()
        for part in parts:
            part.close()
    summary = loop.finish(stop).entries
    listener.on_end(summary)
    return summary


def _undeclared(prepared: Prepared) -> str:
    """Hint for the author of a method that does not override ``Method.expects``; else empty."""
    if type(prepared.method).expects is not Method.expects:
        return ""
    return f" ({prepared.config.method} declares no uploads of its own; Method.expects is where a method does.)"


def _check_place(out: Path, elsewhere: bool) -> None:
    """Raises UserError where the states of a run's clients are not where the run would look for them."""
    there = (out / NODES).exists()
    if there and not elsewhere:
        raise UserError(
            f"The states of the clients of {out} are on nodes of Flower: go on with flwr run and the run-config "
            f"'out=\"{out}\" resume=true'."
        )
    if elsewhere and not there:
        raise UserError(f"The run in {out} was not begun over Flower: go on with --resume {shlex.quote(str(out))}.")


def _compare(config: RunConfig, stored: RunConfig, out: Path) -> None:
    if changed := config.differences(stored):
        raise UserError(f"{out} was made with other settings ({'; '.join(changed)}): resume it with its own.")


def _finished(entry: dict[str, Any] | None, out: Path) -> dict[str, Any] | None:
    """The summary of a finished, undamaged run; None where the run has to go on.

    Args:
        entry: the run's newest checkpoint, or None.
        out: the run folder.

    Raises:
        UserError: metrics.jsonl is not what the run wrote, and cannot be made again.
    """
    if entry is None or not entry["info"]["finished"]:
        return None
    records.Metrics(out).check_entry(entry)
    if saved_model.damaged(out, entry):
        return None
    return records.read_summary(out)
