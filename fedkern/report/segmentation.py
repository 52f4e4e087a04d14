"""The segmentation picture: test images, their classes, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from torch import Tensor, nn

from fedkern.report.gradcam import choose
from fedkern.report.names import TITLE, label
from fedkern.report.plots import new_figure, save

ROWS = ("image", "truth", "model")


@torch.no_grad()
def draw(model: nn.Module, split: Any, inputs: Tensor, path: Path, *, classes: Sequence[str], title: str) -> None:
    """Draws images in columns: as they are, with the true classes laid over them, and with the predicted ones.

    Args:
        model: gives logits ``[n, C, H, W]``.
        split: has the uint8 images ``[n, C, H, W]`` and labels int64 ``[n, H, W]`` to show.
        inputs: the images, normalised.
        path: the PNG.
        classes: class names, the background first.
        title: what ran.
    """
    reference = next(model.parameters())
    predicted = model(inputs.to(device=reference.device, dtype=reference.dtype)).argmax(1).cpu()
    columns = len(split.images)
    figure = new_figure(max(1.25 * columns + 0.8, 6.0), 4.6)
    grid = figure.subplots(3, columns, squeeze=False)
    colours = colormaps["tab10"](np.arange(max(len(classes) - 1, 1)) % 10)[:, :3]
    for column in range(columns):
        image = shown(split.images[column])
        for row, laid in enumerate((None, split.labels[column], predicted[column])):
            axes = grid[row, column]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.imshow(image if laid is None else over(image, laid.numpy(), colours), interpolation="nearest")
            if column == 0:
                axes.set_ylabel(ROWS[row], fontsize=12)
    for number, name in enumerate(classes[1:11]):
        figure.text(
            0.02 + 0.95 * number / min(len(classes) - 1, 10), 0.005, label(name), color=colours[number], fontsize=11
        )
    figure.suptitle(label(title, TITLE), fontsize=13, x=0.01, ha="left")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    save(figure, path)


def examples(labels: Tensor, count: int) -> Tensor:
    """Rows to show of labels int64 ``[n, H, W]``: the classes in turn, by the highest that an image holds."""
    return choose(labels.flatten(1).amax(1), count)


def shown(image: Tensor) -> npt.NDArray[np.float64]:
    """A uint8 image ``[C, H, W]`` as ``[H, W, 3]`` in [0, 1]; of other than three channels the first, in grey."""
    rgb = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    made: npt.NDArray[np.float64] = rgb.permute(1, 2, 0).double().numpy() / 255
    return made


def over(
    image: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], colours: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The image with every foreground pixel half in its class's colour, and what is unknown half black."""
    made = image.copy()
    front = labels > 0
    made[front] = 0.4 * made[front] + 0.6 * colours[labels[front] - 1]
    made[labels < 0] *= 0.5
    return made
