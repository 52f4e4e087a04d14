"""Image and mask files: listing, and decoding at one size in several threads."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from fedkern.errors import UserError
from fedkern.files.filesystem import check_text, describe_file_kind, open_regular, real_file
from fedkern.files.image_rows import ImageRows, ImageStore

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
FORMATS = "JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"
"""Formats that are decoded, regardless of suffix; for others, such as EPS, Pillow starts other programs."""
MAX_PIXELS = 50_000_000
"""Default of the data option max_image_pixels: most pixels of an image, or voxels of a volume."""
BITS = 8, 12, 16
"""Bit depths that `grey_bits` distinguishes; medical exports put 12 bits into 16."""
BITS_EACH, PHOTOMETRIC, BANDS, EXTRA_BANDS, SAMPLE_FORMAT = 258, 262, 277, 338, 339
"""TIFF tags: bits of a value; meaning of values (0 where 0 is white, DICOM's MONOCHROME1); number of bands;
meaning of extra bands; kind of numbers (3: floats).
"""
MIRRORS = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM
TURNS = {
    **dict(zip((2, 3, 4), MIRRORS, strict=True)), 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation to the transpose that makes the image upright; the first three keep width and height."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_hidden(name: str) -> bool:
    """Return whether to skip a file: hidden, macOS archive metadata or an Office lock."""
    return name.startswith((".", "~$")) or name == "__MACOSX"


def subfolders(folder: Path) -> list[str]:
    """Return the names of folders in ``folder``, sorted, without hidden ones, or raise UserError if not UTF-8."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    for path in folders:
        check_text(str(path), "the folder")
    return [path.name for path in folders]


def list_images(folder: Path) -> list[Path]:
    """Return the image files directly in ``folder``, sorted, without hidden ones."""
    named = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not is_hidden(path.name))
    images = sorted(path for path in named if not path.is_dir())
    for path in images:
        check_text(str(path), "the image")
        if problem := describe_file_kind(path):
            raise UserError(f"the image {path} is {problem}, not a regular file: remove it, or put the image there.")
    return images


def check_distinct(data: str, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raise UserError if links give one real file two names, because training and test could then share the image.

    An image with several texts occurs several times under one name.
    """
    names_of: dict[object, str] = {}
    for path, name in zip(paths, names, strict=True):
        known_name = names_of.setdefault(real_file(path), name)
        if known_name != name:
            raise UserError(
                f'data set "{data}": {known_name} and {name} are one file, {path.resolve()}, and would be two images: '
                "remove the link that makes it two."
            )


@contextmanager
def open_image(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image of one of `FORMATS`, decoding only its header.

    Inside the block ``max_pixels`` replaces Pillow's limit, which is global to the process and only warns.  UserError
    for more pixels and for several pictures; Pillow raises many kinds for damaged files.
    """
    with open_regular(path) as file, _own_limit(), Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise UserError(
                f"the image {path} has {image.width}x{image.height} pixels, more than {max_pixels:,}: make it smaller "
                f"or, where it is to be trusted, give --max-image-pixels {image.width * image.height}."
            )
        # The further pictures of an MPO photograph are its depth, its brightness or a preview.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise UserError(
                f"the file {path} holds several pictures, one after the other, expected one: save the picture that "
                "counts as a file of its own."
            )
        yield image


_lock = threading.Lock()
_PILLOWS_LIMIT: list[int | None] = []  # Pillow's limit before it was switched off, once per open image


