"""Teacher logits on disk: a foundation model sees every image of a data set only once."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedkern.errors import UserError, same_format
from fedkern.files import filesystem
from fedkern.files.filesystem import cache_folder, expand
from fedkern.files.inputs import parse_json, special
from fedkern.models.precision import computing
from fedkern.models.teacher import Identity, Teacher, wrong_classes

FORMAT = 1
KEY = 16  # bytes of an image's key
SAVE_EVERY = 4096  # images between two writes
TELL_EVERY = 5.0  # seconds between two notices


class LogitsCache:
    """Cache of teacher logits, keyed by image content, so that runs with any partition and seed share them.

    Args:
        folder: folder of the files, one per teacher (default: ``fedkern/teachers`` in the user's cache folder).  If the
            default folder cannot be written, nothing is cached; if a named folder cannot be written, that is an error.
        mean, std: normalisation of the images, per channel.  Keys are taken from the images before normalisation.
        notice: called with the progress of a long computation, and when a file is damaged.
    """

    def __init__(
        self,
        folder: str | Path | None,
        mean: Sequence[float],
        std: Sequence[float],
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.named = folder is not None
        self.folder = cache_folder("teachers") if folder is None else expand(folder)
        self.mean, self.std = tuple(mean), tuple(std)
        self.notice = notice

    def path(self, identity: Identity) -> Path:
        """The path of a teacher's file."""
        return self.folder / file_name("logits", identity)

    @computing("fp32")  # runs of either precision read the cached logits
    def logits(self, teacher: Teacher, batches: Iterable[Tensor], total: int | None = None) -> Tensor:
        """The teacher's logits fp32 ``[n, classes]`` (CPU) of all images; only those that the file lacks are computed.

        Args:
            teacher: the teacher; without an identity, nothing is cached and all logits are computed.
            batches: normalised images ``[B, C, H, W]`` each.
            total: number of images, for the notices.

        Raises:
            UserError: raised by the teacher, or a named folder cannot be written.
        """
        identity = teacher.identity
        if identity is None:
            rows = [teacher.logits(part).cpu() for images in batches for part in images.split(teacher.batch)]
            return torch.cat(rows) if rows else torch.empty(0, teacher.classes)
        stored = self.read(identity, teacher.classes)
        new: dict[bytes, Tensor] = {}
        keys: list[bytes] = []
        written, tell = 0, paced(self.notice, time.monotonic())
        try:
            for images in batches:
                batch = image_keys(images, self.mean, self.std)
                keys += batch
                missing = [row for row, key in enumerate(batch) if key not in stored and key not in new]
                for start in range(0, len(missing), teacher.batch):
                    part = missing[start : start + teacher.batch]
                    answers = teacher.logits(images[torch.tensor(part, device=images.device)]).cpu()
                    new.update(zip((batch[row] for row in part), answers, strict=True))
                    if len(new) - written >= SAVE_EVERY:
                        self.write(identity, new)
                        written = len(new)
                    done = len(keys) - len(missing) + start + len(part)
                    of = "" if total is None else f" of {total:,}"
                    tell(f"asking the teacher {teacher.name}: {done:,}{of} images")
        finally:  # an interrupted computation keeps its logits so far
            if len(new) > written:
                self.write(identity, new)
        stored.update(new)
        return torch.stack([stored[key] for key in keys]) if keys else torch.empty(0, teacher.classes)

    def read(self, identity: Identity, classes: int) -> dict[bytes, Tensor]:
        """Logits in a teacher's file by image key; empty if the file is missing or damaged (and then made anew)."""
        path = self.path(identity)
        if not path.exists():
            return {}
        try:
            return read_logits(path, classes, identity)
        except (OSError, ValueError, UserError) as error:
            if self.notice is not None:
                self.notice(f"the cached teacher logits {path} are damaged and made anew ({error})")
            return {}

    def write(self, identity: Identity, new: Mapping[bytes, Tensor]) -> None:
        """Adds logits to a teacher's file; another run may add logits to the same file at the same time."""
        classes = next(iter(new.values())).numel()

        def merged() -> dict[str, Tensor]:
            rows = {**self.read(identity, classes), **new}
            keys = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, KEY)
            return {"keys": torch.from_numpy(keys.copy()), "logits": torch.stack(list(rows.values()))}

        write_file(self.path(identity), merged, identity, required=self.named)


