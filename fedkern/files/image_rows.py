"""Images and masks in a file that replace a tensor and read rows on demand."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RESIDENT_BYTES = 64 << 20
"""Bytes read before a file's pages are unmapped again; the system's page cache keeps them."""
PART_BYTES = 16 << 20
"""Bytes of rows in memory at once where all rows are read."""

Shape = tuple[int, int, int, int]
Box = tuple[int, int, int, int]


class ImageStore:
    """Map uint8 images ``[N, H, W, C]`` of a file for reading, and own its ``descriptor``.

    Mapped pages belong to the system's page cache, shared by processes and dropped where memory is short.  The file may
    be unnamed, so a process that unpickles a store opens the file through the pickling process, which must be alive.
    ValueError for a file shorter than the images.
    """

    def __init__(self, descriptor: int, shape: Shape) -> None:
        self._descriptor, self.shape = descriptor, shape
        weakref.finalize(self, os.close, descriptor)
        self._map = mmap.mmap(descriptor, math.prod(shape), access=mmap.ACCESS_READ)
        self._images = np.frombuffer(self._map, dtype=np.uint8).reshape(shape)
        self._read = 0

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return a copy of the images at ``rows``, uint8 ``[m, H, W, C]``."""
        pixels = self._images[rows]
        self._read += pixels.nbytes
        if self._read > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            # Mapped pages count as memory of the process, although the system could drop them at any time.
            self._read = 0
            self._map.madvise(mmap.MADV_DONTNEED)
        return pixels

    def __reduce__(self) -> tuple[Callable[[str, Shape], ImageStore], tuple[str, Shape]]:
        return _open_store, (f"/proc/{os.getpid()}/fd/{self._descriptor}", self.shape)

    def __deepcopy__(self, memo: object) -> ImageStore:
        return self


def _open_store(path: str, shape: Shape) -> ImageStore:
    return ImageStore(os.open(path, os.O_RDONLY), shape)


_PROPERTIES = ("shape", "dtype", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "itemsize", "nbytes")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex",
            "is_inference", "is_signed", "__len__")  # fmt: skip
_ABOUT = (
    {getattr(Tensor, name).__get__ for name in _PROPERTIES}
    | {getattr(Tensor, name) for name in _METHODS}
    | {torch.numel, torch.is_floating_point, torch.is_complex}
)
"""Functions that inspect a tensor without reading values."""
_JOINING = (torch.cat, torch.concat, torch.concatenate)


class FileRows(Tensor):
    """Rows of an :class:`ImageStore` that replace a tensor: `ImageRows` and `PixelClasses`.

    Indexing the first axis, and concatenating rows of one store, reads nothing.  Any other function reads the rows into
    a contiguous tensor and gives the result of that tensor.  Rows are read-only.
    """

    _store: ImageStore
    _chosen: Tensor

    def plain(self) -> Tensor:
        """Return the rows in memory, contiguous."""
        raise NotImplementedError

    def pick_rows(self, chosen: Tensor) -> FileRows:
        """Return the store's rows at ``chosen``, int64 ``[m]``."""
        raise NotImplementedError

    def like(self, rows: FileRows) -> bool:
        """Return whether both show rows of one store in the same way."""
        return type(self) is type(rows) and self._store is rows._store

    def __getitem__(self, key: Any) -> Tensor:
        index, *tail = key if isinstance(key, tuple) else (key,)
        if index is None or index is Ellipsis or any(isinstance(part, (Tensor, np.ndarray, list)) for part in tail):
            return self.plain()[key]
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > 1:  # chooses pixels, not rows
            return self.plain()[key]
        chosen = self._chosen[index]
        if chosen.dim() == 0:
            return self.pick_rows(chosen[None]).plain()[(0, *tail)]
        if chosen.dim() > 1:
            return self.plain()[key]
        picked = self.pick_rows(chosen)
        return picked.plain()[(slice(None), *tail)] if tail else picked

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self[index] if dim == 0 else self.plain().index_select(dim, index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu")

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)})"

    def __deepcopy__(self, memo: object) -> FileRows:
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _JOINING and not kwargs and len(args) == 1 and (joined := _join_rows(args[0])) is not None:
            return joined
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            raise TypeError(f"{name}: these images are in a file and cannot be changed; work on a clone() of them")
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            raise TypeError(f"{name}: these images are in a file and have no address; work on a clone() of them")
        return func(*_read(args), **_read(kwargs))