@contextmanager
def _own_limit() -> Iterator[None]:
    with _lock:
        _PILLOWS_LIMIT.append(Image.MAX_IMAGE_PIXELS if not _PILLOWS_LIMIT else _PILLOWS_LIMIT[0])
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lock:
            before = _PILLOWS_LIMIT.pop()
            if not _PILLOWS_LIMIT:
                Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _readable(data: str, thing: str, path: Path) -> Iterator[None]:
    """Turn Pillow's many exceptions on damaged files into a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(data, thing, path, error) from error


@dataclass(eq=False)
class ImageFiles:
    """Image files of a data set, each once, and how to decode them: whole and at one size.

    Images look as in a viewer: rotated by their EXIF orientation, on white where transparent, and negative where a TIFF
    says that 0 is white.  Deep greys are scaled from 0 to 2**bits - 1, fractions from 0 to 1, or both from the ends of
    ``window``, and clipped.

    Attributes:
        pad: keep proportions, with black bars on both sides.
        bits: of deep greys, from :func:`grey_bits`; 0: no such files.
        stored: decoded images and their sizes, from `fedkern.data.images.image_cache.store_files`.
    """

    paths: Sequence[Path]
    size: int
    data: str
    grey: bool = False
    pad: bool = False
    max_pixels: int = MAX_PIXELS
    bits: int = BITS[-1]
    window: tuple[float, float] | None = None
    stored: tuple[ImageStore, Tensor] | None = field(default=None, init=False)

    things: ClassVar[str] = "images"
    thing: ClassVar[str] = "image"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 1 if self.grey else 3

    @property
    def how(self) -> tuple[object, ...]:
        return self.things, self.size, self.data, self.grey, self.pad, self.max_pixels, self.bits, self.window

    @property
    def sources(self) -> Iterable[Path]:
        return self.paths

    def read(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decode the files at ``rows``, int64 ``[n]``, by default all, or take stored images.

        Returns uint8 ``[n, 3 or 1, size, size]``, and width and height before resizing, int64 ``[n, 2]``.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        if self.stored is not None:
            return ImageRows.of(self.stored[0], rows), self.stored[1][rows]
        images = np.empty((len(rows), self.shape[2], self.size, self.size), dtype=np.uint8)
        sizes = np.empty((len(rows), 2), dtype=np.int64)
        chosen = rows.tolist()

        def decode(place: int) -> None:
            images[place], sizes[place] = self._decode(chosen[place])

        run_in_threads(decode, len(chosen))
        return torch.from_numpy(images), torch.from_numpy(sizes)

    def _decode(self, row: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """Return an image uint8 ``[C, size, size]``, and its width and height before resizing."""
        path, mode = self.paths[row], "L" if self.grey else "RGB"
        with _readable(self.data, "image", path), open_image(path, self.max_pixels) as image:
            stored_size = upright_size(image)
            # Pillow takes any fourth band of a TIFF for transparency.
            if image.format == "TIFF" and image.mode in ("LA", "RGBA") and EXTRA_BANDS not in image.tag_v2:  # type: ignore[attr-defined]
                raise UserError(
                    f'data set "{self.data}": the image {path} has {len(image.mode)} bands and does not say that the '
                    "last is transparency, and not, for example, infrared; save the bands that count, one or three"
                )
            # A JPEG is decoded at a fraction of its size where that still leaves twice the pixels needed.
            image.draft(mode, (2 * self.size, 2 * self.size))
            picture = _on_white(_scale_to_bytes(image, path, self.data, self.bits, self.window)).convert(mode)
            square = (self.size, self.size)
            small = _pad_image(picture, self.size) if self.pad else picture.resize(square, Image.Resampling.BICUBIC)
            return np.atleast_3d(np.asarray(small)).transpose(2, 0, 1), stored_size


@dataclass(eq=False)
class MaskFiles(ImageFiles):
    """Mask files, each beside its image in ``images``, decoded by :func:`read_mask`.

    Sizes are those of the decoded masks.
    """

    images: Sequence[Path] = ()
    things: ClassVar[str] = "masks"
    thing: ClassVar[str] = "mask or its image"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 1

    @property
    def sources(self) -> Iterable[Path]:
        """Masks and images, since an image's size and orientation decide too."""
        return chain(self.paths, self.images)

    def values(self, row: int, size: int | None = None) -> npt.NDArray[np.uint8]:
        return read_mask(self.images[row], self.paths[row], self.data, self.max_pixels, size)

    def _decode(self, row: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        return self.values(row, self.size)[None], (self.size, self.size)


@dataclass(frozen=True)
class ImageReader:
    """Reader of a pool: its images are at ``places``, int64 ``[n]``, of ``files``, which the data set's pools share."""

    files: ImageFiles
    places: Tensor

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.files.read(self.places[rows])


def read_mask(
    image_path: Path, path: Path, data: str, max_pixels: int = MAX_PIXELS, size: int | None = None
) -> npt.NDArray[np.uint8]:
    """Decode a mask as uint8 ``[H, W]``, resized by the nearest pixel if ``size`` is given.

    Mask and image are each rotated by their own EXIF orientation.  The mask has one channel of class numbers: grey,
    palette, black-and-white, or whole numbers in floats.
    """
    with (
        _readable(data, MaskFiles.thing, path),
        open_image(image_path, max_pixels) as image,
        open_image(path, max_pixels) as mask,
    ):
        if mask.format in ("JPEG", "MPO", "WEBP") or mask.info.get("compression") in ("jpeg", "webp"):
            raise UserError(
                f'data set "{data}": the mask {path} is compressed as {mask.format}, which changes class numbers '
                "at edges; save masks as PNG, from the numbers themselves"
            )
        if mask.mode not in ("1", "L", "P", "F") and not is_deep(mask):
            raise UserError(
                f'data set "{data}": the mask {path} has colours (mode {mask.mode}), expected one channel of '
                "class numbers, or of 0 and 255"
            )
        turned, (width, height) = upright(mask), upright_size(image)
        if turned.size != (width, height):
            seen = ", as its EXIF orientation turns it" if image.size != (width, height) else ""
            raise UserError(
                f'data set "{data}": the mask {path} has {turned.width}x{turned.height} pixels, its image '
                f"{image_path} {width}x{height}{seen}"
            )
        if _negative(mask):
            raise UserError(
                f'data set "{data}": the mask {path} says that 0 is white, so that its values are not what a '
                "viewer shows; save it with 0 as black"
            )
        if mask.mode == "P":
            turned = _without_palette(turned, path, data)
        elif mask.mode not in ("1", "L"):
            values = np.asarray(turned)
            wrong = values[(values < 0) | (values > 255) | (values != np.rint(values))]
            if wrong.size:
                raise UserError(
                    f'data set "{data}": the mask {path} holds {wrong[0]:g}, expected class numbers from 0 to 255'
                )
            turned = Image.fromarray(values.astype(np.uint8))
        values = np.asarray(turned if size is None else turned.resize((size, size), Image.Resampling.NEAREST))
    return values.astype(np.uint8)


def _without_palette(mask: Image.Image, path: Path, data: str) -> Image.Image:
    """Return a palette mask as class numbers or greys, mode L.

    A palette of greys stores what a viewer shows, in any order, so the grey counts; a palette with colours paints class
    numbers, so the position counts.
    """
    palette = np.array(mask.getpalette("RGB"), dtype=np.int64).reshape(-1, 3)
    indices = np.asarray(mask)
    used = np.unique(indices)
    grey = (palette == palette[:, :1]).all(1)
    reason, values = None, indices
    if used[-1] >= len(palette) or len(np.unique(palette[used], axis=0)) < len(used):
        reason = "its palette does not give every value a colour of its own"
    elif grey.all():
        values = palette[indices, 0].astype(np.uint8)
        if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
            reason = "its palette has a transparent grey"
    elif grey[used].all() and (np.diff(palette[used, 0]) < 0).any():
        reason = "its palette has colours and it shows greys alone, in another order than its values"
    if reason is not None:
        raise UserError(f'data set "{data}": {reason}, in the mask {path}; save it as a grey image of class numbers')
    return Image.fromarray(values)


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format in ("PNG", "TIFF"):
        image.load()  # a PNG may hold its EXIF data behind its pixels, and Pillow itself turns a TIFF when it loads
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds for damaged EXIF data, which are ignored
        return None


def upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size if _turn(image) in (None, *MIRRORS) else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """Rotate and mirror the image by its EXIF orientation.

    ``exif_transpose`` would rewrite EXIF data and fail where they are damaged.
    """
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """Put a transparent image on white, as Pillow's conversion would show hidden colours."""
    if not image.has_transparency_data:
        return image
    colours = image.convert("RGBA")
    if colours.getchannel("A").getextrema() == (255, 255):
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)


