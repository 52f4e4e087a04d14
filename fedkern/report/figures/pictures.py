"""Pictures of a run folder: accuracy curves, confusion, partition, client weights, Grad-CAM, the method's artifacts."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedkern.downstream.saved_network import read_model
from fedkern.engine.store.artifacts import Artifact
from fedkern.engine.store.extending import PICTURE_LIST
from fedkern.engine.store.extending import pictures as listed
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError, warn_instead
from fedkern.files import atomic
from fedkern.report.figures.matplotlib_import import without_docstrings
from fedkern.report.names import capitalize
from fedkern.report.run_contents import Contents, read_run_folder
from fedkern.settings.run_data import finished_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedkern.report.figures.curves import Panel

Samples = Callable[[], Any] | None
"""Returns a run's data for pictures of test samples. None: read no data."""
PICTURES = {name: f"{name}.png" for name in (
    "accuracy", "dice", "clients", "confusion", "partition", "gradcam", "weights", "segmentation", "retrieval",
)}  # fmt: skip
CURVES = {"dice": "dice"}
"""Picture names of main figures other than accuracies."""


def write_pictures(
    run_dir: Path,
    *,
    data: object = None,
    model: nn.Module | None = None,
    data_root: str | None = None,
    trusted: Collection[str] = (),
    warn: Callable[[str], object] = warnings.warn,
) -> list[Path]:
    """Draw the pictures of a finished run into its folder, replacing older ones, and list them in pictures.json.

    A run with private records has neither ``confusion.png`` nor ``partition.png``, which hold exact counts, and older
    ones are deleted. If a picture cannot be drawn, ``warn`` is called and the others are still drawn.

    Args:
        data: the ``FederatedData`` of the run, without its holdout (None: load it for pictures of test samples).
        model: the global model (None: load ``model.safetensors``).
        data_root: current folder of the data files.
        trusted: code that may be imported, see :func:`fedkern.load`.
    """
    run = read_run_folder(run_dir, trusted=trusted)
    config = run.config if data_root is None else run.config.replace(data_root=data_root)
    samples = partial(finished_data, config, run_dir) if data is None else lambda: data
    return draw_pictures(run, samples, model=model, trusted=trusted, warn=warn)


def draw_pictures(
    run: Contents, samples: Samples, *, model: nn.Module | None, trusted: Collection[str], warn: Callable[[str], object]
) -> list[Path]:
    """Draw the pictures of a run folder that is already read. Without ``samples`` none of test samples."""
    if run.private and read_summary(run.folder) is None:
        raise UserError(
            f"{run.folder} has no summary.json, and its records are private: finish the run with --resume "
            f"{shlex.quote(str(run.folder))} before its pictures are drawn."
        )
    if not run.records:
        read_metrics(run.folder)  # refuses a folder without the file, of which a page may be
    failed: dict[str, str] = {}
    paths = _draw(run, samples, model, trusted, failed)
    for name, why in failed.items():
        (run.folder / name).unlink(missing_ok=True)  # of an older network
        warn(f"{name} is missing, as it cannot be drawn: {why}.")
    from fedkern.report.figures import plots

    plots.warn_of_missing_letters(warn)
    unseen = [] if samples is not None else [PICTURES[answer_name] for answer_name in _answers(run)]
    if any(not (run.folder / name).exists() for name in unseen):
        way = f"fedkern.load({str(run.folder)!r}).plot() draws those that the network allows"
        warn(f"Pictures of test samples are left out, as a report reads no data: {way}.")
    # A picture that failed is listed, so that :func:`find_pictures` has it drawn again.
    names = json.dumps({"pictures": [*(path.name for path in paths), *failed, *unseen]})
    atomic.write_bytes(run.folder / PICTURE_LIST, (names + "\n").encode())
    return paths


def finished_pictures(
    run_dir: Path,
    *,
    data: object = None,
    model: nn.Module | None = None,
    data_root: str | None = None,
    trusted: Collection[str] = (),
    warn: Callable[[str], object],
) -> tuple[list[Path], str | None]:
    """Draw the pictures at the end of a run, or without ``data`` find those of an earlier end.

    Returns:
        The pictures, and why they cannot be drawn or written, without a full stop, or None.
    """
    if data is None and (drawn_before := find_pictures(run_dir)):
        return drawn_before, None
    try:
        return write_pictures(run_dir, data=data, model=model, data_root=data_root, trusted=trusted, warn=warn), None
    except UserError as error:
        return [], str(error).rstrip(".")


