"""File of the network that a run has learnt (model.safetensors, read by `fedkern.downstream.saved_network`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern import models
from fedkern.engine.context import RunContext
from fedkern.engine.store.checkpoints import Entry, checksum
from fedkern.engine.store.confusions import FILE as CONFUSION
from fedkern.engine.store.predictions import FILE as PREDICTIONS
from fedkern.engine.store.record_files import EVALUATION, SUMMARY
from fedkern.engine.store.record_files import FILE as FACTS
from fedkern.files import atomic
from fedkern.messages.states import State
from fedkern.settings.config import RunConfig

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


RESULTS = (MODEL, SUMMARY, EVALUATION, CONFUSION, PREDICTIONS)
"""Files of a run's end, the last two not in every run."""


def checksum_results(out: Path) -> dict[str, int | None]:
    """Return the CRC-32 of a run's final files and of its data facts, by file name."""
    return {name: checksum(out / name) for name in (*RESULTS, FACTS) if (out / name).exists()}


def find_damaged(out: Path, entry: Entry) -> list[str]:
    return [name for name, value in entry["info"]["results"].items() if checksum(out / name) != value]


def norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    if isinstance(module, models.OwnNetwork):
        module = module.module
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm))
