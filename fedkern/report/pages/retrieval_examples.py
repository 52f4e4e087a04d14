"""Examples of retrieval: images of a test set, and the captions that the finished run's encoders find for them.

A report shows them as text beside images, ``retrieval.png`` as a picture.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from fedkern.data import FederatedData
from fedkern.downstream.finished import Finished
from fedkern.downstream.saved_network import read_model
from fedkern.errors import printable_name
from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.plots import GREEN
from fedkern.report.figures.sheet import Sheet, rgb
from fedkern.report.names import label
from fedkern.report.pages.charts import evenly
from fedkern.report.pages.html_page import Example, data_uri
from fedkern.settings.config import RunConfig
from fedkern.tasks.figure_names import set_title
from fedkern.tasks.retrieval import Gallery

EXAMPLES, FOUND, CAPTION = 6, 3, 160
"""Images shown, captions shown of each, and most characters of a caption."""
SIDE = 192
"""Longest side of an image on a page, in pixels."""
_WIDE, _PLACE = 5.2, 140
"""Inches of the captions in the picture, and most characters of one there."""


@dataclass(frozen=True)
class Found:
    """An image and the captions found for it.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        caption: the image's own caption that is found first.
        lines: the nearest captions, the nearest first, and whether each is the image's own; at the end the image's own
            caption with its place where none of the nearest is.
    """

    image: npt.NDArray[np.uint8]
    caption: str
    lines: Sequence[tuple[str, bool]]


def examples(found: Sequence[Found]) -> list[Example]:
    """The images and captions for a page."""
    return [
        Example(
            _uri(one.image),
            f"Test image with the caption: {_short(one.caption)}",
            [(_short(text), "right" if right else "wrong") for text, right in one.lines],
        )
        for one in found
    ]


def draw(found: Sequence[Found], path: Path, *, title: str) -> None:
    """Draws ``retrieval.png``: a row for every image, with its lines of captions beside it."""
    legend = [("✓ a caption of the image", GREEN)]
    sheet = Sheet(1, [0.12] * len(found), side=1.25, left=0.1, right=_WIDE, title=title, legend=legend)
    for row, one in enumerate(found):
        sheet.picture(row, 0, one.image)
        texts = [f"✓ {label(text, _PLACE)}" if right else label(text, _PLACE) for text, right in one.lines]
        colours = [GREEN if right else "#222222" for _, right in one.lines]
        broken = [fitted(text, 9, _WIDE - 0.4).split("\n") for text in texts]
        short = ["\n".join(lines[:2]) + " …" * (len(lines) > 2) for lines in broken]
        sheet.after(row, list(zip(short, colours, strict=True)))
    sheet.save(path)


def retrieval_examples(
    folder: Path,
    config: RunConfig,
    data: FederatedData,
    *,
    model: nn.Module | None = None,
    trusted: Collection[str] = (),
) -> tuple[list[Found], str]:
    """Images evenly spread over the first test set, each with its nearest captions, and a sentence on them.

    Raises:
        UserError: the run's encoders cannot be read.
    """
    module, about = read_model(folder, trusted, model)
    run = Finished(folder, config, module, about, data)
    name, split = next(iter(data.tests.items()))
    network, texts = run.networks[0], split.texts or ()
    gallery = Gallery.of(split.ids, texts)
    rows = gallery.images[torch.tensor(evenly(len(gallery.images), EXAMPLES))]
    own: dict[int, set[int]] = {}
    for image, text in gallery.pairs.tolist():
        own.setdefault(int(gallery.images[image]), set()).add(text)
    # Equal captions would fill the places of the nearest ones with one text.
    distinct = list({text: row for row, text in reversed(list(enumerate(texts)))}.values())
    kept = torch.tensor(sorted(distinct))
    embedded = run.text_embeddings(network, [texts[row] for row in kept.tolist()])
    scores = run.image_embeddings(network, split.subset(rows)) @ embedded.T
    ranked = scores.cpu().nan_to_num(-2.0).argsort(dim=1, descending=True, stable=True)
    found = []
    for number, row in enumerate(rows.tolist()):
        right = {texts[text] for text in own[row]}
        order = [texts[int(kept[at])] for at in ranked[number]]
        place = next(i for i, text in enumerate(order) if text in right)
        lines = [(text, text in right) for text in order[:FOUND]]
        if place >= FOUND:
            lines.append((f"place {place + 1}: {order[place]}", True))
        found.append(Found(rgb(split.images[row].numpy()), order[place], lines))
    where = f" {set_title(name)}" if name in ("id", "ood") else f" of {set_title(name)}" if name else ""
    many = " by the first client's network" if len(run.networks) > 1 else ""
    return found, (
        f"Test images{where}, evenly chosen, and the nearest of {len(kept):,} captions{many}. ✓ marks a caption of the "
        "image; where none is among the nearest, its place is told."
    )


def _short(text: str) -> str:
    return printable_name(text, CAPTION)


def _uri(pixels: npt.NDArray[np.uint8]) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_uri(file.getvalue())
