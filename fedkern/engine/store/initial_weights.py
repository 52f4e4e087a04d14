"""Initial weights of a run's network from a file or a finished run (``--init``)."""

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fedkern.engine.store.checkpoints import check_results, read_newest
from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.filesystem import describe_file_kind, open_regular, report_unreadable
from fedkern.models.pretrained.weight_files import read_state_dict
from fedkern.settings.config import INIT
from fedkern.settings.config import NAME as CONFIG

MODEL = "model.safetensors"
"""File with the network of a finished run."""
_GIVEN: dict[str, bytes] = {}
"""Contents of such files that are not written yet, by path."""


def _file(path: str) -> Path:
    """Return the file of ``--init``, or the network's file in that folder of a run."""
    folder = Path(path)
    if describe_file_kind(folder) != "a folder":
        return folder
    entry = read_newest(folder)
    begun = (folder / CONFIG).exists() and not (folder / MODEL).exists()
    if begun or (entry is not None and not entry["info"]["finished"]):
        way_out = f"finish it with --resume {shlex.quote(path)}"
        raise UserError(f"--init {path} is the folder of a run that is not finished: {way_out}.")
    if not (folder / MODEL).exists():
        raise UserError(
            f"--init {path} is a folder without {MODEL}: name the folder of a finished run, or a file of weights."
        )
    check_results(folder, MODEL)
    return folder / MODEL


def of_module(module: nn.Module, folder: Path) -> str:
    """Return the future path of a module's weights in a run folder, readable even before :func:`write_given`."""
    path = str((folder / INIT).absolute())
    _GIVEN[path] = save({name: x.detach().cpu().contiguous().clone() for name, x in module.state_dict().items()})
    return path


def write_given(path: str | None) -> None:
    if path in _GIVEN:
        atomic.write_bytes(Path(path), _GIVEN.pop(path))


def sha256(path: str) -> str:
    if path in _GIVEN:
        return hashlib.sha256(_GIVEN[path]).hexdigest()
    with report_unreadable(f"--init {path}"), open_regular(_file(path)) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def read(path: str, expected: str | None) -> Mapping[str, Tensor]:
    """Return the tensors of a state dict's file, or of a finished run's network, by name."""
    if sha256(path) != expected and expected is not None:
        holds, noun = ("does not hold", "network") if Path(path).is_dir() else ("is not", "file")
        raise UserError(f"--init {path} {holds} the {noun} that the run began with: put that {noun} back.")
    tensors = load(_GIVEN[path]) if path in _GIVEN else read_state_dict(_file(path), f"--init {path}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--init {path}: {name} has values that are not finite.")
    return tensors