def _draw(
    run: Contents, samples: Samples, model: nn.Module | None, trusted: Collection[str], failed: dict[str, str]
) -> list[Path]:
    with without_docstrings():
        from fedkern.report.figures import answer_sheets, curves, plots

    # Makers of pictures run one by one in _save, so that one that fails does not stop the others.
    config, facts, records, confusion = run.config, run.facts, run.records, run.confusion
    title = f"{run.name}, seed {config.seed}"
    paths: list[Path] = []

    def of_panels(panels: Sequence[Panel], heading: str, **how: Any) -> Figure | None:
        return curves.draw_panels(panels, title=heading, **how) if panels else None

    def accuracy() -> Figure | None:
        chance = run.chance(records)
        return of_panels(curves.accuracy_panels(records, config.main, tests=facts.tests, chance=chance), title)

    def partition() -> Figure:
        parts = f"{config.data}: {statistics.title}"
        parts += f"; held out: {statistics.held_out[0]}" if statistics.held_out is not None else ""
        return plots.partition_picture(statistics, title=parts)

    def weights() -> Figure | None:
        panels = curves.weight_panels(records, by_samples=config.options.get("weighting") == "samples")
        return of_panels(panels, f"Clients of {title}", stacked=True)

    def answer(name: str) -> Figure | None:
        nonlocal model
        model = read_model(run.folder, trusted)[0] if model is None else model
        return answer_sheets.ANSWERS[name](run, samples and samples(), model, trusted)

    # Confusion and partition are exact counts, which a private run must not keep, not even from an earlier time.
    statistics: Any = facts.statistics
    makers: dict[str, Callable[[], Figure | None]] = {
        CURVES.get(config.main, "accuracy"): accuracy,
        "clients": lambda: of_panels(curves.client_panels(records, config.main), f"Clients of {title}"),
    }
    if run.private:
        for picture in ("confusion", "partition"):
            (run.folder / PICTURES[picture]).unlink(missing_ok=True)
    else:
        if confusion is not None and confusion.matrices and confusion.classes:
            makers["confusion"] = lambda: plots.draw_confusions(confusion, title=f"Confusion of {title}")
        if statistics is not None and statistics.classes:
            makers["partition"] = partition
    makers["weights"] = weights
    for name, make in makers.items():
        paths += _save(run.folder / PICTURES[name], make, failed)
    paths += draw_artifacts(run.artifacts, run.folder, run.name, facts.classes, failed)
    # Last, as these load the network and the data.
    for name in _answers(run) if samples is not None else ():
        paths += _save(run.folder / PICTURES[name], partial(answer, name), failed)
    return paths


def _save(path: Path, make: Callable[[], Figure | None], failed: dict[str, str]) -> list[Path]:
    from fedkern.report.figures import plots

    with warn_instead(partial(failed.setdefault, path.name)):
        if (figure := make()) is not None:
            plots.save_png(figure, path)
            return [path]
    return []


def _answers(run: Contents) -> list[str]:
    """Return the names of the pictures of the network's answers that the settings allow."""
    # A network of which clients keep parts to themselves answers nothing. Without running statistics a prediction
    # depends on the batch, so Grad-CAM of a few images would mislead.
    config = run.config
    without = () if config.grad_cam and config.statistics else ("gradcam",)
    return [] if config.keeps_parts else [name for name in run.facts.pictures if name not in without]


def find_pictures(run_dir: Path) -> list[Path]:
    """Return the pictures in a run folder if all are still there, else none."""
    listed_paths = [run_dir / name for name in listed(run_dir)]
    return listed_paths if all(path.exists() for path in listed_paths) else []


def artifact_path(folder: Path, name: str) -> Path:
    return folder / f"{name if name not in PICTURES else name + '_shown'}.png"


def draw_artifacts(
    entries: Iterable[Artifact], folder: Path, title: str, classes: Sequence[str], failed: dict[str, str]
) -> list[Path]:
    """Draw a method's artifacts into ``folder``, one picture per name, and note failures in ``failed``."""
    from fedkern.report.figures import sheet

    groups: dict[str, list[Artifact]] = {}
    for entry in entries:
        groups.setdefault(entry.name, []).append(entry)
    paths = []
    for name, group in groups.items():
        heading = f"{capitalize(name.replace('_', ' '))}, {title}"
        make = partial(sheet.draw_sheet, group, title=heading, classes=classes)
        paths += _save(artifact_path(folder, name), make, failed)
    return paths
