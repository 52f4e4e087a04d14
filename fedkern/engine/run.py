"""`run`: one federated run from its settings to its folder, resumable at any point."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkern import atomic, plugins
from fedkern.allocator import keep_freed_memory
from fedkern.data import DETECTION_OPTIONS, FederatedData, load, lookup, used_cache
from fedkern.data.holdout import hold_out
from fedkern.data.identity import of_memory
from fedkern.data.patients import limited
from fedkern.data.split import Split
from fedkern.data.statistics import PartitionStatistics
from fedkern.engine import own_model
from fedkern.engine.audience import Audience
from fedkern.engine.context import RunContext
from fedkern.engine.events import Listener
from fedkern.engine.executors.base import Executor, ServerSide
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.loop import Run
from fedkern.engine.store import records, saved_model
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.predictions import FILE as PREDICTIONS
from fedkern.engine.store.resuming import check_kernels, check_unedited
from fedkern.engine.store.run_folder import NODES, check_vacant, writing
from fedkern.engine.uploads.bytes import Bytes
from fedkern.engine.uploads.declared import Declared
from fedkern.engine.uploads.digests import ClientDigests, ServerDigests
from fedkern.engine.uploads.filters import Filter
from fedkern.engine.uploads.norm_bounds import NormBounds
from fedkern.engine.uploads.reduction import Reduction
from fedkern.errors import UserError
from fedkern.interrupts import in_order
from fedkern.methods import registry
from fedkern.models import available
from fedkern.models.precision import computing
from fedkern.models.registry import check_task
from fedkern.settings import config as settings
from fedkern.settings.config import RunConfig
from fedkern.settings.grounds import files_identity
from fedkern.torch_modes import cpu_threads, reproducible


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
        listener: receives the run's events; several go into :class:`fedkern.engine.Listeners`.
        data: federated data in memory instead of ``fedkern.data.load``; ``config`` should describe them.
        trusted: code that a resumed run may import, such as ``["python:MODULE:NAME"]`` or the name of a plugin; any
            other code that the run folder names is refused.
        model: the run's network, instead of ``config.model``: a module whose weights are the initial weights.  It is
            copied.  A resumed run needs it again.
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
    with closing(Audience(listener or Listener())) as audience, reproducible():
        return _run(config, Path(out), resume, audience, data, trusted, profile, predictions, model, elsewhere, check)


def _run(
    config: RunConfig,
    out: Path,
    resume: bool,
    listener: Audience,
    data: Any,
    trusted: Collection[str],
    profile: bool,
    predictions: bool,
    model: nn.Module | None,
    elsewhere: Callable[[ServerSide], Executor] | None,
    check: Callable[[RunConfig], None] | None,
) -> dict[str, Any]:
    if model is not None:
        config = own_model.of_module(config, model)
    if resume:
        stored = RunConfig.load(out, trusted=trusted, device=config.device)  # the stored device may not exist here
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
            listener.on_end(finished)
            return finished
        if entry is not None:
            _check_place(out, elsewhere is not None)
            check_kernels(entry["info"], config.device, out)
        stored.check_code(out, trusted)
        own_model.check_given(stored, model, out)
    else:
        check_vacant(out)
    keep_freed_memory()
    with (
        cpu_threads(config.threads), in_order(), computing(config.precision),
        available(config.model, model),
    ):  # fmt: skip
        known = data is None or elsewhere is None
        if data is None:
            data = load_data(config, notice=listener.on_notice, identify=not resume)
            config, identity = decided(config, data), data.identity
        else:
            identity = of_memory(data) if known and not resume else data.identity
        config = _effective(config, data)
        data = kept_data(config, data)
        config = config.replace(identity=stored.identity if resume else {**identity, **files_identity(config)})
        if resume:
            _compare(config, stored, out)
        _check(config, data)
        config, changed = own_model.settled(config, data, stored if resume else None, out)
        for sentence in changed:
            listener.on_notice(sentence)
        if check is not None:
            check(config)
        context = RunContext(config, data, listener.on_notice)
        runner = Run(
            config,
            context,
            out,
            listener,
            resume=resume,
            profile=profile,
            predictions=predictions,
            elsewhere=elsewhere,
            filters=upload_filters,
        )
        runner.prepare(known=known)
        with (
            writing(out, fresh=not resume) as runner.alone,
            closing(listener),
        ):  # closed first: what a listener takes back is gone then
            plugins.remember(config.plugins)
            if config.cache is not None or not resume:
                used_cache.remember(out, config.cache)
            if not resume:
                atomic.write_bytes(out / settings.NAME, config.to_toml().encode())
            return runner.go()


def upload_filters(run: Run) -> list[Filter]:
    """What the uploads of a run pass on their way to the server, in order."""
    config, releases, private = run.config, run.releases, run.private
    bounds = NormBounds(config.max_update_norm, config.clip_update_norm)
    bounded = bool(config.max_update_norm or config.clip_update_norm)
    # Vectors can stay on their ranks where nobody but the server's sum wants to see them.
    unseen = isinstance(run.executor, Ranks) and config.sums == "exact" and run.server.aggregator is None
    return [
        *([ClientDigests(releases)] if releases is not None and private is None else []),
        Bytes(run.ledger, hidden=run.silent),
        *([Reduction()] if unseen and not (bounded or releases is not None or private is not None) else []),
        Declared(),
        *([bounds] if bounded else []),
        *([private] if private is not None else []),
        *([ServerDigests(releases)] if releases is not None and private is not None else []),
    ]


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


def on_node(config: RunConfig, notice: Callable[[str], None] | None = None, alone: int | None = None) -> RunContext:
    """What all clients of a run share, as :func:`run` makes it, for a client that works elsewhere.

    Args:
        config: the run's settings.
        notice: called with the progress of something long.
        alone: the client whose data this machine has, and no others'; None: this machine has the data of all clients.

    Raises:
        UserError: the data, or the files that the settings name, are not on this machine.
    """
    if alone is None:
        data = load_data(config, notice=notice)
        config = _effective(decided(config, data), data)
        data = kept_data(config, data)
    else:
        data = data_of_one(config, notice=notice, node=True)
        (own,) = data.clients
        none = own.subset(torch.zeros(0, dtype=torch.int64))
        data = replace(data, clients=tuple(own if k == alone else none for k in range(config.clients)))
        config = _effective(config, data)
    _check(config, data, alone)
    config, _ = own_model.settled(config, data, None, Path())
    return RunContext(config, data, notice)


def data_of_one(config: RunConfig, notice: Callable[[str], None] | None = None, *, node: bool = False) -> FederatedData:
    """The data in this machine's folder, with all training samples as those of one client.

    On a node nothing is held out of them: no set but the server's judges the network.
    """
    if node:
        shares = [name for name in ("test_share", "validation_share") if name in lookup(config.data).options]
        config = config.replace(data_options={**config.data_options, **dict.fromkeys(shares, 0.0)})
    data = load_data(config.replace(clients=1, partition="iid"), notice=notice)
    return replace(data, client_names=None, client_tests=())


def declared_data(data: FederatedData, samples: Sequence[int]) -> FederatedData:
    """Federated data whose clients' samples are elsewhere: of each client only the number of samples is known.

    Args:
        data: gives everything but the clients, test sets included.
        samples: number of training samples of every client.
    """
    count = len(data.classes)
    several = data.task == "multilabel"

    def stand_in(n: int) -> Split:
        shape = {"multilabel": (n, count), "segmentation": (n, 1, 1)}.get(data.task, (n,))
        labels = torch.zeros(shape, dtype=torch.uint8 if several else torch.int64)
        return Split(torch.zeros((n, data.image_shape[0], 1, 1), dtype=torch.uint8), labels)

    statistics = PartitionStatistics(
        np.zeros((len(samples), count), dtype=np.int64), data.classes, "own data", samples=tuple(samples)
    )
    return replace(data, clients=tuple(map(stand_in, samples)), statistics=statistics)


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
    records.Metrics(out).check(entry["info"]["metrics_bytes"], entry["info"]["metrics_sha256"])
    if saved_model.damaged(out, entry):
        return None
    return records.read_summary(out)


@reproducible()
def load_data(
    config: RunConfig,
    *,
    masks: bool = True,
    notice: Callable[[str], None] | None = None,
    progress: Callable[[str], None] | None = None,
    identify: bool = False,
) -> FederatedData:
    """The federated data that the settings name.

    Args:
        config: every setting; a detector runs on its device.
        masks: False leaves out the boxes file or detector that finds the objects of the training images.
        notice, progress, identify: see :func:`fedkern.data.load`.

    Raises:
        UserError: see :func:`fedkern.data.load`.
    """

    def detector(name: str, box_threshold: float, text_threshold: float) -> Any:
        from fedkern.models.detector import GroundingDino

        return GroundingDino(name, box_threshold, text_threshold, device=config.device)

    options, info = config.data_options, lookup(config.data)
    # A default of the method stays; the data set's own gives way to sites that the data name.
    usual = {"clients": info.clients, "partition": info.partition}
    free = {name for name, value in usual.items() if name in config.left_open and getattr(config, name) == value}
    return load(
        config.data,
        root=config.data_root,
        clients=None if "clients" in free else config.clients,
        partition=None if "partition" in free else config.partition or info.partition,
        seed=config.seed,
        train_samples=config.train_samples,
        public_samples=config.public_samples,
        correlation=config.correlation,
        options=options if masks else {key: value for key, value in options.items() if key not in DETECTION_OPTIONS},
        make_detector=detector,
        notice=notice,
        progress=progress,
        cache=config.cache,
        identify=identify,
    )


def decided(config: RunConfig, data: FederatedData) -> RunConfig:
    """The settings with what the loaded data decide where nobody gave it: partition, clients, ``client_test``.

    Own test sets that the data have stay, unless the user asks for others.
    """
    found: dict[str, Any] = {"partition": data.statistics.partition, "clients": len(data.clients)}
    if data.client_tests:
        found["client_test"] = 0.0
    return config.replace(**{name: value for name, value in found.items() if name in config.left_open})


def kept_data(config: RunConfig, data: FederatedData) -> FederatedData:
    """The training data of a run.

    Samples that the settings hold out (``--held-out-client``, ``--client-test``) are removed.  Where patients are the
    unit of privacy, a patient's images beyond the limit (``--patient-images``) are removed too.  With private records
    there is no validation set where its images were drawn from the clients': no noise covers figures on them.

    Raises:
        UserError: see :func:`fedkern.data.holdout.hold_out` and :func:`fedkern.data.patients.limited`.
    """
    kept = hold_out(data, held_out=config.held_out_client, share=config.client_test, seed=config.seed)
    if config.records == "private" and kept.drawn_validation:
        kept = replace(kept, validation=kept.validation.subset(torch.zeros(0, dtype=torch.int64)))
    return limited(kept, config.unit.images, config.seed) if config.unit.name == "patient" else kept


def finished_data(
    config: RunConfig,
    out: str | Path,
    *,
    cache: str | None,
    progress: Callable[[str], None] | None,
) -> FederatedData:
    """The training data of a run in a folder, without masks of objects that would have to be found.

    Args:
        config: the run's settings.
        out: the run folder.
        cache: folder that keeps decoded images; None: the folder that the run used, if it is there.
        progress: called with the progress of a long decoding.

    Raises:
        UserError: see :func:`load_data` and :func:`kept_data`.
    """
    config = config.replace(cache=cache or used_cache.remembered(out))
    return kept_data(config, load_data(config, masks=False, progress=progress))


def _effective(config: RunConfig, data: Any) -> RunConfig:
    """The settings, completed by what follows from the data: clients, augmentation, threads of a client."""
    return config.replace(clients=len(data.clients), augment=config.augment or data.augment).settled()


def _check(config: RunConfig, data: Any, alone: int | None = None) -> None:
    kind = registry.get(config.method)
    if data.task == "multilabel" and not kind.learns(data.task):
        able = ", ".join(sorted(name for name, other in registry.METHODS.items() if other.learns(data.task)))
        raise UserError(
            f'{config.method} learns a single class of every image, and the data set "{config.data}" has several '
            f"labels an image: methods for several labels are {able}."
        )
    if not kind.learns(data.task):
        raise UserError(
            f'{config.method} is for {" and ".join(kind.tasks)}, but the data set "{config.data}" is for {data.task}.'
        )
    check_task(config.model, data.task, config.data, "with --model")
    if config.augment == "window" and all(s.images.shape[2:] == data.image_shape[1:] for s in data.clients):
        raise UserError(
            "--augment window draws the place of a window that is smaller than the images: give one with --data-option "
            "crop=N, which image-text data have, or take another augmentation."
        )
    if config.buffers == "pool" and data.task != "retrieval":
        raise UserError("--buffers pool is for image-text data, whose networks have batch norm in their heads alone.")
    if config.teachers is not None and not registry.get(config.method).takes_teachers:
        able = ", ".join(sorted(name for name, kind in registry.METHODS.items() if kind.takes_teachers))
        raise UserError(f"--teachers is not for {config.method}, whose clients train round by round; it is for {able}.")
    _check_pairs(config, data)
    if alone is None and not all(map(len, data.tests.values())):
        raise UserError("There is no test image: name a test split in the data, or a test_share above 0.")
    for k, split in enumerate(data.clients):
        if len(split) == 0 and alone in (None, k):
            raise UserError(
                f"Client {data.client_label(k)} has no training samples: use fewer clients, more samples, or another "
                f'--partition than "{config.partition}".'
            )


def _check_pairs(config: RunConfig, data: Any) -> None:
    """Raises UserError where encoders would train on a single image-text pair: batch norm in their heads needs two."""
    if data.task != "retrieval":
        return
    if config.batch_size < 2:
        raise UserError(
            "--batch-size 1 is too small for image-text data, where every pair is told from the others of its batch: "
            "give 2 or more."
        )
    for k, split in enumerate(data.clients):
        if len(split) == 1 and not registry.get(config.method).pooled:
            raise UserError(
                f"Client {data.client_label(k)} has a single image-text pair, and every pair is told from the others "
                "of its batch: use fewer clients, more samples, or another --partition."
            )
