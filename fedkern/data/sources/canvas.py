"""Canvases of the captions data set: real digits in colour on a textured background."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedkern.data.sources.digits import Bytes, enlarge_digits, resize_glyph

SIDE, CELL = 32, 16  # a canvas has two by two cells
SUBJECT, OTHER = 14, 11  # side in pixels of the digit that the caption begins with, and of the other digits
INK = {
    "red": (255, 70, 60), "green": (60, 220, 80), "blue": (90, 140, 255), "yellow": (250, 220, 60),
    "purple": (215, 90, 235), "white": (245, 245, 245),
}  # fmt: skip
TEXTURES = ("plain", "gradient", "rows", "columns", "diagonal", "checks", "speckles")
BRIGHTEST = 95  # largest value of a background's channel, of 255, so that every ink stands out
INK_THRESHOLD = 96  # opacity above which a pixel belongs to the digit


@dataclass(frozen=True)
class Ground:
    """Client's background: a texture and its two colours, uint8 ``[2, 3]``."""

    texture: str
    colours: Bytes


@dataclass(frozen=True)
class Glyph:
    """Digit on a canvas: row in the digits data set, ink, cell (0 to 3, row by row) and side in pixels."""

    row: int
    ink: str
    cell: int
    side: int


@functools.cache
def _glyphs(side: int) -> Bytes:
    return np.stack([resize_glyph(image, side) for image in enlarge_digits()[0]])


def draw_ground(texture: str, rng: np.random.Generator) -> Ground:
    """Return a background of two dark colours that differ visibly."""
    dark = rng.integers(0, BRIGHTEST // 2, size=3)
    second = dark + rng.integers(BRIGHTEST // 4, BRIGHTEST // 2, size=3)
    return Ground(texture, np.stack([dark, second]).astype(np.uint8))


def _texture(kind: str, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the second colour's share per pixel, ``[SIDE, SIDE]``, at a random phase and scale."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] + rng.uniform(0, SIDE, size=(2, 1, 1))
    period = rng.uniform(5, 9)

    def wave(along: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        return along % period < period / 2

    if kind == "plain":
        return np.full((SIDE, SIDE), rng.random())
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * x + np.sin(angle) * y
        share: npt.NDArray[np.float64] = (along - along.min()) / (along.max() - along.min())
        return share
    if kind == "speckles":
        return (rng.random((SIDE, SIDE)) < 0.35).astype(np.float64)
    pattern = {"rows": wave(y), "columns": wave(x), "diagonal": wave((x + y) / np.sqrt(2)), "checks": wave(x) ^ wave(y)}
    return pattern[kind].astype(np.float64)


def draw(ground: Ground, digits: Sequence[Glyph], rng: np.random.Generator) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Draw a canvas, and return the image uint8 ``[3, SIDE, SIDE]`` and the digits' mask bool ``[SIDE, SIDE]``."""
    share = _texture(ground.texture, rng)[..., None]
    light, dark = ground.colours[1].astype(np.float64), ground.colours[0].astype(np.float64)
    image = (share * light + (1 - share) * dark) * rng.uniform(0.8, 1.2)
    mask = np.zeros((SIDE, SIDE), dtype=np.bool_)
    for placed in digits:
        top, left = (CELL * place + rng.integers(0, CELL - placed.side + 1) for place in divmod(placed.cell, 2))
        where = slice(top, top + placed.side), slice(left, left + placed.side)
        opacity = _glyphs(placed.side)[placed.row]
        alpha = opacity[..., None] / 255
        image[where] = (1 - alpha) * image[where] + alpha * np.array(INK[placed.ink])
        mask[where] = opacity > INK_THRESHOLD
    return np.rint(image).clip(0, 255).astype(np.uint8).transpose(2, 0, 1), mask


def add_noise(image: Bytes, limit: int, rng: np.random.Generator) -> Bytes:
    """Change every value uniformly by up to ``limit``, in integers so that all machines agree."""
    change = rng.integers(-limit, limit, size=image.shape, endpoint=True)
    return (image + change).clip(0, 255).astype(np.uint8)
