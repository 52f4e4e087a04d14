"""Segmentation picture: test images, their true classes, and the classes that the model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from torch import Tensor, nn

from fedkern.files.image_rows import in_parts
from fedkern.report.figures.gradcam import choose
from fedkern.report.figures.sheet import Sheet, rgb
from fedkern.report.names import label

ROWS = ("image", "truth", "model")
LISTED = 20
"""Most classes that are named; from the eleventh on, colours come again."""


@torch.no_grad()
def draw(model: nn.Module, split: Any, inputs: Tensor, path: Path, *, classes: Sequence[str], title: str) -> None:
    """Draws a column per image: the image, the image under its true classes, and under the predicted classes.

    Args:
        model: gives logits ``[n, C, H, W]``.
        split: has the uint8 images ``[n, C, H, W]`` and labels int64 ``[n, H, W]`` to show.
        inputs: the images, normalised.
        classes: class names, the background first.
    """
    reference = next(model.parameters())
    predicted = model(inputs.to(device=reference.device, dtype=reference.dtype)).argmax(1).cpu()
    columns = len(split.images)
    colours = colormaps["tab10"](np.arange(max(len(classes) - 1, 1)) % 10)[:, :3]
    legend = [(label(name), colour) for name, colour in zip(classes[1:], colours[:LISTED], strict=False)]
    sheet = Sheet(columns, [0.0] * len(ROWS), side=1.15, left=0.75, title=title, legend=legend)
    for row, name in enumerate(ROWS):
        sheet.beside(row, name)
    for column in range(columns):
        image = rgb(split.images[column].numpy()) / 255.0
        for row, laid in enumerate((None, split.labels[column], predicted[column])):
            sheet.picture(row, column, image if laid is None else over(image, laid.numpy(), colours))
    sheet.save(path)


def examples(labels: Tensor, count: int) -> Tensor:
    """Rows to show of labels int64 ``[n, H, W]``: classes in turn; the class of an image is its highest label."""
    return choose(torch.cat([part.flatten(1).amax(1) for part in in_parts(labels)]), count)


def over(
    image: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], colours: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The image with foreground pixels mixed with the colour of their class, and unlabelled ones darkened."""
    result = image.copy()
    front = labels > 0
    result[front] = 0.4 * result[front] + 0.6 * colours[labels[front] - 1]
    result[labels < 0] *= 0.5
    return result
