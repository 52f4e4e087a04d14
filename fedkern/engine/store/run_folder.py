"""Run folder: checks before a new run, and clean-up after a failed start."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedkern.data.images import image_cache
from fedkern.engine.store import (
    artifacts,
    checkpoints,
    confusions,
    initial_weights,
    predictions,
    record_files,
    saved_model,
)
from fedkern.engine.store.record_files import FILE as FACTS
from fedkern.errors import NoEffect, UserError
from fedkern.files import atomic, filesystem, folder_lock
from fedkern.methods import method_registry
from fedkern.settings import config
from fedkern.settings.run_format import FOLDER, INIT
from fedkern.settings.stored import make_portable
from fedkern.usercode import named_code, plugins

RUNS = Path("runs")
"""Default parent of run folders."""
ATTACKS = {"last": "attack.json", "best": "attack-best.json"}
"""Results of ``attack``, by network."""
TRACE = "profile.json.gz"
"""Trace of one round (``--profile``)."""
BEST = "best.safetensors"
"""The network of the best round (``--patience``), and its files until the run ends."""
BEST_SO_FAR = ("best-a.safetensors", "best-b.safetensors")
NODES = "flower.json"
"""File of a run with clients on nodes of Flower: the name under which the nodes keep their states."""
NAMES = (
    config.NAME, FOLDER, record_files.METRICS, record_files.SUMMARY, saved_model.MODEL, artifacts.FILE, TRACE,
    *ATTACKS.values(), BEST, *BEST_SO_FAR, NODES, confusions.FILE, record_files.EVALUATION, predictions.FILE,
    INIT, FACTS,
)  # fmt: skip
"""All files and folders that the engine writes into a run folder, except the lock."""


def check_vacant(out: Path) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError(
            f"{out} is a link to a folder that does not exist: make that folder, or choose another with --out."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder with --out.")
    if (out / config.NAME).exists():
        raise UserError(
            f"{out} already holds a run: continue it with --resume {shlex.quote(str(out))}, or choose another --out."
        )
    check_free(out, NAMES)


def keep_settings(settings: config.RunConfig, out: Path, *, fresh: bool) -> None:
    """Keep the settings of a ``fresh`` run, and note its plugins and data cache for the user."""
    plugins.remember(settings.plugins)
    if settings.cache is not None or fresh:
        image_cache.note_cache(out, settings.cache)
    if fresh:
        initial_weights.write_given(settings.init)
        atomic.write_bytes(out / config.NAME, make_portable(settings, out).to_toml().encode())


def run_name(settings: config.RunConfig) -> str:
    data = named_code.short_name(settings.data)
    return f"{method_registry.short_name(settings.method)}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"


def reserve(parent: Path, stem: str, way_out: str) -> Path:
    """Make a new empty folder ``stem``, or ``stem-2`` and so on, at once, so that nobody else takes the name."""
    for number in itertools.count(1):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and parent.is_dir():
                continue
            raise UserError(f"{folder} cannot be made ({error.strerror}): {way_out}.") from None
        return folder
    raise AssertionError


def check_free(out: Path, names: tuple[str, ...]) -> None:
    present = [name for name in names if (out / name).exists() or (out / name).is_symlink()]
    if present:
        raise UserError(
            f"{out} already holds {', '.join(present)}, which a new run would write over: choose another --out, or "
            "move what is there away first."
        )


@contextmanager
def writing(out: Path, *, fresh: bool) -> Iterator[Callable[[], None]]:
    """Make the run folder if missing, and lock it, so that only this process writes to it.

    If a new run fails before its first record and its first checkpoint, its files and folders are deleted. After an
    interruption everything stays, so that the run can be resumed.

    Yields:
        A function that raises UserError if another process has taken over the folder.
    """
    folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    begun = not fresh
    try:
        with atomic.report_unwritable(out):
            out.mkdir(parents=True, exist_ok=True)
        with folder_lock.FolderLock(out) as lock:
            if fresh:
                check_vacant(out)
            filesystem.drop_temporaries(out, NAMES.__contains__)
            try:
                yield lock.check
            except Exception as error:
                begun = begun or (not isinstance(error, NoEffect) and _came_to_something(out))
                if not begun:
                    _take_back(out)
                raise
    except Exception as error:
        if not begun:
            for folder in folders:
                with suppress(OSError):  # the folder is not empty
                    folder.rmdir()
        if isinstance(error, atomic.Unwritable):
            raise UserError(f"{error.problem}: {_way_out(out, error.full, begun)}.") from None
        raise


def _came_to_something(out: Path) -> bool:
    metrics = out / record_files.METRICS
    return checkpoints.read_newest(out) is not None or (metrics.exists() and metrics.stat().st_size > 0)


def _take_back(out: Path) -> None:
    """Delete a new run's files, whose folder was vacant before."""
    with suppress(OSError):
        checkpoints.Checkpoints(out).discard()
        for name in (*NAMES, folder_lock.NAME):
            if name != FOLDER:
                (out / name).unlink(missing_ok=True)


def _way_out(out: Path, full: bool, begun: bool) -> str:
    if begun:
        go_on = f"then go on with --resume {shlex.quote(str(out))}"
        return f"free some space, {go_on}" if full else f"put that right, {go_on}"
    return "free some space, then start again" if full else "choose another folder with --out"
