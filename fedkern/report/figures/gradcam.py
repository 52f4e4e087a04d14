"""Grad-CAM picture: whether the global model looks at the object or the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkern.models import StagedNetwork, grad_cam, mass_inside
from fedkern.report.figures.fitting import fitted
from fedkern.report.figures.sheet import LINE, Sheet, rgb
from fedkern.report.names import label

SIDE = 1.14
"""Inches of an image's longer side."""
SCALE = "Grad-CAM of the predicted class, relative to the largest value in the image"
_NAMES = {"id": "in distribution", "ood": "out of distribution", "": "test"}


def choose(labels: Tensor, count: int) -> Tensor:
    """Up to ``count`` rows of ``labels`` int64 ``[n]``: the first image of every class in turn, then the second."""
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
    """Draws two rows for every test set: images, and the same images with the model's Grad-CAM.

    The map explains the predicted class.  If masks are known, a white line outlines the object, and a number gives the
    share of the map inside the object.

    Args:
        panels: test set name to (uint8 images ``[n, C, H, W]``, the same images normalised, labels int64 ``[n]``, masks
            bool ``[n, H, W]`` or None).
    """
    columns = max(len(labels) for _, _, labels, _ in panels.values())
    reference = next(model.parameters())
    maps, heads, room = [], [], []
    for _, inputs, labels, _ in panels.values():
        cams, predicted = grad_cam(model, inputs.to(device=reference.device, dtype=reference.dtype))
        above = []
        for truth, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
            wrong = f", taken for {label(classes[guess])}" if truth != guess else ""
            above.append((fitted(f"{label(classes[truth])}{wrong}", 9, SIDE), "#D55E00" if wrong else "#222222"))
        maps.append(cams)
        heads.append(above)
        room += [0.06 + LINE * max(1 + text.count("\n") for text, _ in above), 0.2]
    sides = [fitted(label(_NAMES.get(name, name)), 10, 1.2 * SIDE) for name in panels]
    left = 0.2 + 0.16 * max(1 + text.count("\n") for text in sides)
    sheet = Sheet(columns, room, side=SIDE, left=left, title=title, scale=SCALE)
    for block, (images, _, labels, masks) in enumerate(panels.values()):
        top, bottom, cams = 2 * block, 2 * block + 1, maps[block]
        sheet.beside(top, sides[block], upright=True)
        sheet.beside(bottom, "Grad-CAM", upright=True)
        shares = None if masks is None else mass_inside(cams.cpu(), masks)
        cams = (cams / cams.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cams.dtype).tiny)).cpu()
        for i in range(len(labels)):
            picture = rgb(images[i].numpy())
            sheet.picture(top, i, picture)
            sheet.above(top, i, heads[block][i][0], color=heads[block][i][1])
            # The image in dark grey (white at 400 instead of 255), so that the map stands out.
            grey = (picture.mean(axis=2, keepdims=True) * (255 / 400)).astype(np.uint8)
            sheet.picture(bottom, i, grey.repeat(3, axis=2))
            sheet.map(bottom, i, cams[i].numpy())
            if masks is not None and shares is not None and bool(masks[i].any()):
                sheet.outline(bottom, i, masks[i].numpy())
                if not bool(shares[i].isnan()):
                    sheet.above(bottom, i, f"{100 * float(shares[i]):.0f} % inside")
    sheet.save(path)
