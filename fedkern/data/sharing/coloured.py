"""Grey images on backgrounds coloured by class and client, as in ColorMNIST.

Colour is a shortcut: at a client every class has its own distinct colour, shown with probability `correlation`.
Colours differ between clients, and the out-of-distribution test has uniformly random ones.  Shape stays learnable,
because ink always contrasts with its background, see `Palette`.
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
    """Background colours and the ink on them.

    Attributes:
        brightest: largest background value per channel, of 255.
        contrast: whether ink is black on light backgrounds (luminance above one half), else always white.
        mean, std: of a channel over uniformly random colours; constants, so that normalisation depends on no client's
            data.
    """

    brightest: int
    contrast: bool
    mean: float
    std: float


PALETTES = {
    # Every channel of a background differs from the white ink by at least 77 of 255.
    "white": Palette(178, contrast=False, mean=0.546, std=0.280),
    # All colours are allowed: a stronger cue, as the ink says less.
    "contrast": Palette(255, contrast=True, mean=0.5, std=0.312),
}


_LUMINANCE = (299, 587, 114)  # thousandths of red, green and blue (ITU-R BT.601)
INK_THRESHOLD = 32  # grey values up to this are background
_CHUNK = 2048  # images composited at once, in 32-bit arithmetic
_CANDIDATES = 12  # random colours tried per class; the one farthest from the client's earlier ones is kept


def random_colours(count: int, palette: Palette, rng: np.random.Generator) -> Colours:
    return rng.integers(0, palette.brightest + 1, size=(count, 3), dtype=np.uint8)


def class_colours(seed: int, client: int, classes: int, palette: Palette) -> Colours:
    """Return the client's colour of every class, uint8 ``[classes, 3]``, independent of other clients.

    Each is the one of twelve random candidates farthest from the client's earlier colours.  Client -1 is the map shared
    under ``iid``.
    """
    rng = stream(seed, "class-colours", client=client)
    chosen = random_colours(1, palette, rng)
    while len(chosen) < classes:
        candidates = random_colours(_CANDIDATES, palette, rng)
        difference = candidates[:, None, :].astype(np.int64) - chosen[None, :, :]
        nearest = (difference**2).sum(axis=2).min(axis=1)
        chosen = np.concatenate([chosen, candidates[[int(nearest.argmax())]]])
    return chosen


def colourise(grey: Tensor, colours: Colours, palette: Palette) -> tuple[Tensor, Tensor]:
    """Blend ink, uint8 ``[n, 1, H, W]`` opacities, over coloured backgrounds, and return images and object masks.

    Values up to `INK_THRESHOLD` count as no ink, so masks bool ``[n, H, W]`` are exact: pixels outside have the
    background colour to the bit, and none inside is pure background.
    """
    mask = grey > INK_THRESHOLD
    white = (colours.astype(np.int64) @ np.array(_LUMINANCE) <= 127_500) | (not palette.contrast)
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

    All splits but the test ``ood`` (uniformly random colours) get the clients' colours.  Under the partition ``iid``
    all clients share one colour map.  ``mask``: ``exact`` or ``box``, for training images.
    """
    # Under iid one map for all clients: colours must not differ between them.
    has_one_map = parse_partition(data.statistics.partition).name == "iid"
    numbers = [-1 if has_one_map else k for k in range(len(data.clients))]
    maps = [class_colours(seed, k, len(data.classes), palette) for k in numbers]

    def paint_split(grey: Split, colours: Colours) -> Split:
        images, masks = colourise(grey.images, colours, palette)
        return Split(images, grey.labels, masks, grey.ids)

    def draw_tied(labels: npt.NDArray[np.int64], purpose: str, client: int) -> Colours:
        # The class's colour with probability ``correlation``, else a random one.
        rng = stream(seed, f"colours/{purpose}", client=client)
        free = random_colours(len(labels), palette, rng)
        return np.where((rng.random(len(labels)) < correlation)[:, None], maps[client][labels], free)

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
    # Boxes hide the shape of the ink, which exact masks would leave in background images.
    if mask == "box":
        clients = [replace(split, masks=bounding_boxes(split.masks)) for split in clients]
    test = data.tests[""]
    tests = {
        "id": in_distribution(test, "test"),
        "ood": paint_split(test, random_colours(len(test), palette, stream(seed, "colours/ood"))),
    }
    # Normalisation depends on the palette alone, not on any client's data.
    form = replace(data.form, shape=(3, *data.form.shape[1:]), mean=(palette.mean,) * 3, std=(palette.std,) * 3)
    statistics = replace(data.statistics, colours=np.stack(maps), tied=correlation) if correlation else data.statistics
    return replace(
        data,
        clients=tuple(clients),
        validation=in_distribution(data.validation, "validation"),
        tests=tests,
        public=None if data.public is None else in_distribution(data.public, "public"),
        form=form,
        statistics=statistics,
    )
