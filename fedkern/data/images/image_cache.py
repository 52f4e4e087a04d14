"""Decoded images and masks on disk, for data sets larger than memory and for later runs.

Every list of image files and way to decode them has three files: ``NAME.images`` (uint8 ``[N, H, W, C]``),
``NAME.sizes`` (width and height before resizing, and a CRC-32 of both and the image) and ``NAME.lock`` (for one writing
process).  Width 0 marks an image that is not decoded.  Sizes are written after their images have reached the disk, so
an interruption leaves no false entry; damaged images are decoded again.  Masks have one channel, and the size after
decoding.

Notes on the image caches that this user's runs have used serve commands on finished runs.  A run folder may come from
anyone, so it must not say where files are written: notes are in the user's cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import PIL
import torch
from torch import Tensor

from fedkern.data.images.image_files import ImageFiles, ImageReader, unreadable
from fedkern.data.types import Pool
from fedkern.errors import UserError
from fedkern.files.filesystem import cache_folder, expand, hold_lock, is_own, open_regular
from fedkern.files.filesystem import replace as replace_file
from fedkern.files.image_rows import ImageStore


def note_cache(out: Path, cache: str | None) -> None:
    """Note the cache of the run in ``out``, or with None remove an older note.

    Nothing is noted if the cache folder cannot be written.
    """
    with suppress(OSError, UserError, ValueError):  # ValueError: a name that is not UTF-8
        note = _note(out)
        if cache is None:
            note.unlink(missing_ok=True)
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(cache, encoding="utf-8")


def recall_cache(out: str | Path) -> str | None:
    """Return the noted cache of the run in ``out``, or None if it is gone."""
    try:
        note = _note(Path(out))
        if not is_own(note):  # several users may share a cache folder
            return None
        cache = note.read_text(encoding="utf-8")
        return cache if Path(cache).is_dir() and os.access(cache, os.W_OK) else None
    except (OSError, UserError, ValueError):
        return None


def _note(out: Path) -> Path:
    return cache_folder("runs") / hashlib.sha256(os.fsencode(out.resolve())).hexdigest()


MEMORY_BYTES = 1 << 30
"""Most bytes of decoded images in memory; more go to a file, with or without a cache folder."""
CHUNK_BYTES = 16 << 20
"""Bytes of images decoded at once."""
COMMIT_SECONDS = 30.0
"""Longest time between commits: a killed process loses what it decoded since."""
NOTICE_SECONDS, NOTICE_SHARE = 10.0, 0.05
"""Least time, and least share of images, between two progress lines."""
MAGIC = b"fedkern decoded images 3\n"
"""First line of a sizes file; raise its number when `ImageFiles` decodes differently."""
HEADER_BYTES, ROW_BYTES = 128, 12

Notice = Callable[[str], None] | None
Rows = npt.NDArray[np.int64]


@contextmanager
def stored_images(reads: Sequence[tuple[Pool, Tensor]], cache: str | Path | None, notice: Notice) -> Iterator[None]:
    """Let pools read images from a file inside the block, if there are many or a cache folder.

    The resulting :class:`~fedkern.files.image_rows.ImageRows` outlive the block.  ``reads``: pools with the rows (int64
    ``[m]``) that will be read.
    """
    places: dict[ImageFiles, list[Rows]] = {}
    for pool, rows in reads:
        if isinstance(pool.read, ImageReader):
            places.setdefault(pool.read.files, []).append(pool.read.places[rows].numpy())
    if not places:
        report_unused(cache, notice)
    try:
        for files, chosen in places.items():
            store_files(files, np.unique(np.concatenate(chosen)), cache, notice)
        yield
    finally:
        for files in places:  # a user's function may reuse the files for other rows
            files.stored = None


def store_files(
    files: ImageFiles, needed: Rows, cache: str | Path | None, notice: Notice, *, in_memory: int = 1
) -> None:
    """Decode the images or masks at ``needed`` into a file, unless they fit in memory.

    Without ``cache``, images over `MEMORY_BYTES` go to a temporary file; ``in_memory``: bytes in memory per byte of an
    image.
    """
    notice = notice or (lambda text: None)
    if cache is not None:
        files.stored = _Cache(files, expand(cache), notice).fetch(needed)
    elif len(needed) * _bytes(files) * in_memory > MEMORY_BYTES:
        files.stored = _temporary(files, needed, notice)


def report_unused(cache: str | Path | None, notice: Notice) -> None:
    """Report that this data set does not use the given cache folder."""
    if cache is not None and notice is not None:
        notice("--cache is not used: the images of this data set are not decoded from files one by one.")


def _bytes(files: ImageFiles) -> int:
    height, width, channels = files.shape
    return height * width * channels


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _temporary(files: ImageFiles, needed: Rows, notice: Callable[[str], object]) -> tuple[ImageStore, Tensor]:
    """Return the images in a nameless file, which vanishes with the processes that have it open."""
    try:
        folder = cache_folder("images")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError):
        folder = Path(tempfile.gettempdir())
    _check_space(folder, len(needed) * _bytes(files))
    shape = (len(files), *files.shape)
    sizes = np.zeros((shape[0], 2), dtype=np.int64)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.truncate(shape[0] * _bytes(files))
            where = f"a temporary file in {folder}; with --cache DIR later runs need not decode them again"
            for rows, dimensions, _ in _decode_rows(files, needed, file, where, notice):
                sizes[rows] = dimensions
            return ImageStore(os.dup(file.fileno()), shape), torch.from_numpy(sizes)
    except BrokenPipeError:  # of a progress line
        raise
    except OSError as error:
        raise _unwritable(folder, error) from None


class _Cache:
    def __init__(self, files: ImageFiles, folder: Path, notice: Callable[[str], object]) -> None:
        self._files, self._folder, self._notice = files, folder, notice
        self._name = f"{'x'.join(map(str, files.shape))}-{_fingerprint(files)}"
        self._images, self._sizes, self._lock = (
            folder / f"{self._name}.{ending}" for ending in ("images", "sizes", "lock")
        )
        self._shape = (len(files), *files.shape)
        self._checked = np.zeros(len(files), dtype=bool)  # images that this process has compared, or written
        self._damaged = 0

    def fetch(self, needed: Rows) -> tuple[ImageStore, Tensor]:
        """Return the images and their sizes, int64 ``[N, 2]``, with at least ``needed`` decoded."""
        entry = self._open_entry(needed)
        if self._damaged:
            self._notice(f"{self._damaged:,} images in {self._images} are damaged and are decoded again")
        if entry is not None:
            self._notice(f"{len(needed):,} decoded {self._files.things} are read from {self._images}")
            return entry
        sizes = self._read_sizes(needed)
        missing = len(needed) if sizes is None else int((sizes[needed, 0] == 0).sum())
        existing = next(folder for folder in (self._folder, *self._folder.parents) if os.access(folder, os.F_OK))
        _check_space(existing, missing * _bytes(self._files))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with hold_lock(self._lock, self._wait):
                self._fill(needed)
            entry = self._open_entry(needed)
        except BrokenPipeError:  # of a progress line
            raise
        except OSError as error:
            raise _unwritable(self._folder, error) from None
        if entry is None:
            raise UserError(f"The cache {self._images} was changed while it was read: start again.")
        return entry

    def _wait(self) -> None:
        self._notice(f"another run decodes the same {self._files.things} into {self._folder}: this run waits for it")

    def _open_entry(self, needed: Rows) -> tuple[ImageStore, Tensor] | None:
        """Return the images and their sizes, or None unless all at ``needed`` are decoded."""
        sizes = self._read_sizes(needed)
        if sizes is None or not sizes[needed, 0].all():
            return None
        try:
            store = ImageStore(os.open(self._images, os.O_RDONLY), self._shape)
        except (OSError, ValueError):
            return None
        return store, torch.from_numpy(sizes[:, :2].astype(np.int64))

    def _header(self) -> bytes:
        return (MAGIC + f"{self._name}\n{' '.join(map(str, self._shape))}\n".encode()).ljust(HEADER_BYTES, b"\0")

    def _read_sizes(self, needed: Rows) -> npt.NDArray[np.int32] | None:
        """Return int32 ``[N, 3]``, 0 where an image is not decoded, or None if files are missing or damaged.

        Each image at ``needed`` is checked once against its CRC, and counts as not decoded if damaged.
        """
        try:
            with open_regular(self._sizes) as file:
                content = file.read()
            if self._images.stat().st_size != self._shape[0] * _bytes(self._files):
                return None
        except OSError:
            return None
        if content[:HEADER_BYTES] != self._header() or len(content) != HEADER_BYTES + ROW_BYTES * self._shape[0]:
            return None
        table = np.frombuffer(content, dtype="<i4", offset=HEADER_BYTES).reshape(-1, 3).copy()
        rows = needed[(table[needed, 0] != 0) & ~self._checked[needed]]
        with open_regular(self._images) as file:
            for row in rows.tolist():
                file.seek(row * _bytes(self._files))
                if _checksum(table[row, :2], file.read(_bytes(self._files))) == table[row, 2]:
                    self._checked[row] = True
                else:
                    table[row] = 0
        self._damaged = int((table[rows, 0] == 0).sum())
        return table

    def _fill(self, needed: Rows) -> None:
        """Decode missing images, with the lock held."""
        sizes = self._read_sizes(needed)
        fresh = sizes is None
        if sizes is None:
            sizes = np.zeros((self._shape[0], 3), dtype="<i4")
        missing = needed[sizes[needed, 0] == 0]
        if not len(missing):  # another run has decoded them since
            return
        if fresh:
            self._begin(sizes)
        try:
            with self._images.open("r+b", buffering=0) as images, self._sizes.open("r+b", buffering=0) as table:
                self._decode(missing, sizes, images, table)
        except BaseException as error:
            full = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
            if fresh and (full or not sizes.any()):
                self._remove()
            raise

    def _begin(self, sizes: npt.NDArray[np.int32]) -> None:
        """Create both files without images, beside older ones that another process may still read."""
        self._remove()
        with self._images.open("xb") as file:
            file.truncate(self._shape[0] * _bytes(self._files))
        content = self._header() + sizes.tobytes()
        replace_file(self._sizes, lambda path: path.write_bytes(content))

    def _remove(self) -> None:
        for path in (self._sizes, self._images):
            path.unlink(missing_ok=True)

    def _decode(self, missing: Rows, sizes: npt.NDArray[np.int32], images: IO[bytes], table: IO[bytes]) -> None:
        waiting: list[Rows] = []
        last = time.monotonic()

        def commit() -> None:
            nonlocal last
            last = time.monotonic()
            if not waiting:
                return
            os.fsync(images.fileno())  # before the sizes say that the images are there
            low, high = int(waiting[0][0]), int(waiting[-1][-1]) + 1
            _write(table, HEADER_BYTES + ROW_BYTES * low, sizes[low:high])
            os.fsync(table.fileno())
            waiting.clear()

        try:
            for rows, dimensions, pixels in _decode_rows(self._files, missing, images, str(self._folder), self._notice):
                sizes[rows, :2] = dimensions
                sizes[rows, 2] = [
                    _checksum(sizes[row, :2], image.data) for row, image in zip(rows, pixels, strict=True)
                ]
                self._checked[rows] = True
                waiting.append(rows)
                if time.monotonic() - last > COMMIT_SECONDS:
                    commit()
        finally:  # an interrupted run keeps what it has decoded
            commit()


def _fingerprint(files: ImageFiles) -> str:
    """Hash the files (path, length, times of content and state), decoding options and Pillow's version."""
    total = hashlib.blake2b(digest_size=12)
    total.update(f"{(*files.how, PIL.__version__)}\n".encode())
    for path in files.sources:
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(files.data, files.thing, path, error) from error
        about = (str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        total.update(f"{about}\n".encode())
    return total.hexdigest()


def _decode_rows(
    files: ImageFiles, rows: Rows, file: IO[bytes], where: str, notice: Callable[[str], object]
) -> Iterator[tuple[Rows, npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """Decode the images at sorted ``rows`` into ``file``.

    Yields written rows, their width and height before resizing, int64 ``[m, 2]``, and images uint8 ``[m, H, W, C]``.
    """
    at_once = max(1, CHUNK_BYTES // _bytes(files))
    began = last_time = time.monotonic()
    last_count = 0
    notice(f"decoding {len(rows):,} {files.things} ({_size(len(rows) * _bytes(files))}) into {where}")
    for start in range(0, len(rows), at_once):
        chunk = rows[start : start + at_once]
        images, sizes = files.read(torch.from_numpy(chunk))
        pixels = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
        for part in np.split(np.arange(len(chunk)), np.flatnonzero(np.diff(chunk) > 1) + 1):
            _write(file, int(chunk[part[0]]) * _bytes(files), pixels[part[0] : part[-1] + 1])
        yield chunk, sizes.numpy(), pixels
        done, tick = start + len(chunk), time.monotonic()
        if tick - last_time >= NOTICE_SECONDS and done - last_count >= NOTICE_SHARE * len(rows):
            last_time, last_count = tick, done
            seconds = (tick - began) / done * (len(rows) - done)
            notice(f"decoding {files.things}: {done:,} of {len(rows):,}, about {max(1, round(seconds / 60))} min left")


def _checksum(size: npt.NDArray[np.int32], pixels: bytes | memoryview) -> np.int32:
    """Return a CRC-32 of an image and its size, its bits as a signed number."""
    return np.uint32(zlib.crc32(pixels, zlib.crc32(size.astype("<i4").tobytes()))).astype(np.int32)


def _write(file: IO[bytes], offset: int, values: npt.NDArray[np.generic]) -> None:
    unwritten = values.reshape(-1).view(np.uint8).data
    file.seek(offset)
    while unwritten:
        unwritten = unwritten[file.write(unwritten) :]


def _check_space(folder: Path, count: int) -> None:
    with suppress(OSError):  # unknown to this file system: writing will show
        total, _, free = shutil.disk_usage(folder)
        if free < count and total:  # a total of 0 means unknown: writing will show
            raise UserError(
                f"The decoded images take {_size(count)} and {folder} has {_size(free)} left: free some space, take a "
                "smaller --data-option size, or name a folder on another disk with --cache DIR."
            )


def _unwritable(folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The decoded images do not fit on the disk of {folder}: free some space, take a smaller --data-option "
            "size, or name a folder on another disk with --cache DIR."
        )
    reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
    return UserError(f"Decoded images cannot be written to {folder} ({reason}): name another folder with --cache DIR.")