class StoredLogits(Teacher):
    """A teacher given by a file of its logits, in the cache's format; the file may come from another machine.

    Args:
        path: safetensors file with ``keys`` uint8 [n, 16] (:func:`image_keys`) and ``logits`` [n, classes].
        mean, std: normalisation of the images that it gets, per channel.

    Raises:
        UserError: the file is missing, is damaged, or has another number of classes.
    """

    def __init__(self, path: str | Path, classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.path = expand(path)
        super().__init__(f"logits:{path}", classes, "cpu", None)
        self.mean, self.std = tuple(mean), tuple(std)
        try:
            self.rows = read_logits(self.path, classes)
        except FileNotFoundError:
            raise UserError(f"the file of teacher logits {self.path} does not exist.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"the file of teacher logits {self.path} is damaged: {error}.") from None

    @property
    def parameters(self) -> int:
        return 0

    def load(self) -> tuple[torch.nn.Module, torch.nn.Linear]:
        raise UserError(f"the teacher {self.name} is a file of logits and cannot be tuned: teacher_tuning=zero-shot.")

    def logits(self, images: Tensor) -> Tensor:
        keys = image_keys(images, self.mean, self.std)
        absent = sum(key not in self.rows for key in keys)
        if absent:
            raise UserError(
                f"{self.path} lacks the logits of {absent} of {len(keys)} images: make it from these data, and take "
                "teacher_view=cached (an augmented image is another one)."
            )
        return self.checked(torch.stack([self.rows[key] for key in keys]), len(keys)).to(images.device)


def paced(notice: Callable[[str], None] | None, since: float = -math.inf) -> Callable[[str], None]:
    """``notice`` at most once in :data:`TELL_EVERY` seconds, the first time that long after ``since``."""

    def tell(text: str) -> None:
        nonlocal since
        if notice is not None and time.monotonic() - since >= TELL_EVERY:
            since = time.monotonic()
            notice(text)

    return tell


def image_keys(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[bytes]:
    """Hash of every image's shape and uint8 pixels; undoes the normalisation of ``images`` ``[B, C, H, W]`` first."""
    pixels = to_pixels(images, mean, std).mul_(255).round_().clamp_(0, 255).to(torch.uint8).cpu()
    shape = str(tuple(pixels.shape[1:])).encode()
    rows = pixels.contiguous().flatten(1).numpy()
    return [hashlib.blake2b(shape + row.tobytes(), digest_size=KEY).digest() for row in rows]


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images as fp32 in [0, 1] (up to rounding), a copy."""
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
    return images.float() * scale + torch.tensor(mean, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)


def read_logits(path: Path, classes: int, identity: Identity | None = None) -> dict[bytes, Tensor]:
    """Reads a file of logits: image key to logits fp32 ``[classes]``.

    Raises:
        ValueError: not a file of logits.
        UserError: the file has another number of classes.
        FileNotFoundError, OtherFormat, ValueError: as for :func:`read_file`.
    """
    tensors = read_file(path, identity)
    keys, logits = tensors.get("keys"), tensors.get("logits")
    if keys is None or logits is None or keys.dim() != 2 or keys.shape[1] != KEY or keys.dtype != torch.uint8:
        raise ValueError("it does not hold keys and logits")
    if logits.dim() != 2 or len(logits) != len(keys) or not bool(torch.isfinite(logits).all()):
        raise ValueError("its logits are not finite rows, one for each key")
    if logits.shape[1] != classes:
        raise wrong_classes(f"logits:{path}", logits.shape[1], classes)
    return dict(zip((row.tobytes() for row in keys.numpy()), logits.float(), strict=True))


def file_name(kind: str, identity: Identity) -> str:
    """A readable, unique file name: kind, last part of the model's name, and a hash of format and whole identity."""
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(identity.get("model", "teacher"))).name).strip("-")
    return f"{kind}-{model[:60]}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"


def write_file(path: Path, tensors: Callable[[], Mapping[str, Tensor]], identity: Identity, *, required: bool) -> None:
    """Writes a cache file completely or not at all.

    Args:
        path: the file; its folder is made.
        tensors: gives the file's content; called while no other process writes in this folder.
        identity: written into the file's metadata.
        required: whether a file that cannot be written is an error.

    Raises:
        UserError: the file is ``required`` and cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.one_writer(path.parent / ".lock"):
            content = dict(tensors())
            about = {"format": FORMAT, "identity": dict(identity), "sum": _sum(content)}
            metadata = {"fedkern": json.dumps(about, sort_keys=True)}
            filesystem.replace(path, lambda temporary: save_file(content, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:
        if required:
            raise UserError(
                f"cannot write the teacher cache {path}: {getattr(error, 'strerror', None) or error}; name another "
                "folder with the method option teacher_cache."
            ) from None


def read_file(path: Path, identity: Identity | None = None) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write_file` wrote.

    Args:
        identity: of a cache file; None: a file that the user names, which another program may have written.

    Raises:
        FileNotFoundError: no such file.
        OtherFormat: the file has another format.
        ValueError: the file is damaged, is not as it was written, or has another identity.
    """
    if kind := special(path):
        raise ValueError(f"it is {kind}, not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            text = (file.metadata() or {}).get("fedkern")
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if text is None and identity is None:
        return tensors
    try:
        about = parse_json(text or "")
    except ValueError:
        about = None
    about = about if isinstance(about, dict) else {}
    if text is not None:
        same_format(path, about.get("format"), FORMAT)
    same = identity is None or about.get("identity") == json.loads(json.dumps(dict(identity)))
    if not same or about.get("format") != FORMAT or about.get("sum") != _sum(tensors):
        raise ValueError("it is not what was written there")
    return tensors


def _sum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of tensors by name."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
