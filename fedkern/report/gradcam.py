"""The Grad-CAM picture: what the global model looks at, object or background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkern.models import StagedNetwork, grad_cam, mass_inside
from fedkern.report.names import TITLE, label
from fedkern.report.plots import new_figure, save

_NAMES = {"id": "in distribution", "ood": "out of distribution", "": "test"}


def choose(labels: Tensor, count: int) -> Tensor:
    """Rows to show: the first image of every class in turn, then the second, until there are ``count``.

    Args:
        labels: int64 ``[n]``.
        count: how many rows.
    """
    order = labels.argsort(stable=True)
    grouped = labels[order]
    start = torch.searchsorted(grouped, grouped, right=False)
    turn = torch.arange(len(order)) - start
    return order[torch.from_numpy(np.lexsort((grouped.numpy(), turn.numpy())).copy())][:count]


def draw(
    model: StagedNetwork,
    panels: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor | None]],
    path: Path,
    *,
    classes: Sequence[str],
    title: str,
) -> None:
    """Draws, for every test set, a row of images and under it the same images with the model's Grad-CAM.

    The map explains the predicted class; the object's outline is white where masks are known, and the number is the
    share of the map inside it.

    Args:
        model: the global model.
        panels: test set name to (uint8 images ``[n, C, H, W]``, the same normalised, labels int64 ``[n]``, masks bool
            ``[n, H, W]`` or None).
        path: the PNG.
        classes: class names.
        title: what ran.
    """
    columns = max(len(labels) for _, _, labels, _ in panels.values())
    figure = new_figure(max(1.25 * columns + 0.6, 6.0), 0.7 + 3.0 * len(panels))
    grid = figure.subplots(2 * len(panels), columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    reference = next(model.parameters())
    for block, (name, (images, inputs, labels, masks)) in enumerate(panels.items()):
        inputs = inputs.to(device=reference.device, dtype=reference.dtype)
        cams, predicted = grad_cam(model, inputs)
        shares = None if masks is None else mass_inside(cams.cpu(), masks)
        cams = (cams / cams.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cams.dtype).tiny)).cpu()
        for i in range(len(labels)):
            top, bottom = grid[2 * block, i], grid[2 * block + 1, i]
            picture = images[i].permute(1, 2, 0).numpy()
            picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
            top.imshow(picture, interpolation="nearest")
            truth, guess = label(classes[int(labels[i])]), label(classes[int(predicted[i])])
            right = int(labels[i]) == int(predicted[i])
            top.set_title(
                truth if right else f"{truth}, taken\nfor {guess}", fontsize=9, color="#222222" if right else "#D55E00"
            )
            # The image in dark grey (400 instead of 255 is white), so that the map on it is what shines.
            bottom.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=400, interpolation="nearest")
            bottom.imshow(cams[i].numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.75, interpolation="bilinear")
            if masks is not None and shares is not None and bool(masks[i].any()):
                outline = masks[i].numpy().astype(float)
                bottom.contour(outline, levels=[0.5], colors="white", linewidths=1.0)
                if not bool(shares[i].isnan()):
                    bottom.set_title(f"{100 * float(shares[i]):.0f} % inside", fontsize=9)
        grid[2 * block, 0].text(
            -0.12, 0.5, label(_NAMES.get(name, name)), transform=grid[2 * block, 0].transAxes, rotation=90, fontsize=10,
            ha="right", va="center",
        )  # fmt: skip
        grid[2 * block + 1, 0].text(
            -0.12, 0.5, "Grad-CAM", transform=grid[2 * block + 1, 0].transAxes, rotation=90, fontsize=10,
            ha="right", va="center",
        )  # fmt: skip
    figure.suptitle(label(title, TITLE), fontsize=12, x=0.01, ha="left")
    save(figure, path)
