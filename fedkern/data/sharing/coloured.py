"""Coloured backgrounds: grey images over a background whose colour is tied to class and client (as in ColorMNIST).

Colour is a real shortcut: inside a client every class has its own colour, well apart from the colours of the client's
other classes, and an image shows that colour with probability `correlation`.  The tie differs between clients, and the
out-of-distribution test breaks the tie with uniformly random colours.  Shape stays learnable, because ink always stands
out from its background; the `Palette` decides how.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.background import bounding_boxes
from fedkern.data.sharing.partition import parse_partition, partition_like
from fedkern.data.split import Split
from fedkern.data.types import FederatedData
from fedkern.streams import stream

Colours = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Palette:
    """The possible background colours and the ink on them.

    Attributes:
        brightest: largest value of a background's channel, of 255.
        contrast: True: ink is black on light backgrounds (luminance above one half) and white on dark ones.  False: ink
            is white on all backgrounds.
        mean, std: of a channel over uniformly random colours.  They are constants so that normalisation does not depend
            on any client's data.
    """

    brightest: int
    contrast: bool
    mean: float
    std: float


PALETTES = {
    # Every channel of a background differs from the white ink by at least 77 of 255.
    "white": Palette(178, contrast=False, mean=0.546, std=0.280),
    # All colours are allowed: the background is a stronger cue, and the ink alone tells less.
    "contrast": Palette(255, contrast=True, mean=0.5, std=0.312),
}


_LUMINANCE = (299, 587, 114)  # thousandths of red, green and blue (ITU-R BT.601)
INK_THRESHOLD = 32  # grey values up to this are background
_CHUNK = 2048  # images composited at once, in 32-bit arithmetic
_CANDIDATES = 12  # random colours tried per class; the one farthest from the client's earlier ones is kept


def random_colours(count: int, palette: Palette, rng: np.random.Generator) -> Colours:
    """``count`` background colours, uniform over the palette in every channel, uint8 ``[count, 3]``."""
    return rng.integers(0, palette.brightest + 1, size=(count, 3), dtype=np.uint8)


def class_colours(seed: int, client: int, classes: int, palette: Palette) -> Colours:
    """Return the client's own colour of every class, uint8 ``[classes, 3]``.

    A class gets the one of twelve random candidates that is farthest from the client's earlier colours.  Other clients
    do not affect these colours.

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
    labels: npt.NDArray[np.int64], colours: Colours, correlation: float, palette: Palette, rng: np.random.Generator
) -> Colours:
    """Draw a background colour for every sample.

    It is the client's own colour of its class with probability ``correlation``.

    Args:
        labels: int64 ``[n]``.
        colours: uint8 ``[classes, 3]``, the client's colours from `class_colours`.
        correlation: in [0, 1]; a sample that does not show its class colour gets a uniformly random one.

    Returns:
        uint8 ``[n, 3]``.
    """
    free = random_colours(len(labels), palette, rng)
    tied = rng.random(len(labels)) < correlation
    return np.where(tied[:, None], colours[labels], free)


def ink_is_white(colours: Colours, palette: Palette) -> npt.NDArray[np.bool_]:
    """Return whether ink on these backgrounds is white (else black), bool ``[n]``."""
    if not palette.contrast:
        return np.ones(len(colours), dtype=np.bool_)
    return colours.astype(np.int64) @ np.array(_LUMINANCE) <= 127_500


def colourise(grey: Tensor, colours: Colours, palette: Palette) -> tuple[Tensor, Tensor]:
    """Lays ink over coloured backgrounds.

    Grey values up to `INK_THRESHOLD` count as no ink, so the mask is exact: outside the mask every pixel has the
    background colour to the bit, and inside the mask no pixel is pure background.

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


def paint(data: FederatedData, palette: Palette, correlation: float, mask: str, seed: int) -> FederatedData:
    """Paint the grey images of shared-out data.

    The clients' splits, the public split, the validation set and the test ``id`` get the clients' colours; the test
    ``ood`` gets uniformly random colours.  Under the partition ``iid`` all clients share one colour map.

    Args:
        correlation: see :func:`tied_colours`.
        mask: object masks of training images, ``exact`` or ``box``.
    """
    has_one_map = parse_partition(data.statistics.partition).name == "iid"
    numbers = [-1 if has_one_map else k for k in range(len(data.clients))]
    maps = [class_colours(seed, k, len(data.classes), palette) for k in numbers]

    def paint_split(grey: Split, colours: Colours) -> Split:
        images, masks = colourise(grey.images, colours, palette)
        return Split(images, grey.labels, masks, grey.ids)

    def draw_tied(labels: npt.NDArray[np.int64], purpose: str, client: int) -> Colours:
        rng = stream(seed, f"colours/{purpose}", client=client)
        return tied_colours(labels, maps[client], correlation, palette, rng)

    def in_distribution(grey: Split, purpose: str) -> Split:
        labels = grey.labels.numpy()
        colours = np.empty((len(grey), 3), dtype=np.uint8)
        homes = torch.full((len(grey),), -1)
        for k, rows in enumerate(partition_like(labels, data.statistics.counts, stream(seed, f"assign/{purpose}"))):
            colours[rows] = draw_tied(labels[rows], purpose, k)
            homes[rows] = k
        split = paint_split(grey, colours)
        return replace(split, homes=homes) if correlation and not has_one_map else split

    clients = [paint_split(grey, draw_tied(grey.labels.numpy(), "train", k)) for k, grey in enumerate(data.clients)]
    if mask == "box":
        clients = [replace(split, masks=bounding_boxes(split.masks)) for split in clients]
    test = data.tests[""]
    tests = {
        "id": in_distribution(test, "test"),
        "ood": paint_split(test, random_colours(len(test), palette, stream(seed, "colours/ood"))),
    }
    form = replace(data.form, shape=(3, *data.form.shape[1:]), mean=(palette.mean,) * 3, std=(palette.std,) * 3)
    statistics = data.statistics
    if correlation:
        statistics = replace(statistics, colours=np.stack(maps), tied=correlation)
    return replace(
        data,
        clients=tuple(clients),
        validation=in_distribution(data.validation, "validation"),
        tests=tests,
        public=None if data.public is None else in_distribution(data.public, "public"),
        form=form,
        statistics=statistics,
    )
