"""Digits on crops of real slides: a world whose ties of class and background no change of colours undoes.

Every client ties every class to a texture of its own, the tissue of a slide stretched by one of four factors along
each axis.  All crops have the same mean and contrast, so that the texture alone tells the class: neither brightness
nor contrast does, and ``--augment jitter``, which changes these alone, does not undo the tie.  An image shows its
client's texture of its class with the probability ``correlation``.  The out-of-distribution test draws textures at
random, and both tests show slides that no client has.  Masks are exact.

    python -m fedkern.run fedgid --data examples/papers/slides.py:slides --data-root DIR --method-option intervene=image
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedkern import FederatedData, UserError, register_data
from fedkern.data import Option, Pool, Split
from fedkern.data.images.image_files import MAX_PIXELS, list_images, open_image
from fedkern.data.sharing.coloured import INK_THRESHOLD
from fedkern.data.sources.idx import open_idx
from fedkern.data.sources.table import need_root
from fedkern.streams import stream

SIDES = (8, 24, 72, 216)
TEXTURES = [(height, width) for height in SIDES for width in SIDES]
"""Height and width in pixels of the crops that become grounds of a digit's size."""
MEAN, DEVIATION, OPACITY = 128.0, 45.0, 0.7
"""Grey values of all grounds, and the opacity of ink, which is black or white by chance."""


@register_data("slides", clients=5, partition="iid")
def slides(
    root: str | Path | None = None,
    *,
    clients: int,
    seed: int,
    samples: int = Option(6000, "training images of all clients together", low=1, high=50_000),
    correlation: float = Option(0.8, "share of images with their client's texture of their class", low=0, high=1),
) -> FederatedData:
    """MNIST on crops of slides whose textures are tied to class and client; out-of-distribution test with random ones.

    Args:
        root: MNIST's IDX files, and grey slides of one size in ``image``; the last quarter of the slides is for tests.

    Raises:
        UserError: files are missing or damaged, or slides have several sizes or are smaller than a crop.
    """
    source, (trained, unseen) = open_idx("mnist", root), _slides(need_root(root, "slides", "image/0.png") / "image")
    maps = np.stack([stream(seed, "class-textures", client=k).permutation(len(TEXTURES)) for k in range(clients)])

    def painted(purpose: str, pool: Pool, rows: npt.NDArray[np.int64] | None = None, client: int = -1) -> Split:
        grey = pool.take(torch.arange(len(pool)) if rows is None else torch.from_numpy(rows))
        rng = stream(seed, f"textures/{purpose}", client=client)
        homes = rng.integers(clients, size=len(grey)) if client < 0 else np.full(len(grey), client)
        tied = rng.random(len(grey)) < (0.0 if purpose == "ood" else correlation)
        textures = np.where(tied, maps[homes, grey.labels.numpy()], rng.integers(len(TEXTURES), size=len(grey)))
        return _painted(grey, textures, unseen if pool is test else trained, rng)

    test = source.tests[""]
    chosen = np.array_split(stream(seed, "train-samples").choice(len(source.train), samples, replace=False), clients)
    parts = [painted("train", source.train, np.sort(rows), k) for k, rows in enumerate(chosen)]
    sets = painted("validation", source.validation), painted("id", test), painted("ood", test)
    *pairs, validation, inside, outside = [(split.images, split.labels) for split in (*parts, *sets)]
    data = FederatedData.from_arrays(
        pairs, {"id": inside, "ood": outside}, validation=validation, classes=source.classes, mean=(0.5,), std=(0.2,)
    )
    return replace(data, clients=tuple(parts))


def _slides(folder: Path) -> tuple[Tensor, Tensor]:
    """Grey values fp32 [n, H, W] of the slides for training and of those for tests."""
    slides = []
    for path in list_images(folder) if folder.is_dir() else ():
        with open_image(path, MAX_PIXELS) as image:
            slides.append(torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)))
    sizes = sorted({tuple(slide.shape) for slide in slides})
    if len(slides) < 2 or len(sizes) > 1 or min(sizes[0]) < SIDES[-1]:
        raise UserError(
            f'data set "slides": expected two or more images of one size, at least {SIDES[-1]} pixels a side, in '
            f"{folder}, found {len(slides)} of the sizes {sizes}"
        )
    tested = max(1, len(slides) // 4)
    return torch.stack(slides[:-tested]), torch.stack(slides[-tested:])


def _painted(grey: Split, textures: npt.NDArray[np.int64], tissue: Tensor, rng: np.random.Generator) -> Split:
    """Digits uint8 [n, 1, H, W] on crops of the ``textures``, with their masks."""
    sides = grey.images.shape[2:]
    grounds = torch.empty(len(grey), 1, *sides)
    for texture in np.unique(textures):
        rows, crop = np.flatnonzero(textures == texture), TEXTURES[texture]
        slide = rng.integers(len(tissue), size=len(rows))
        axes = [
            rng.integers(0, side - length + 1, (len(rows), 1)) + np.arange(length)
            for side, length in zip(tissue.shape[1:], crop, strict=True)
        ]
        cut = tissue[slide[:, None, None], axes[0][:, :, None], axes[1][:, None, :]][:, None]
        grounds[rows] = functional.interpolate(cut, tuple(sides), mode="bilinear", antialias=True)
    deviation, mean = torch.std_mean(grounds, (1, 2, 3), keepdim=True)
    grounds = ((grounds - mean) / deviation.clamp_min(1) * DEVIATION + MEAN).clamp(0, 255)
    masks = grey.images > INK_THRESHOLD
    ink = OPACITY * grey.images * masks / 255
    colour = torch.from_numpy(255.0 * rng.integers(2, size=(len(grey), 1, 1, 1))).float()
    return Split((ink * colour + (1 - ink) * grounds).round().to(torch.uint8), grey.labels, masks[:, 0])
