"""Examples of retrieval: images of a test set, and the captions that the finished run's encoders find for them."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fedkern.data import FederatedData, Split
from fedkern.downstream.finished import Finished
from fedkern.engine import RunConfig, read_model
from fedkern.errors import printable_name
from fedkern.methods.common.figure_names import set_title
from fedkern.methods.common.retrieval import Gallery
from fedkern.report.charts import evenly
from fedkern.report.html_page import Example, data_uri
from fedkern.report.sheet import rgb

EXAMPLES, FOUND, CAPTION = 6, 3, 160
"""Images shown, captions shown of each, and most characters of a caption."""
SIDE = 192
"""Longest side of an image, in pixels."""


def retrieval_examples(
    folder: Path,
    config: RunConfig,
    data: FederatedData,
    *,
    model: nn.Module | None = None,
    trusted: Collection[str] = (),
) -> tuple[list[Example], str]:
    """Images evenly spread over the first test set, each with its nearest captions.

    Args:
        folder, config: the finished run.
        data: the run's image-text data.
        model, trusted: see :func:`fedkern.engine.read_model`.

    Returns:
        The examples, and a sentence on them.

    Raises:
        UserError: the run's encoders cannot be read.
    """
    module, about = read_model(folder, trusted, model)
    run = Finished(folder, config, module, about, data)
    name, split = next(iter(data.tests.items()))
    assert split.texts is not None
    network, texts = run.networks[0], split.texts
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
        lines = [(_short(text), "right" if text in right else "wrong") for text in order[:FOUND]]
        if place >= FOUND:
            lines.append((f"place {place + 1}: {_short(order[place])}", "right"))
        found.append(Example(_image(split, row), f"Test image with the caption: {_short(order[place])}", lines))
    where = f" {set_title(name)}" if name in ("id", "ood") else f" of {set_title(name)}" if name else ""
    many = " by the first client's network" if len(run.networks) > 1 else ""
    return found, (
        f"Test images{where}, evenly chosen, and the nearest of {len(kept):,} captions{many}. ✓ marks a caption of the "
        "image; where none is among the nearest, its place is told."
    )


def _short(text: str) -> str:
    return printable_name(text, CAPTION)


def _image(split: Split, row: int) -> str:
    image = Image.fromarray(np.ascontiguousarray(rgb(split.images[row].numpy())))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_uri(file.getvalue())
