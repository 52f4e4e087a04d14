"""Square tiles cut from large segmentation images."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.data.types import Pool
from fedkern.tasks.segmentation import largest_classes


def tiled(pool: Pool, tile: int) -> Pool:
    """The images of a segmentation pool cut into tiles, row by row; the tiles of an image are one case.

    One read of an image serves all of its tiles in a request.

    Args:
        pool: images whose height and width are multiples of ``tile``.

    Raises:
        ValueError: the pool has no pixel classes.
    """
    if pool.targets is None:
        raise ValueError("pool: expected the class of every pixel, given that of images")
    rows = torch.arange(len(pool))
    classes = cut(pool.targets(rows)[:, None], tile)[:, 0]
    each = len(classes) // max(len(pool), 1)
    image = rows.repeat_interleave(each)

    def read(tiles: Tensor) -> tuple[Tensor, None]:
        needed, position = image[tiles].unique(return_inverse=True)
        return cut(pool.read(needed)[0], tile)[position * each + tiles % each], None

    return Pool(
        labels=largest_classes(classes),
        ids=tuple(f"{name}#{number}" for name in pool.ids for number in range(each)),
        read=read,
        groups=None if pool.groups is None else pool.groups.repeat_interleave(each),
        targets=lambda tiles: classes[tiles],
        cases=image,
        patients=None if pool.patients is None else pool.patients.repeat_interleave(each),
        full=None if pool.full is None else pool.full.tiled(tile),
    )


def cut(images: Tensor, tile: int) -> Tensor:
    """Cuts ``[n, C, H, W]`` into tiles ``[n * (H / tile) * (W / tile), C, tile, tile]``, image by image, row by row."""
    n, channels, height, width = images.shape
    parts = images.reshape(n, channels, height // tile, tile, width // tile, tile)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, tile, tile)
