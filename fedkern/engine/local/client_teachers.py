"""Networks that the clients bring (``--teachers``)."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkern.engine.local.network import place
from fedkern.engine.store.checkpoints import Checkpoints, Entry, checksum
from fedkern.errors import UserError
from fedkern.files.filesystem import expand
from fedkern.messages import states
from fedkern.methods.base import VECTORS
from fedkern.models.pretrained.weight_files import bare_names, read_state_dict
from fedkern.models.state import personal_parts
from fedkern.settings.run_format import FOLDER

SUFFIXES = (".safetensors", ".pt", ".pth")
OF_DATA = (
    "data", "data_options", "partition", "correlation", "clients", "train_samples", "public_samples",
    "held_out_client", "client_test", "seed",
)  # fmt: skip
"""Settings that decide which images a client has."""


class ClientTeachers:
    """The folder of ``--teachers``, read network by network, on demand.

    It has ``client-K.safetensors``, ``client-K.pt`` or ``client-K.pth`` with a state dict for every client K (from 0),
    or is the folder of a run of FedIOD, which has teachers, or of ``ensemble``, which has members.
    """

    def __init__(self, folder: str) -> None:
        self.root = expand(folder)
        self._sound: set[str] = set()  # checkpoint files with verified checksums
        self._asked_run = False  # whether a run was searched for a network

    def load(self, client: int, module: nn.Module) -> None:
        """Load a client's trained weights into ``module``, in place."""
        paths = (self.root / f"client-{client}{suffix}" for suffix in SUFFIXES)
        path = next(filter(Path.exists, paths), None)
        if path is None:
            self._load_of_run(client, module)
        else:
            _load_state(path, client, module)
        kinds = dict.fromkeys(dict(module.named_parameters()), "parameters")
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"--teachers: the network of client {client} in {path or self.root} cannot be used: its "
                    f"{kinds.get(name, 'buffers')} are not finite ({name}); bring one whose training has not diverged."
                )

    def other_data(self, config: Mapping[str, object], fingerprint: int) -> str | None:
        """Return a warning if the networks come from a run on other data, or None."""
        entry = self._checkpoint[0] if self._asked_run else None
        if entry is None or entry["info"]["data"] == fingerprint:
            return None
        theirs, number = entry["info"]["config"], entry["info"]["data"]
        names = [name for name in OF_DATA if name == "data" or theirs.get(name) != config.get(name)]

        def text(settings: Mapping[str, object], number: int) -> str:
            words = [f"{name.replace('_', '-')} {settings.get(name, 'unset')}" for name in names]
            return f"{', '.join(words)}; fingerprint {number:08x}"

        return (
            f"The networks that --teachers brings from {self.root} were trained on other data "
            f"({text(theirs, number)}) than this run's ({text(config, fingerprint)}): a client's network may "
            "have trained on other clients' images or on its test images."
        )

    # -- a run folder ----------------------------------------------------------------------------------------------

    @cached_property
    def _checkpoint(self) -> tuple[Entry | None, dict[int, str], dict[str, int]]:
        checkpoints = Checkpoints(self.root)
        try:
            entry = checkpoints.peek()
            return (entry, *checkpoints.files_of(entry)) if entry is not None else (None, {}, {})
        except UserError as error:
            raise UserError(f"--teachers: {error}") from None

    def _load_of_run(self, client: int, module: nn.Module) -> None:
        self._asked_run = True
        entry, files, _ = self._checkpoint
        vectors = self._part(files[client], "teacher") if client in files else None
        if vectors is None and entry is not None:
            vectors = self._part(entry["server"], "members", client)
        if vectors is None:
            raise UserError(
                f"--teachers: {self.root} has neither client-{client}.safetensors (nor .pt, .pth) nor a run's network "
                f"of client {client}: give a folder of such files, or that of a run of fediod or ensemble."
                if self.root.is_dir()
                else f"--teachers: there is no folder {self.root}."
            )
        # A copy is flattened: the module itself may be part of a network that is flat already.
        flat = personal_parts.flatten(place(copy.deepcopy(module).cpu(), torch.device("cpu")))
        for name in VECTORS:
            size, expected = vectors[name].numel() if name in vectors else 0, getattr(flat, name).numel()
            if size != expected:
                raise UserError(
                    f"--teachers: the network of client {client} in {self.root} is of another architecture ({size:,} "
                    f"{name} instead of {expected:,}): give the --model and the models it was trained with."
                )
        flat.load_vectors(vectors)
        module.load_state_dict(flat.module.state_dict())

    def _part(self, name: str, *keys: str | int) -> Any:
        path = self.root / FOLDER / name
        # All members of an ensemble are in one file, whose checksum is computed only once.
        if name not in self._sound and checksum(path) != self._checkpoint[2].get(name):
            raise UserError(f"--teachers: {path} is missing or damaged: bring the networks of another run.")
        self._sound.add(name)
        try:
            return states.part(path, *keys)
        except ValueError as error:
            raise UserError(f"--teachers: {error}.") from None


# -- the user's own files ----------------------------------------------------------------------------------------------


def _load_state(path: Path, client: int, module: nn.Module) -> None:
    tensors = read_state_dict(path, f"--teachers: {path}")
    try:
        module.load_state_dict(dict(bare_names(tensors, module.state_dict())))
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[-1].strip().split("\n")[0].rstrip(". ")
        raise UserError(
            f"--teachers: {path} is not a {type(module).__name__} as client {client} has it "
            f"({textwrap.shorten(reason, 160, placeholder=' ...')}): give the --model and the models it was trained "
            "with."
        ) from None
