"""User-defined files of weights, read without running code and loaded into networks."""

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkern.errors import UserError, first_of
from fedkern.files.filesystem import describe_special_file

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files by torch.save, unlike safetensors."""
LISTED = 20
"""Largest number of unfitting tensors in a message."""
_NESTED = ("state_dict", "model_state_dict", "model")
"""Entries of checkpoints under which training programs keep a state dict."""


def read_state_dict(path: Path, source: str) -> Mapping[str, Tensor]:
    """Return the state dict in a file: safetensors, or saved with torch.save and read with `weights_only`."""
    if kind := describe_special_file(path):
        raise UserError(f"{source} is {kind}, not a regular file: put the file there.")
    try:
        if path.suffix not in PICKLED:
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}.") from None
    except (SafetensorError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{source} is damaged: {reason}.") from None
    except Exception:
        # pickle raises anything, such as KeyError, for a file of another program.  torch's message is not
        # shown: it is long and recommends to execute the file's content.
        loaded = None
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in _NESTED if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{source} does not hold a state dict, tensors by name and nothing else: save module.state_dict() with "
            "torch.save, or as safetensors."
        )
    return loaded


def bare_names(tensors: Mapping[str, Tensor], names: Container[str]) -> Mapping[str, Tensor]:
    """Return the tensors by a network's ``names``, without the prefixes of DataParallel and torch.compile."""
    if any("_orig_mod." in name for name in tensors):
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while tensors and all(name.startswith("module.") and name not in names for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def describe_misfits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Describe by name how tensors differ from a network's own in names, shapes and dtypes."""
    notes: dict[str, str] = {}
    for name, tensor in state.items():
        if name not in tensors:
            near = [key.removesuffix(name) for key in tensors if key.endswith(f".{name}")]
            hint = f", but {near[0]}{name}: take {near[0]} off its names" if near else ""
            notes[name] = f"it has no {name}, of shape {list(tensor.shape)}{hint}"
        elif tensors[name].shape != tensor.shape:
            notes[name] = f"its {name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}"
        elif tensors[name].is_floating_point() != tensor.is_floating_point():
            notes[name] = f"its {name} is {tensors[name].dtype}, not {tensor.dtype}"
    return notes | {key: f"its {key} {list(tensors[key].shape)} has no place" for key in tensors if key not in state}


@torch.no_grad()
def load_by_name(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str, network: str, partial: bool = False
) -> str:
    """Copy the tensors into a network with exactly their names and shapes, or with ``partial`` those that fit.

    Returns a sentence that lists the others, or "".
    """
    state = module.state_dict()
    bare = bare_names(tensors, state)
    notes = describe_misfits(state, bare)
    fitting = {name: tensor for name, tensor in bare.items() if name not in notes}
    if notes and not (partial and fitting):
        way = "" if partial or not fitting else "; --init-partial takes what fits"
        raise UserError(f"--init {path} is not for {network}: {next(iter(notes.values()))}{way}.")
    module.load_state_dict({**state, **fitting})
    text = first_of(list(notes.values()), LISTED, "; ")
    return f"--init {path}: {len(fitting)} of {len(state)} tensors of {network} are taken; {text}." if notes else ""
