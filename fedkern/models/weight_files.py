"""Weights of networks in files of the user's own: read without running code, and loaded where they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.inputs import special


def read_state_dict(path: Path) -> Mapping[str, Any]:
    """The state dict in a file of ``--teachers``: safetensors, or saved with torch.save and read with `weights_only`.

    Raises:
        UserError: the file is missing, damaged or no regular file, or holds anything but tensors by name.
    """
    if kind := special(path):
        raise UserError(f"--teachers: {path} is {kind}, not a regular file: put the file there.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--teachers: {path} cannot be read: {error.strerror or error}.") from None
    except (SafetensorError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise UserError(f"--teachers: {path} is damaged: {reason}.") from None
    except Exception:
        # pickle raises anything for a file that it has not written, a KeyError for example.  torch's message is not
        # shown: it is long and recommends to execute whatever the file holds.
        loaded = None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"--teachers: {path} does not hold a state dict, tensors by name and nothing else: save "
            "module.state_dict() with torch.save, or as safetensors."
        )
    return loaded


@torch.no_grad()
def load_by_name(module: nn.Module, tensors: Mapping[str, Tensor], path: str, network: str) -> None:
    """Copies the tensors into a network whose state dict has exactly their names and shapes.

    Args:
        tensors: by name in the state dict.
        path: the file or folder they are from, for messages.

    Raises:
        UserError: a name or shape differs; the message names the first that does.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            lacks = f"{name}, of shape {list(tensor.shape)}"
            near = [each.removesuffix(name) for each in tensors if each.endswith(f".{name}")]
            lacks += f", but {near[0]}{name}: take {near[0]} off its names" if near else ""
            raise UserError(f"--init {path} is not for {network}: it has no {lacks}.")
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
