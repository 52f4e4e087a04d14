"""Networks that the clients bring (``--teachers``): those of an earlier run, or files of one's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkern.engine import state
from fedkern.engine.checkpoint import Checkpoints
from fedkern.engine.network import place
from fedkern.errors import UserError
from fedkern.ops import FlatParameters

SUFFIXES = (".safetensors", ".pt", ".pth")
VECTORS = ("parameters", "buffers", "integers")


def load_teacher(folder: str, client: int, module: nn.Module) -> None:
    """Loads a client's trained weights into ``module``, in place.

    ``folder`` has ``client-K.safetensors``, ``client-K.pt`` or ``client-K.pth`` with a state dict for every client K
    (from 0), or it is a run folder: the teachers of FedIOD, or the members of ``ensemble``.

    Raises:
        UserError: there is no such file, or it is damaged or of another architecture.
    """
    root = Path(folder).expanduser()
    for suffix in SUFFIXES:
        path = root / f"client-{client}{suffix}"
        if path.exists():
            _load_state(path, client, _read(path), module)
            return
    vectors = _of_run(root, client) if (root / "checkpoints").is_dir() else None
    if vectors is None:
        raise UserError(
            f"--teachers: {root} has neither client-{client}.safetensors (nor .pt, .pth) nor a run's network of client "
            f"{client}."
        )
    # A copy is flattened: the module itself may be part of something that is flat already.
    flat = FlatParameters(place(copy.deepcopy(module).cpu(), torch.device("cpu")))
    found = {name: vectors[name].numel() if name in vectors else 0 for name in VECTORS}
    wanted = {name: getattr(flat, name).numel() for name in VECTORS}
    if found != wanted:
        raise UserError(
            f"--teachers: the network of client {client} in {root} is of another architecture ({found['parameters']:,} "
            f"parameters instead of {wanted['parameters']:,}): give the --model and the models it was trained with."
        )
    flat.load_parameters(vectors["parameters"])
    if wanted["buffers"]:
        flat.load_buffers(vectors["buffers"])
    if wanted["integers"]:
        flat.load_integers(vectors["integers"])
    module.load_state_dict(flat.module.state_dict())


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"--teachers: {path} is damaged: {error}.") from None
    except Exception as error:  # pickle's own, of whatever the file holds
        raise UserError(f"--teachers: {path} cannot be read as a state dict: {error}.") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"--teachers: {path} does not hold a state dict; save module.state_dict().")
    return loaded


def _load_state(path: Path, client: int, tensors: Mapping[str, Any], module: nn.Module) -> None:
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        first = str(error).split("\n", 1)[-1].strip().split("\n")[0]
        raise UserError(
            f"--teachers: {path} is not a {type(module).__name__} as client {client} has it ({first}): give the "
            "--model and the models it was trained with."
        ) from None


def _of_run(root: Path, client: int) -> Mapping[str, Tensor] | None:
    """The vectors of a client's network in a run folder."""
    checkpoints = Checkpoints(root)
    entry = checkpoints.peek()
    if entry is None:
        return None
    if str(client) in entry["clients"]:
        try:
            kept = state.load(root / "checkpoints" / entry["clients"][str(client)])
        except ValueError as error:
            raise UserError(f"--teachers: {error}.") from None
        if "teacher" in kept:
            return kept["teacher"]
    return ((checkpoints.last_server_state() or {}).get("members") or {}).get(client)