def is_deep(image: Image.Image) -> bool:
    """Return whether the image has one channel of integers beyond eight bits."""
    return image.mode.startswith("I")


def _negative(image: Image.Image) -> bool:
    """Return whether decoded values still have 0 as white: Pillow inverts only up to eight bits."""
    return image.format == "TIFF" and image.mode not in ("1", "L") and image.tag_v2.get(PHOTOMETRIC) == 0  # type: ignore[attr-defined]


def grey_bits(tops: Iterable[int]) -> int:
    """Return the smallest of `BITS` that holds all files' largest values, 0 without any."""
    top = max(tops, default=-1)
    return 0 if top < 0 else next((bits for bits in BITS if top < 2**bits), BITS[-1])


def _pad_image(image: Image.Image, size: int) -> Image.Image:
    """Resize and pad to a square, as ``ImageOps.pad`` rounds thin images to no pixels."""
    longest = max(image.size)
    width, height = (max(1, round(side / longest * size)) for side in image.size)
    out = Image.new(image.mode, (size, size))
    corner = round((size - width) / 2), round((size - height) / 2)
    out.paste(image.resize((width, height), Image.Resampling.BICUBIC), corner)
    return out


def _scale_to_bytes(
    image: Image.Image, path: Path, data: str, bits: int, window: tuple[float, float] | None
) -> Image.Image:
    """Return the upright image with greys scaled to 0-255, which Pillow would clip."""
    turned = upright(image)
    if image.mode != "F" and not is_deep(image):
        return turned
    values = np.asarray(turned)
    low, high = float(values.min()), float(values.max())
    if window is not None:
        if not math.isfinite(low + high):
            raise UserError(f'data set "{data}": the image {path} holds grey values that are not finite; replace them')
        scaled = 255 * np.clip((values.astype(np.float64) - window[0]) / (window[1] - window[0]), 0, 1)
        return _restore_transparency(255 - scaled if _negative(image) else scaled, values, image)
    top = 1 if image.mode == "F" else 2**bits - 1
    if image.mode != "F" and not bits:
        raise UserError(
            f'data set "{data}": the image {path} has grey values of more than eight bits, unlike the images that '
            "decide how values are scaled; save it with 8 bits, or train with --data-option bits=12 or bits=16"
        )
    if not (low >= 0 and high <= top):
        expected = "fractions from 0 to 1" if image.mode == "F" else f"whole numbers from 0 to {top}"
        advice = f", or give --data-option bits={BITS[-1]}" * (low >= 0 and 2 <= top < high < 2 ** BITS[-1])
        raise UserError(
            f'data set "{data}": the image {path} holds grey values from {low:g} to {high:g}, expected {expected}; '
            f"choose the range that shows what matters with --data-option window=CENTRE,WIDTH{advice}"
        )
    return _restore_transparency((top - values if _negative(image) else values) * (255 / top), values, image)


def _restore_transparency(scaled: np.ndarray, values: np.ndarray, image: Image.Image) -> Image.Image:
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):  # the transparent grey of a PNG, as it is stored
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def unreadable(data: str, noun: str, path: Path, error: Exception) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its own message names the file object
        reason = f"it is none of {', '.join(FORMATS)}"
        with suppress(Exception), path.open("rb") as file:  # Pillow's facts on a TIFF that it cannot decode
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
            kind = f"{tags[BITS_EACH][0]} bits{', floats' * (3 in tags.get(SAMPLE_FORMAT, ()))}"
            reason = f"a TIFF of {tags[BANDS]} bands of {kind}, expected grey or three colours of 8 or 16 bits"
    return UserError(f'data set "{data}": cannot read the {noun} {path} ({reason}); replace or remove it')


def run_in_threads(work: Callable[[int], object], count: int) -> None:
    """Call ``work`` with 0 to ``count`` - 1 in threads: decoding releases the interpreter lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
        for _ in workers.map(work, range(count)):
            pass
