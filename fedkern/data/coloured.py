"""Coloured backgrounds: grey images over a background whose colour is tied to class and client (ColorMNIST and kin).

Colour is a real shortcut: inside a client every class has a colour of its own, well apart from the client's other ones,
and an image shows it with probability `correlation`.  The tie differs between clients, and the out-of-distribution test
breaks it with uniformly random colours.  Shape stays learnable, because ink always stands out from its background; how
is the `Palette`'s choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.streams import stream

Colours = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Palette:
    """Which background colours there are, and the ink that shows on them.

    Attributes:
        brightest: largest value of a background's channel, of 255.
        contrast: ink is black on light backgrounds (luminance above one half), white on dark ones; else white on all.
    """

    brightest: int
    contrast: bool


PALETTES = {
    # No background comes closer to the white ink than 77 of 255 in any channel.
    "white": Palette(178, contrast=False),
    # Every colour there is: the background is a stronger cue, and ink alone says less.
    "contrast": Palette(255, contrast=True),
}
_LUMINANCE = (299, 587, 114)  # thousandths of red, green and blue (ITU-R BT.601)
INK_THRESHOLD = 32  # grey values up to this are background
_CHUNK = 2048  # images composited at once, in 32-bit arithmetic
_CANDIDATES = 12  # random colours tried per class; the one farthest from the client's earlier ones is kept


def random_colours(count: int, palette: Palette, rng: np.random.Generator) -> Colours:
    """``count`` background colours, uniform over the palette's in every channel, uint8 ``[count, 3]``."""
    return rng.integers(0, palette.brightest + 1, size=(count, 3), dtype=np.uint8)


def class_colours(seed: int, client: int, classes: int, palette: Palette) -> Colours:
    """The client's own colour of every class, uint8 ``[classes, 3]``; adding a client changes no other client's.

    Args:
        client: client id, or -1 for the map that all clients share under the ``iid`` partition.
    """
    rng = stream(seed, "class-colours", client=client)
    chosen = random_colours(1, palette, rng)
    while len(chosen) < classes:
        candidates = random_colours(_CANDIDATES, palette, rng)
        difference = candidates[:, None, :].astype(np.int64) - chosen[None, :, :]
        nearest = (difference**2).sum(axis=2).min(axis=1)
        chosen = np.concatenate([chosen, candidates[[int(nearest.argmax())]]])
    return chosen


def tied_colours(
    labels: npt.NDArray[np.int64], own: Colours, correlation: float, palette: Palette, rng: np.random.Generator
) -> Colours:
    """A background colour for every sample: the client's own one of its class with probability ``correlation``.

    Args:
        labels: int64 ``[n]``.
        own: uint8 ``[classes, 3]`` of the client, from `class_colours`.
        correlation: in [0, 1]; otherwise the colour is uniformly random.

    Returns:
        uint8 ``[n, 3]``.
    """
    free = random_colours(len(labels), palette, rng)
    tied = rng.random(len(labels)) < correlation
    return np.where(tied[:, None], own[labels], free)


def ink_is_white(colours: Colours, palette: Palette) -> npt.NDArray[np.bool_]:
    """Whether ink on these backgrounds is white (else black), bool ``[n]``."""
    if not palette.contrast:
        return np.ones(len(colours), dtype=np.bool_)
    return colours.astype(np.int64) @ np.array(_LUMINANCE) <= 127_500


def colourise(grey: Tensor, colours: Colours, palette: Palette) -> tuple[Tensor, Tensor]:
    """Lays ink over coloured backgrounds.

    Grey values up to `INK_THRESHOLD` count as no ink, so the mask is exact: outside of it every pixel has the
    background colour to the bit, inside of it none is pure background.

    Args:
        grey: uint8 ``[n, 1, H, W]``, the ink's opacity.
        colours: uint8 ``[n, 3]``.

    Returns:
        images uint8 ``[n, 3, H, W]`` and object masks bool ``[n, H, W]``.
    """
    mask = grey > INK_THRESHOLD
    white = ink_is_white(colours, palette)
    images = torch.empty(len(grey), 3, *grey.shape[2:], dtype=torch.uint8)
    for start in range(0, len(grey), _CHUNK):
        rows = slice(start, start + _CHUNK)
        ink = grey[rows].to(torch.int32) * mask[rows]
        ground = torch.from_numpy(colours[rows].astype(np.int32))[:, :, None, None]
        colour = torch.from_numpy(white[rows].astype(np.int32) * 255)[:, None, None, None]
        images[rows] = (ink * colour + (255 - ink) * ground + 127).div_(255, rounding_mode="floor")
    return images, mask[:, 0].contiguous()
