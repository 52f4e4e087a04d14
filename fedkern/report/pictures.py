"""The pictures of a run folder: accuracy curves, partition, Grad-CAM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedkern.engine import RunConfig
from fedkern.errors import UserError

EXAMPLES = 8
# Options that only concern the background bank of the training images, of which no picture is made.
DETECTION = ("boxes", "detector", "box_threshold", "text_threshold", "detector_cache")
PICTURES = {"accuracy": "accuracy.png", "partition": "partition.png", "gradcam": "gradcam.png"}


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; an incomplete last line (the run was killed while writing it) is left out.

    Raises:
        UserError: a line in the middle is not JSON.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, text in enumerate(lines, start=1):
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is damaged: expected one JSON object per line.") from None
    return records


def load_data(config: RunConfig) -> Any:
    """The federated data that these settings name, without looking for objects in the training images."""
    from fedkern.data import load

    return load(
        config.data,
        root=config.data_root,
        clients=config.clients,
        partition=config.partition,
        seed=config.seed,
        train_samples=config.train_samples,
        correlation=config.correlation,
        options={name: value for name, value in config.data_options.items() if name not in DETECTION},
    )


def load_model(run_dir: Path, config: RunConfig, data: Any) -> torch.nn.Module:
    """Builds the network of a run and loads its ``model.safetensors``, in eval mode on the CPU.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fedkern import models

    path = run_dir / "model.safetensors"
    channels, height, width = data.image_shape
    model = models.build(
        config.model,
        classes=len(data.classes),
        channels=channels,
        image_size=min(height, width),
        seed=config.seed,
        width=config.width,
    )
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except RuntimeError:
        raise UserError(f"{path} does not hold the parameters of a {config.model}.") from None
    return model.eval()


def write_pictures(run_dir: Path, *, data: Any = None, model: torch.nn.Module | None = None) -> list[Path]:
    """Draws the pictures of a finished run into its folder, replacing older ones.

    Args:
        run_dir: the run folder.
        data: the ``FederatedData`` it ran on; None loads it again.
        model: the global model; None loads ``model.safetensors``.

    Returns:
        What was written: ``accuracy.png``, ``partition.png``, and ``gradcam.png`` where the network has stages.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    from fedkern.data import normalise
    from fedkern.models import StagedNetwork
    from fedkern.report import gradcam, plots

    config = RunConfig.load(run_dir)
    data = load_data(config) if data is None else data
    name = f"{config.method} on {config.data}"
    written = []
    target = run_dir / PICTURES["accuracy"]
    if plots.accuracy_curves(read_records(run_dir), target, title=f"{name}, seed {config.seed}"):
        written.append(target)
    target = run_dir / PICTURES["partition"]
    plots.partition_picture(data.statistics, target, title=f"{config.data}: {data.statistics.partition}")
    written.append(target)
    model = load_model(run_dir, config, data) if model is None else model
    if not isinstance(model, StagedNetwork):
        return written
    panels = {}
    for key, split in data.tests.items():
        rows = gradcam.choose(split.labels, EXAMPLES)
        if len(rows) == 0:
            continue
        images = split.images[rows]
        masks = split.masks[rows] if split.masks is not None else None
        panels[key] = (images, normalise(images, data.mean, data.std), split.labels[rows], masks)
    if panels:
        target = run_dir / PICTURES["gradcam"]
        gradcam.draw(model, panels, target, classes=data.classes, title=f"Grad-CAM of the global model, {name}")
        written.append(target)
    return written
