"""Run folder: checks before a new run, clean-up after a failed start, and the file of the network that a run learns.

`fedkern.downstream.saved_network` reads that file, model.safetensors.
"""

import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.data.images import image_cache
from fedkern.engine.context import RunContext
from fedkern.engine.store import artifacts, checkpoints, confusions, initial_weights, predictions, record_files
from fedkern.engine.store.checkpoints import Entry, checksum
from fedkern.errors import NoEffect, UserError
from fedkern.files import atomic, filesystem, folder_lock
from fedkern.messages.states import State
from fedkern.methods import method_registry
from fedkern.settings import config
from fedkern.settings.config import FOLDER, INIT, RunConfig, make_portable
from fedkern.tasks.user_tasks import user_module
from fedkern.usercode import named_code, plugins

MODEL = "model.safetensors"
FORMAT = 1
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def about_network(context: RunContext, config: RunConfig, rounds: int, flat: bool) -> State:
    """Return the description in model.safetensors."""
    data = context.data
    about = {
        "model": context.networks.model_name, "width": config.width, "task": data.task.name,
        "classes": list(data.classes), **data.form.about(), "method": config.method, "rounds": rounds,
    }  # fmt: skip
    about |= context.task_facts
    if flat and (names := [*context.networks.initial_personal]):
        about["personal"] = names
    if flat and context.networks.get("server").constants:
        about["seed"] = config.seed  # from which code may draw buffers that the file does not hold
    if flat and lacks_statistics(context, config):
        about["statistics"] = "batch"
    # The key "samples" marks a module that only the method can build again.
    return about if flat else {**about, "samples": list(context.federation.samples)}


def lacks_statistics(context: RunContext, config: RunConfig) -> bool:
    """Return whether the network has batch norm without the global model's running statistics (``--buffers``)."""
    return not config.statistics and context.networks.get("server").buffers.numel() > 0


def write_model(path: Path, module: nn.Module, about: Mapping[str, object]) -> None:
    """Write a network, such as model.safetensors.

    Tensors are contiguous, by state-dict key; format and ``about`` are JSON in the metadata. With
    ``about["statistics"]`` of ``"batch"``, batch norms that evaluate by the batch's statistics are written without
    running statistics.
    """
    # One metadata key only: the order of several keys in the file would be random.
    metadata = {"fedkern": json.dumps({"format": FORMAT, **about}, sort_keys=True)}
    # Copies on the CPU, each with its own memory, as safetensors refuses shared memory.
    state = module.state_dict().items()
    tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state}
    if about.get("statistics") == "batch":
        for name, layer in norms(module):
            for buffer in RUNNING if layer.training else ():
                tensors.pop(f"{name}.{buffer}" if name else buffer, None)
    atomic.write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


RESULTS = (MODEL, record_files.SUMMARY, record_files.EVALUATION, confusions.FILE, predictions.FILE)
"""Files of a run's end, the last two not in every run."""


def checksum_results(out: Path) -> dict[str, int | None]:
    """Return the CRC-32 of a run's final files and of its data facts, by file name."""
    return {name: checksum(out / name) for name in (*RESULTS, record_files.FILE) if (out / name).exists()}


def find_damaged(out: Path, entry: Entry) -> list[str]:
    return [name for name, value in entry["info"]["results"].items() if checksum(out / name) != value]


def norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, layer) for name, layer in user_module(module).named_modules() if isinstance(layer, _BatchNorm))


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
    config.NAME, FOLDER, record_files.METRICS, record_files.SUMMARY, MODEL, artifacts.FILE, TRACE,
    *ATTACKS.values(), BEST, *BEST_SO_FAR, NODES, confusions.FILE, record_files.EVALUATION, predictions.FILE,
    INIT, record_files.FILE,
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
    if present := [name for name in names if (out / name).exists() or (out / name).is_symlink()]:
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
                if not begun and not isinstance(error, NoEffect):
                    file = out / record_files.METRICS
                    begun = (file.exists() and file.stat().st_size > 0) or checkpoints.read_newest(out) is not None
                if not begun:
                    with suppress(OSError):  # the folder was vacant before
                        checkpoints.Checkpoints(out).discard()
                        for name in (*(name for name in NAMES if name != FOLDER), folder_lock.NAME):  # the lock last
                            (out / name).unlink(missing_ok=True)
                raise
    except Exception as error:
        if not begun:
            for folder in folders:
                with suppress(OSError):  # the folder is not empty
                    folder.rmdir()
        if isinstance(error, atomic.Unwritable):
            remedy = "free some space" if error.full else "put that right"
            command = f"go on with --resume {shlex.quote(str(out))}" if begun else "start again"
            way = f"{remedy}, then {command}" if begun or error.full else "choose another folder with --out"
            raise UserError(f"{error.problem}: {way}.") from None
        raise
