"""Artifacts: images and tables that a method logs, kept for a few rounds, for the report."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedkern.engine.store import checkpoints
from fedkern.errors import UserError
from fedkern.messages import states

FILE = "shown.safetensors"
ROUNDS = 8  # most rounds with kept artifacts, besides round 1, however long the run
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Artifact:
    """One artifact of one round.

    Attributes:
        name: title of the artifact, and stem of its picture's file name.
        round: number of communication rounds done, this round included.
        value: uint8 ``[n, C, H, W]`` (images) or fp32 ``[rows, columns]`` (a table).
        axes: titles of a table's rows, columns and optionally values, such as ``("client", "class", "weight")``.
    """

    name: str
    round: int
    value: Tensor
    axes: tuple[str, ...]


def prepare_artifact(name: str, value: Tensor) -> Tensor:
    """Return a copy on the CPU in the stored form: images in [0, 1] as uint8, tables as fp32."""
    if not _NAME.fullmatch(name):
        raise ValueError(f'log_image: expected a name of lower-case letters, digits and underscores, given "{name}"')
    value = value.detach().float().cpu()
    if value.dim() == 2:
        return value.clone(memory_format=torch.contiguous_format)
    if value.dim() == 4:
        # Of channels that are no colours (four sequences of magnetic resonance), the first is kept.
        value = value if value.shape[1] in (1, 3) else value[:, :1]
        return (value.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    raise ValueError(f"log_image: expected {name} to be images [n, C, H, W] or a table, given {list(value.shape)}")


class ArtifactLog:
    """All artifacts of a run so far.

    The kept rounds depend on the plan alone, so a resumed run has the artifacts of an uninterrupted run.
    """

    def __init__(self, out: Path, rounds: int) -> None:
        self.path = out / FILE
        self._wanted = {1, *(-(-rounds * j // ROUNDS) for j in range(1, ROUNDS + 1))}
        self._entries: list[Artifact] = []
        self._sum = hashlib.sha256()
        self._changed = False

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()

    def wants(self, round: int) -> bool:
        return round in self._wanted

    def add(self, artifact: Artifact) -> None:
        self._entries.append(artifact)
        self._sum.update(f"{artifact.name} {artifact.round} {artifact.axes} {list(artifact.value.shape)}".encode())
        self._sum.update(artifact.value.contiguous().numpy().tobytes())
        self._changed = True

    def restore(self, round: int, digest: str) -> None:
        """Read the file again up to ``round``, and compare it with a checkpoint's ``digest``."""
        self._entries, self._sum = [], hashlib.sha256()
        for entry in _entries(self.path):
            if entry.round <= round:
                self.add(entry)
        self._changed = False
        if self._entries and digest != self.digest:
            raise UserError(f"{self.path} is not what the run wrote: delete it, only pictures are lost.")

    def write(self) -> None:
        if self._changed:
            rows = [[entry.name, entry.round, entry.value, list(entry.axes)] for entry in self._entries]
            states.save(self.path, {"shown": rows})
            self._changed = False


def read(out: Path | str) -> list[Artifact]:
    out = Path(out)
    entries, last = _entries(out / FILE), checkpoints.read_newest(out)
    if entries and last is not None:
        ArtifactLog(out, 1).restore(last["round"], last["info"]["parts"]["artifacts"]["sha256"])
    return entries


def _entries(path: Path) -> list[Artifact]:
    if not path.exists():
        return []
    try:
        rows = states.load(path)["shown"]
        entries = [Artifact(name, round, value, (axes[0], axes[1], *axes[2:])) for name, round, value, axes in rows]
        kinds: dict[str, int] = {}
        if all(
            _sound(entry) and kinds.setdefault(entry.name, entry.value.dim()) == entry.value.dim() for entry in entries
        ):
            return entries
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    raise UserError(f"{path} is damaged: delete it, only pictures are lost.")


def _sound(entry: Artifact) -> bool:
    if not (isinstance(entry.name, str) and _NAME.fullmatch(entry.name) and type(entry.round) is int):
        return False
    value = entry.value
    if not (isinstance(value, Tensor) and value.numel() and all(isinstance(axis, str) for axis in entry.axes)):
        return False
    images = value.dim() == 4 and value.dtype == torch.uint8 and value.shape[1] in (1, 3)
    return images or (value.dim() == 2 and value.dtype == torch.float32)
