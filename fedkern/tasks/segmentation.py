"""Segmentation: a class of every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.image_rows import in_parts
from fedkern.tasks.base import Constant, Figures, Task, check_shape, mean, named
from fedkern.tasks.segmentation_figures import IGNORE, constant_dice, largest_classes, segmentation

PIXELS = 1 << 19
"""Pixels per evaluation batch of a segmentation network; a batch may have one image more (see ``batch_slices``)."""


class Segmentation(Task):
    """A class of every pixel, int64 ``[n, H, W]``, negative where it is unknown; logits ``[n, C, H, W]``."""

    name, main = "segmentation", "dice"
    target, network, pictures = "pixels", "pixels", ("segmentation",)
    offers = frozenset({"loss", "classes", "pixels", "images"})
    lacks = "no mask with an object"

    def criterion(self, outputs: Tensor, batch: Any) -> Tensor:
        return pixelwise_loss(outputs, batch.targets, per_sample=batch.per_sample)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        known = (targets >= 0).flatten(1)
        loss = F.cross_entropy(outputs, targets.clamp_min(0), reduction="none").flatten(1)
        pixels = known.sum(1)
        mean = torch.where(known, loss, 0.0).sum(1) / pixels
        return mean[pixels > 0]

    def outside(self, size: int) -> int:
        return 16  # logits are as large as the images

    def figures(self, model: nn.Module, data: Any) -> dict[str, float]:
        return segmentation(model, data)

    def final(self, data: Any, kept: Sequence[Tensor], names: Sequence[str]) -> Figures:
        return Figures(per_class={"dice": named(mean(kept), names)})

    def kept_shape(self, data: Any, classes: int) -> tuple[int, ...]:
        return (classes,)

    def batch_size(self, size: int, positions: int) -> int:
        return min(size, max(1, PIXELS // positions))  # feature maps are as large as the images

    def defined(self, data: Any) -> bool:
        full = data.full
        masks = in_parts(data.labels) if full is None else (full[row][0] for row in range(len(data)))
        return any(bool((mask > 0).any()) for mask in masks)

    def constant(self, data: Any, classes: Sequence[str]) -> Constant | None:
        value, best = constant_dice(data.labels, len(classes), data.cases, data.full)
        return Constant({"dice": value}, classes[best] if value else "")

    def chance(self, data: Any, classes: int, **known: Any) -> float | None:
        return None if data is None else constant_dice(data.labels, classes, data.cases, data.full)[0]

    def unfit(self, split: Any) -> str:
        return "" if split.any_known() else "no pixel whose class is known"

    def check_labels(self, labels: Tensor, samples: int, sides: Sequence[int]) -> None:
        check_shape(labels, torch.int64, (samples, *sides))

    def check_range(self, labels: Tensor, classes: int, where: str) -> None:
        super().check_range(labels.clamp(min=0), classes, where)  # a negative class is unknown

    def blank(self, samples: int, classes: int) -> Tensor:
        return torch.zeros(samples, 1, 1, dtype=torch.int64)

    def counts(self, labels: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
        return super().counts(labels.max(tuple(range(1, labels.ndim)), initial=0), classes)  # a mask's largest class

    def classless(self, classes: int) -> str:
        return "a class for every pixel, none for an image" if classes < 3 else ""

    def shared_classes(self, labels: npt.NDArray[Any], classes: int) -> tuple[npt.NDArray[np.int64], int]:
        """Where every image holds an object, no image counts as background, which is then no class."""
        none = int(labels.min(initial=1) > 0)
        return labels - none, classes - none

    def image_labels(self, labels: Tensor) -> Tensor:
        return torch.cat([largest_classes(part) for part in in_parts(labels)]) if len(labels) else labels.reshape(0)

    def both_labels(self, labels: Sequence[Any], classes: Sequence[str]) -> str:
        return "two masks"

    def places(self, classes: Sequence[str], known: Sequence[str]) -> Sequence[int] | None:
        places = super().places(classes, known)  # the values of masks are numbers in the order of the classes
        return places if places == [*range(len(classes))] else None

    def relabelled(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        return labels

    def output(self, classes: int, sides: Sequence[int]) -> tuple[int, ...]:
        return (classes, *sides)


SEGMENTATION = Segmentation()


def pixelwise_loss(logits: Tensor, labels: Tensor, *, per_sample: bool = False) -> Tensor:
    """Cross-entropy of the pixels whose class is known, a scalar in nats.

    Args:
        logits: fp [B, C, H, W].
        labels: int64 [B, H, W], negative where unknown.
        per_sample: True: the mean over samples of each sample's mean (0 without known pixels), so that a sample's
            gradient does not depend on the other samples' known pixels.  False: the mean over all known pixels.
    """
    known = labels >= 0
    labels = labels.masked_fill(~known, IGNORE)
    if per_sample:
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE).flatten(1)  # 0 where unknown
        return (losses.sum(1) / known.flatten(1).sum(1).clamp_min(1)).mean()
    # Bit-identical to cross_entropy's own mean, except that no known pixels give 0 instead of NaN.
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE) / known.sum().clamp_min(1)
