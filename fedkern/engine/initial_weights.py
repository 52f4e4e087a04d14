"""Initial weights of a run's network from a file (``--init``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.inputs import open_regular, standing


def sha256(path: str) -> str:
    """SHA-256 of the file.

    Raises:
        UserError: the file is missing, or no regular file.
    """
    if standing(Path(path)) == "a folder":
        inside = Path(path) / "model.safetensors"
        hint = f", such as {inside}" if inside.exists() else ""
        raise UserError(f"--init {path} is a folder: name a .safetensors file{hint}.")
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--init {path} cannot be read: {error.strerror or error}.") from None


def read(path: str, expected: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Args:
        path: the file.
        expected: SHA-256 that the file had when the run began; None: not compared.

    Raises:
        UserError: the file is missing, damaged or another one, or holds values that are not finite.
    """
    if sha256(path) != expected and expected is not None:
        raise UserError(f"--init {path} is not the file that the run began with: put that file back.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"--init {path} is no safetensors file, or damaged ({error}).") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--init {path}: {name} has values that are not finite.")
    return tensors


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor], path: str, network: str) -> None:
    """Copies the tensors into a network whose state dict has exactly their names and shapes.

    Args:
        module: the network.
        tensors: by name in the state dict.
        path: the file they are from, for messages.
        network: the network's name, for messages.

    Raises:
        UserError: a name or shape differs; the message names the first that does.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"--init {path} is not for {network}: it has no {name}, of shape {list(tensor.shape)}.")
        if tensors[name].shape != tensor.shape:
            given = list(tensors[name].shape)
            raise UserError(
                f"--init {path} is not for {network}: its {name} has shape {given}, not {list(tensor.shape)}."
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"--init {path} is not for {network}: its {name} is {tensors[name].dtype}.")
    if foreign := [name for name in tensors if name not in own]:
        raise UserError(f"--init {path} is not for {network}, which has no {foreign[0]}.")
    module.load_state_dict(dict(tensors))
