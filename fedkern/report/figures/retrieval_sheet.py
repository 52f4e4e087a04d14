"""Retrieval picture: images of a test set, and the captions that the finished run's encoders find for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkern.downstream.finished import Finished
from fedkern.downstream.saved_network import read_model
from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.plots import GREEN, evenly
from fedkern.report.figures.sheet import Sheet, rgb
from fedkern.report.names import label
from fedkern.report.run_contents import Contents
from fedkern.tasks.figure_names import set_title
from fedkern.tasks.retrieval import Gallery

EXAMPLES, NEAREST, CAPTION = 6, 3, 140
"""Images shown, captions shown of each, and most characters of a caption."""
_WIDE = 5.2
"""Inches of the captions."""


@dataclass(frozen=True)
class Example:
    """An image and the captions found for it.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        lines: the nearest captions, the nearest first, and whether each is the image's own; at the end the image's own
            caption with its place where none of the nearest is.
    """

    image: npt.NDArray[np.uint8]
    lines: Sequence[tuple[str, bool]]


def draw(examples: Sequence[Example], path: Path, *, title: str) -> None:
    """Draws ``retrieval.png``: a row for every image, with its lines of captions beside it."""
    legend = [("✓ a caption of the image", GREEN)]
    sheet = Sheet(1, [0.12] * len(examples), side=1.25, left=0.1, right=_WIDE, title=title, legend=legend)
    for row, example in enumerate(examples):
        sheet.picture(row, 0, example.image)
        texts = [f"✓ {label(text, CAPTION)}" if right else label(text, CAPTION) for text, right in example.lines]
        colours = [GREEN if right else "#222222" for _, right in example.lines]
        paragraphs = [fitted(text, 9, _WIDE - 0.4).split("\n") for text in texts]
        short = ["\n".join(lines[:2]) + " …" * (len(lines) > 2) for lines in paragraphs]
        sheet.after(row, list(zip(short, colours, strict=True)))
    sheet.save(path)


def retrieval_examples(
    contents: Contents, data: object, *, model: nn.Module | None = None, trusted: Collection[str] = ()
) -> tuple[list[Example], str]:
    """Images evenly spread over the first test set, each with its nearest captions, and a title for them.

    Raises:
        UserError: the run's encoders cannot be read.
    """
    module, about = read_model(contents.folder, trusted, model)
    run = Finished(contents.folder, contents.config, module, about, data)
    name, split = next(iter(run.data.tests.items()))
    network, texts = run.networks[0], split.texts or ()
    gallery = Gallery.of(split.ids, texts)
    rows = gallery.images[torch.tensor(evenly(len(gallery.images), EXAMPLES))]
    captions: dict[int, set[str]] = {}
    for image, text in gallery.pairs.tolist():
        captions.setdefault(int(gallery.images[image]), set()).add(texts[text])
    distinct = list(dict.fromkeys(texts))  # equal captions would fill the places of the nearest ones with one text
    scores = run.image_embeddings(network, split.subset(rows)) @ run.text_embeddings(network, distinct).T
    ranked = scores.cpu().nan_to_num(-2.0).argsort(dim=1, descending=True, stable=True)
    examples = []
    for number, row in enumerate(rows.tolist()):
        order = [(distinct[at], distinct[at] in captions[row]) for at in ranked[number].tolist()]
        place, right = next((i, text) for i, (text, right) in enumerate(order) if right)
        beyond = [(f"place {place + 1}: {right}", True)] if place >= NEAREST else []
        examples.append(Example(rgb(split.images[row].numpy()), [*order[:NEAREST], *beyond]))
    where = f" {set_title(name)}" if name in ("id", "ood") else f" of {set_title(name)}" if name else ""
    many = " by the first client's network" if len(run.networks) > 1 else ""
    return examples, f"Test images{where} and the nearest of {len(distinct):,} captions{many}"
