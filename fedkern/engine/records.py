"""What a run leaves behind: metrics.jsonl, summary.json and model.safetensors."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedkern
from fedkern import models
from fedkern.engine import atomic
from fedkern.errors import UserError

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
MODEL = "model.safetensors"


def plain(value: Any) -> Any:
    """The same with numbers that JSON knows: NaN and infinities become null, tuples lists, keys texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class Metrics:
    """metrics.jsonl: one JSON object per evaluated round, appended and flushed."""

    def __init__(self, out: Path) -> None:
        self.path = out / METRICS
        self.size = 0

    def truncate(self, size: int) -> None:
        """Forgets what was written after a checkpoint at which the file had ``size`` bytes (0: the whole file)."""
        try:
            with self.path.open("ab") as file:
                file.truncate(size)
        except OSError as error:
            raise atomic.unwritable(self.path, error) from None
        self.size = size

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line and makes it durable."""
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise atomic.unwritable(self.path, error) from None
        self.size += len(line)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run folder, one of each evaluated round; a last line cut off by a crash is left out.

    Raises:
        UserError: the folder has no such file, or a line before the last is not JSON.
    """
    path = out / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is damaged: expected one JSON object per line.") from None
    return records


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json, completely or not at all."""
    text = json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
    atomic.write_bytes(out / SUMMARY, (text + "\n").encode())


def read_summary(out: Path) -> dict[str, Any] | None:
    """summary.json of a finished run, or None."""
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def write_model(out: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes model.safetensors: contiguous tensors by state-dict key, and ``about`` as JSON in the metadata."""
    # One metadata key only: with several, their order in the file would be left to chance.
    metadata = {"fedkern": json.dumps(about, sort_keys=True)}
    atomic.write(out / MODEL, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_model(out: Path | str) -> tuple[models.StagedNetwork, dict[str, Any]]:
    """The final global network of a run folder in eval mode, and what is known about it.

    The second value has ``classes``, ``channels``, ``image_size``, ``mean`` and ``std`` (of images in [0, 1]),
    ``model``, ``width``, ``method`` and ``rounds``.

    Raises:
        UserError: the folder has no finished run, or its file is damaged or of another network.
    """
    path = Path(out) / MODEL
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["fedkern"])
        tensors = load_file(path)
    except FileNotFoundError:
        way_out = f"its run is not finished, continue it with --resume {shlex.quote(str(out))}"
        raise UserError(f"{out} has no {MODEL}: {way_out}.") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    network = models.build(
        about["model"],
        classes=len(about["classes"]),
        channels=about["channels"],
        image_size=min(about["image_size"]),
        seed=0,
        width=about["width"],
    )
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{path} does not hold the parameters of a {about['model']}.") from None
    return network.eval(), about


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "fedkern": fedkern.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
