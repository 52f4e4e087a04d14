"""Teacher logits on disk, so that a foundation model sees every image of a data set only once."""

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

from fedkern.errors import UserError, require_format
from fedkern.files import filesystem
from fedkern.files.filesystem import cache_folder, describe_special_file, expand, parse_json
from fedkern.models.precision import compute_in
from fedkern.models.pretrained.preprocessing import to_pixels
from fedkern.models.teachers.teacher import Identity, Teacher, wrong_classes

FORMAT = 1
KEY = 16  # bytes of an image's key
CLASSES = 2**15  # most that pack_top can number
SAVE_EVERY = 4096  # images between two writes
TELL_EVERY = 5.0  # seconds between two notices


class LogitsCache:
    """Cache of teacher logits, keyed by image content, which runs with any partition and seed share.

    A teacher has a file of ``"logits"``, and one of ``"weights"`` if fedkern trained it.

    Args:
        folder: None for the user's cache folder, which may be impossible to write, unlike a named folder.
        mean, std: normalisation of the images, per channel, which the keys undo.
        notice: called with the progress of a long computation, and about a damaged file.
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

    def path(self, kind: str, identity: Identity) -> Path:
        """Return the path of a teacher's file: kind, last part of the model's name, and hash of the identity."""
        text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(identity.get("model", "teacher"))).name).strip("-")
        code = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return self.folder / f"{kind}-{model[:60]}-{code}.safetensors"

    @compute_in("fp32")  # runs of either precision read the cached logits
    def logits(
        self,
        teacher: Teacher,
        batches: Iterable[Tensor],
        total: int | None = None,
        top: int = 0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the teacher's logits fp32 ``[n, classes]`` (CPU), and compute those not yet in the file.

        Without an identity, nothing is cached.  ``total`` is the number of images, for notices.  ``top``: only the most
        likely classes, ``[n, 2 top]`` as :func:`pack_top` stores them, in a file of their own for each temperature.
        """

        def answer(images: Tensor) -> Tensor:
            logits = teacher.logits(images).cpu()
            return pack_top(logits, top, temperature) if top else logits

        nothing = torch.empty(0, 2 * top or teacher.classes, dtype=torch.int16 if top else torch.float32)
        if teacher.identity is None:
            return torch.cat([nothing, *(answer(part) for images in batches for part in images.split(teacher.batch))])
        identity = {**teacher.identity, "top": top, "temperature": temperature} if top else teacher.identity
        rows = self.read_logits(identity, nothing.shape[1])
        keys: list[bytes] = []
        written, notify = len(rows), limit_notices(self.notice, time.monotonic())
        try:
            for images in batches:
                batch = image_keys(images, self.mean, self.std)
                keys += batch
                missing = [row for row, key in enumerate(batch) if key not in rows]
                for start in range(0, len(missing), teacher.batch):
                    part = missing[start : start + teacher.batch]
                    logits = answer(images[torch.tensor(part, device=images.device)])
                    rows.update(zip((batch[row] for row in part), logits, strict=True))
                    if len(rows) - written >= SAVE_EVERY:
                        self.write_logits(identity, rows)
                        written = len(rows)
                    done = len(keys) - len(missing) + start + len(part)
                    of_total = "" if total is None else f" of {total:,}"
                    notify(f"asking the teacher {teacher.name}: {done:,}{of_total} images")
        finally:  # an interrupted computation keeps its logits so far
            if len(rows) > written:
                self.write_logits(identity, rows)
        return torch.stack([rows[key] for key in keys]) if keys else nothing

    def read_logits(self, identity: Identity, classes: int) -> dict[bytes, Tensor]:
        """Return the logits by image key, or {} without an intact file of these classes."""
        stored = self.read("logits", identity)
        return {} if stored is None or stored["logits"].shape[1] != classes else by_key(stored)

    def write_logits(self, identity: Identity, rows: Mapping[bytes, Tensor]) -> None:
        """Add logits to a teacher's file, which another run may do at the same time."""
        classes = next(iter(rows.values())).numel()

        def merge() -> dict[str, Tensor]:
            stored = {**self.read_logits(identity, classes), **rows}
            keys = np.frombuffer(b"".join(stored), dtype=np.uint8).reshape(-1, KEY)
            return {"keys": torch.from_numpy(keys.copy()), "logits": torch.stack(list(stored.values()))}

        self.write("logits", identity, merge)

    def read(self, kind: str, identity: Identity) -> dict[str, Tensor] | None:
        """Return the tensors in a teacher's file, or None if the file is missing or damaged."""
        path = self.path(kind, identity)
        if not path.exists():
            return None
        try:
            return read_file(path, identity)
        except (OSError, ValueError, UserError) as error:
            if self.notice is not None:
                self.notice(f"the cached teacher {kind} {path} are damaged and made anew ({error})")
            return None

    def write(self, kind: str, identity: Identity, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write a teacher's file completely or not at all, with the identity in its metadata.

        ``tensors`` is called while no other process writes in this folder.
        """
        path = self.path(kind, identity)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filesystem.hold_lock(path.parent / ".lock"):
                content = dict(tensors())
                about = {"format": FORMAT, "identity": dict(identity), "sum": _sum(content)}
                metadata = {"fedkern": json.dumps(about, sort_keys=True)}
                filesystem.replace(path, lambda temporary: save_file(content, temporary, metadata=metadata))
        except (OSError, SafetensorError) as error:
            if self.named:
                raise UserError(
                    f"cannot write the teacher cache {path}: {getattr(error, 'strerror', None) or error}; name another "
                    "folder with the method option teacher_cache."
                ) from None


def stored_logits(file: str | Path, classes: int, mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """Return a teacher given by a file of its logits, perhaps from another machine.

    The file has ``keys`` uint8 [n, 16] (:func:`image_keys`) and ``logits`` [n, classes].
    """
    path = expand(file)
    try:
        stored = read_file(path)
        check_logits(stored)
    except FileNotFoundError:
        raise UserError(f"the file of teacher logits {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the file of teacher logits {path} is damaged: {error}.") from None
    if stored["logits"].shape[1] != classes:
        raise wrong_classes(f"logits:{path}", stored["logits"].shape[1], classes)
    rows = by_key({**stored, "logits": stored["logits"].float()})

    def look_up(images: Tensor) -> Tensor:
        keys = image_keys(images, mean, std)
        if missing := sum(key not in rows for key in keys):
            raise UserError(
                f"{path} lacks the logits of {missing} of {len(keys)} images: make it from these data, and take "
                "teacher_view=cached (an augmented image is another one)."
            )
        return torch.stack([rows[key] for key in keys])

    return Teacher(f"logits:{file}", classes, lambda: look_up)


def limit_notices(notice: Callable[[str], None] | None, since: float = -math.inf) -> Callable[[str], None]:
    """Limit ``notice`` to one call in :data:`TELL_EVERY` seconds, the first time that long after ``since``."""

    def notify(text: str) -> None:
        nonlocal since
        if notice is not None and time.monotonic() - since >= TELL_EVERY:
            since = time.monotonic()
            notice(text)

    return notify


def image_keys(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[bytes]:
    """Return hashes of every image's shape and uint8 pixels, after undoing the normalisation of ``[B, C, H, W]``."""
    pixels = to_pixels(images, mean, std).mul_(255).round_().clamp_(0, 255).to(torch.uint8).cpu()
    shape = str(tuple(pixels.shape[1:])).encode()
    rows = pixels.contiguous().flatten(1).numpy()
    return [hashlib.blake2b(shape + row.tobytes(), digest_size=KEY).digest() for row in rows]


def by_key(tensors: Mapping[str, Tensor]) -> dict[bytes, Tensor]:
    return dict(zip((row.tobytes() for row in tensors["keys"].numpy()), tensors["logits"], strict=True))


def pack_top(logits: Tensor, count: int, temperature: float) -> Tensor:
    """Return the softened log-probabilities of the most likely classes, and the classes, int16 ``[n, 2 count]``.

    The first half are the bits of bfloat16 numbers, largest first.  Of equal classes the first ones are kept.
    """
    values, indices = (logits / temperature).log_softmax(1).sort(dim=1, descending=True, stable=True)
    return torch.cat([values[:, :count].bfloat16().view(torch.int16), indices[:, :count].to(torch.int16)], 1)


def unpack_top(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities bfloat16 ``[n, count]`` and the classes int16 that :func:`pack_top` stored."""
    values, indices = packed.chunk(2, 1)
    return values.contiguous().view(torch.bfloat16), indices


def check_logits(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors other than ``keys`` uint8 [n, 16] with finite ``logits`` [n, classes]."""
    keys, logits = tensors.get("keys"), tensors.get("logits")
    if keys is None or logits is None or keys.dim() != 2 or keys.shape[1] != KEY or keys.dtype != torch.uint8:
        raise ValueError("it does not hold keys and logits")
    if logits.dim() != 2 or len(logits) != len(keys) or not bool(torch.isfinite(logits).all()):
        raise ValueError("its logits are not finite rows, one for each key")


def read_file(path: Path, identity: Identity | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file that :meth:`LogitsCache.write` wrote.

    A file without ``identity`` is the user's, perhaps written by another program.

    Raises:
        FileNotFoundError: no such file.
        OtherFormat: the file has another format.
        ValueError: the file is damaged, changed, or has another identity.
    """
    if kind := describe_special_file(path):
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
        require_format(path, about.get("format"), FORMAT)
    is_same = identity is None or about.get("identity") == json.loads(json.dumps(dict(identity)))
    if not is_same or about.get("format") != FORMAT or about.get("sum") != _sum(tensors):
        raise ValueError("it is not what was written there")
    return tensors


def _sum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total