class ImageRows(FileRows):
    """Images uint8 ``[n, C, h, w]`` of an :class:`ImageStore`, made by :meth:`of`."""

    _box: Box

    @classmethod
    def of(cls, store: ImageStore, rows: Tensor, box: Box | None = None) -> ImageRows:
        """Return the images at ``rows``, int64 ``[n]``, of a store.

        ``box`` is the visible part of every image (top, left, height, width); None: whole images.
        """
        _, height, width, channels = store.shape
        box = (0, 0, height, width) if box is None else box
        # The tensor itself has no memory: code that bypassed the overrides below would fail, not read other values.
        result = torch.empty(len(rows), channels, *box[2:], dtype=torch.uint8, device="meta").as_subclass(cls)
        result._store, result._chosen, result._box = store, rows, box
        return result

    def plain(self) -> Tensor:
        pixels = self.nhwc().permute(0, 3, 1, 2)
        # Of grey images contiguous() would keep the strides of one channel as they are, which choose other kernels.
        return torch.empty(pixels.shape, dtype=torch.uint8).copy_(pixels)

    def pick_rows(self, chosen: Tensor) -> ImageRows:
        return ImageRows.of(self._store, chosen, self._box)

    def like(self, rows: FileRows) -> bool:
        return super().like(rows) and isinstance(rows, ImageRows) and self._box == rows._box

    def nhwc(self, index: Tensor | None = None) -> Tensor:
        """Return the images at ``index`` (int64 ``[m]``, default all) in memory, uint8 ``[m, h, w, C]``."""
        rows = self._chosen if index is None else self._chosen[index]
        pixels = self._store.gather(rows.numpy())
        top, left, height, width = self._box
        if pixels.shape[1:3] != (height, width):
            pixels = np.ascontiguousarray(pixels[:, top : top + height, left : left + width])
        return torch.from_numpy(pixels)

    def cut_window(self, sides: tuple[int, int]) -> ImageRows:
        """Return the central windows of height and width ``sides``, without reading."""
        top, left, height, width = self._box
        if sides[0] > height or sides[1] > width:
            raise ValueError(f"sides: expected at most {height} x {width}, got {sides[0]} x {sides[1]}")
        place = top + (height - sides[0]) // 2, left + (width - sides[1]) // 2
        return ImageRows.of(self._store, self._chosen, (*place, *sides))

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return ImageRows.of, (self._store, self._chosen, self._box)


class PixelClasses(FileRows):
    """Class of every pixel, int64 ``[n, H, W]``, from masks in an :class:`ImageStore`, made by :meth:`of`."""

    _meaning: Tensor

    @classmethod
    def of(cls, store: ImageStore, rows: Tensor, meaning: Tensor) -> PixelClasses:
        """Return the pixel classes of the masks at ``rows``, int64 ``[n]``.

        Args:
            store: masks, uint8 ``[N, H, W, 1]``.
            meaning: class of every mask value, int64 ``[256]``.
        """
        result = torch.empty(len(rows), *store.shape[1:3], dtype=torch.int64, device="meta").as_subclass(cls)
        result._store, result._chosen, result._meaning = store, rows, meaning
        return result

    def plain(self) -> Tensor:
        return torch.from_numpy(self._meaning.numpy()[self._store.gather(self._chosen.numpy())[..., 0]])

    def pick_rows(self, chosen: Tensor) -> PixelClasses:
        return PixelClasses.of(self._store, chosen, self._meaning)

    def like(self, rows: FileRows) -> bool:
        return super().like(rows) and isinstance(rows, PixelClasses) and torch.equal(self._meaning, rows._meaning)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return PixelClasses.of, (self._store, self._chosen, self._meaning)


def load_rows(tensor: Tensor) -> Tensor:
    """Return the tensor in memory, unchanged if it is no :class:`FileRows`."""
    return tensor.plain() if isinstance(tensor, FileRows) else tensor


def in_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the rows in order and in memory, at least one part.

    Rows in a file are read `PART_BYTES` at a time; a tensor in memory is one part.
    """
    if not isinstance(tensor, FileRows):
        yield tensor
        return
    count = max(1, PART_BYTES // max(1, math.prod(tensor.shape[1:]) * tensor.element_size()))
    for start in range(0, max(1, len(tensor)), count):
        yield load_rows(tensor[start : start + count])


def _join_rows(parts: Sequence[Tensor]) -> FileRows | None:
    """Concatenate rows of one store, or return None for other tensors."""
    file_rows = [part for part in parts if isinstance(part, FileRows)]
    if not file_rows or len(file_rows) < len(parts) or not all(file_rows[0].like(part) for part in file_rows):
        return None
    return file_rows[0].pick_rows(torch.cat([part._chosen for part in file_rows]))


def _read(value: object) -> Any:
    if isinstance(value, FileRows):
        return value.plain()
    if isinstance(value, dict):
        return {key: _read(entry) for key, entry in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(_read(entry) for entry in value)
    return value
