"""Segmentation: a class of every pixel, by Dice, intersection over union and Hausdorff distance.

Class 0, the background, is excluded from all means, and unknown pixels (`IGNORE`, any negative label) from everything.
A class that the truth of a whole test set lacks has no figure.

Dice is MONAI's ``DiceMetric`` with its defaults, mean over cases (`fedkern.data.Split.cases`), then over classes. But
in a case without any object every predicted class has Dice 0, as in nnU-Net, so that false alarms count. The
intersection over union is PASCAL VOC's, over all pixels of the test set at once, mean over classes. Both count pixels
in the masks' original size (`fedkern.data.Split.full`), the other figures in the resized masks. A class that is not
found at all has the image's diagonal as Hausdorff distance, as BraTS counts a missed tumour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.files.image_rows import in_parts
from fedkern.tasks.cross_entropy import added_in_any_order
from fedkern.tasks.protocols import JudgedSet, Label, SampleSet, TaskBatch
from fedkern.tasks.task import Constant, Figures, Task, check_shape, mean, to_dict

PIXELS = 1 << 19
"""Pixels per evaluation batch of a segmentation network; a batch may have one image more (see ``batch_slices``)."""
IGNORE = -100
"""Class of a pixel whose class is unknown: no loss and no metric counts the pixel (PyTorch's ``ignore_index``)."""
Mask = npt.NDArray[np.bool_]


class Segmentation(Task):
    """Segmentation, int64 ``[n, H, W]``, negative if unknown, by logits ``[n, C, H, W]``."""

    name, main, sampled = "segmentation", "dice", "dice"
    target, network, pictures = "pixels", "pixels", ("segmentation",)
    offers = frozenset({"loss", "classes", "pixels", "images"})
    lacks = "no mask with an object"
    outside = 16  # logits are as large as the images

    def criterion(self, outputs: Tensor, batch: TaskBatch) -> Tensor:
        return pixelwise_loss(outputs, batch.targets, per_sample=batch.per_sample)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        valid = (targets >= 0).flatten(1)
        loss = F.cross_entropy(outputs, targets.clamp_min(0), reduction="none").flatten(1)
        pixels = valid.sum(1)
        return (torch.where(valid, loss, 0.0).sum(1) / pixels)[pixels > 0]

    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        return segmentation(model, data)

    def final(self, data: SampleSet, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        return Figures(per_class={"dice": to_dict(mean([output.nanmean(0) for output in outputs]), names)})

    def parts(self, output: Tensor, labels: Tensor, cases: Tensor | None) -> Tensor:
        parts = torch.full((len(labels), output.shape[1] - 1), math.nan, dtype=torch.float64)
        parts[_case_rows(len(labels), cases)] = output[:, 1:]  # all images of a case belong to its unit
        return parts

    def kept_shape(self, data: SampleSet, classes: int) -> tuple[int, ...]:
        return len(_case_rows(len(data), getattr(data, "cases", None))), classes

    def batch_size(self, size: int, positions: int) -> int:
        return min(size, max(1, PIXELS // positions))  # feature maps are as large as the images

    def has_main_figure(self, data: SampleSet) -> bool:
        full = getattr(data, "full", None)
        masks = in_parts(data.labels) if full is None else (full[row][0] for row in range(len(data)))
        return any(bool((mask > 0).any()) for mask in masks)

    def constant(self, data: SampleSet, classes: Sequence[str]) -> Constant | None:
        value, best = constant_dice(data, len(classes))
        return Constant({"dice": value}, classes[best] if value else "")

    def chance(self, data: SampleSet | None, classes: int, **facts: object) -> float | None:
        return None if data is None else constant_dice(data, classes)[0]

    def unfit(self, split: SampleSet) -> str:
        is_known = any(bool((part >= 0).any()) for part in in_parts(split.labels))
        return "" if is_known else "no pixel whose class is known"

    def check_labels(self, labels: Tensor, samples: int, sides: Sequence[int]) -> None:
        check_shape(labels, torch.int64, (samples, *sides))

    def check_range(self, labels: Tensor, classes: int, where: str) -> None:
        super().check_range(labels.clamp(min=0), classes, where)  # a negative class is unknown

    def blank(self, samples: int, classes: int) -> Tensor:
        return torch.zeros(samples, 1, 1, dtype=torch.int64)

    def counts(self, labels: np.ndarray, classes: int) -> npt.NDArray[np.int64]:
        return super().counts(labels.max(tuple(range(1, labels.ndim)), initial=0), classes)  # a mask's largest class

    def classless(self, classes: int) -> str:
        return "a class for every pixel, none for an image" if classes < 3 else ""

    def shared_classes(self, labels: np.ndarray, classes: int) -> tuple[npt.NDArray[np.int64], int]:
        """Drop the background if every image holds an object."""
        has_no_background = int(labels.min(initial=1) > 0)
        return labels - has_no_background, classes - has_no_background

    def image_labels(self, labels: Tensor) -> Tensor:
        return torch.cat([largest_classes(part) for part in in_parts(labels)]) if len(labels) else labels.reshape(0)

    def both_labels(self, labels: Sequence[Label], classes: Sequence[str]) -> str:
        return "two masks"

    def places(self, classes: Sequence[str], network_classes: Sequence[str]) -> Sequence[int] | None:
        places = super().places(classes, network_classes)  # the values of masks are numbers in the order of the classes
        return places if places == [*range(len(classes))] else None

    def map_labels(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        return labels

    def output(self, classes: int, sides: Sequence[int]) -> tuple[int, ...]:
        return (classes, *sides)


SEGMENTATION = Segmentation()


def pixelwise_loss(logits: Tensor, labels: Tensor, *, per_sample: bool = False) -> Tensor:
    """Return the cross-entropy of pixels with known classes, a scalar in nats.

    ``logits`` are fp [B, C, H, W], ``labels`` int64 [B, H, W]. ``per_sample``: the mean over samples of each sample's
    mean, so that a sample's gradient does not depend on the other samples' known pixels.
    """
    valid = labels >= 0
    labels = labels.masked_fill(~valid, IGNORE)
    if per_sample or added_in_any_order(logits):
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)  # 0 where unknown
        if not per_sample:
            return losses.sum() / valid.sum().clamp_min(1)
        return (losses.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)).mean()
    # Bit-identical to cross_entropy's own mean, except that no known pixels give 0 instead of NaN.
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE) / valid.sum().clamp_min(1)


@torch.no_grad()
def segmentation(model: nn.Module, data: JudgedSet) -> dict[str, float]:
    """Return the figures of a network, in eval mode, with logits [B, C, H, W].

    ``data.record`` receives the predicted classes [n, H, W] in order, ``data.keep`` the Dice of every case and class,
    fp64 [cases, C], the background's first (NaN if the case does not count for the class).

    Returns:
        ``dice``, ``iou`` (fractions), ``hd95`` (pixels), ``loss`` (nats per pixel) and, with more than one foreground
        class, ``dice_1`` and so on. Without any foreground in the truth only ``loss``.
    """
    loss, pixels = 0.0, 0
    full = getattr(data, "full", None)
    counts: list[Tensor] = []  # per image and class: pixels in both, predicted, true
    distances: list[float] = []
    predictions: list[Tensor] = []
    for batch in data.batches():
        logits, labels = model(batch.inputs), batch.targets
        valid = labels >= 0
        loss -= float(F.log_softmax(logits, 1).gather(1, labels.clamp_min(0)[:, None])[:, 0][valid].double().sum())
        pixels += int(valid.sum())
        predicted = logits.argmax(1)
        if full is None:
            counts.append(overlaps(predicted, labels, logits.shape[1]))
        else:
            counts.append(full.overlaps(predicted, sum(map(len, counts)), logits.shape[1]))
        distances += _distances(predicted.cpu().numpy(), labels.cpu().numpy())
        predictions.append(predicted.to(torch.uint8 if logits.shape[1] <= 256 else torch.int64))
    if pixels == 0:
        raise ValueError("data: expected at least one labelled pixel, given none")
    if record := getattr(data, "record", None):
        record(torch.cat(predictions))
    cases = getattr(data, "cases", None)
    per_image = torch.cat(counts)
    case_scores = case_dice(per_image if cases is None else _together(per_image, cases))
    if keep := getattr(data, "keep", None):
        keep(case_scores)
    by_class = case_scores.nanmean(0)[1:]
    common, guesses, true = per_image.sum(0).double().unbind(0)
    union = torch.where(true > 0, guesses + true - common, math.nan)[1:]
    means = {"dice": float(by_class.nanmean()), "iou": float((common[1:] / union).nanmean())}
    figures = {**{name: mean for name, mean in means.items() if not math.isnan(mean)}, "loss": loss / pixels}
    if distances:
        figures["hd95"] = float(np.mean(distances))
    if len(by_class) > 1:
        figures |= {f"dice_{c}": value for c, value in enumerate(by_class.tolist(), 1) if not math.isnan(value)}
    return figures


def largest_classes(labels: Tensor) -> Tensor:
    """Return the object class with most pixels of every image, int64 ``[n]``, 0 without an object."""
    top = int(labels.max()) if labels.numel() else 0
    counts = torch.stack([(labels == label).sum((1, 2)) for label in range(1, max(top, 1) + 1)], 1)
    return torch.where(counts.any(1), counts.argmax(1) + 1, 0)


def overlaps(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Count the pixels of every image and class (in both, predicted, true): int64 [B, 3, C] on the CPU.

    ``truth`` is int64 [B, *positions]; no count includes pixels of a negative class.
    """
    rows = torch.arange(len(truth), device=truth.device).repeat_interleave(truth[0].numel() if len(truth) else 0)
    guess, label = predicted.reshape(-1), truth.reshape(-1)
    valid = label >= 0
    rows, guess, label = rows[valid], guess[valid], label[valid]

    def count(rows: Tensor, of: Tensor) -> Tensor:
        return torch.bincount(rows * classes + of, minlength=len(truth) * classes).view(len(truth), classes).cpu()

    right = guess == label
    return torch.stack([count(rows[right], label[right]), count(rows, guess), count(rows, label)], 1)


def dice(counts: Tensor) -> Tensor:
    """Return the mean of :func:`case_dice` over cases, fp64 [C]."""
    return case_dice(counts).nanmean(0)


def case_dice(counts: Tensor) -> Tensor:
    """Return 2 |P ∩ T| / (|P| + |T|) of every case and class, fp64 [n, C], from counts int64 [n, 3, C].

    NaN unless a case counts for a class: the classes of its truth, without any object the predicted ones.
    """
    common, guesses, true = counts.double().unbind(1)
    healthy = true[:, 1:].sum(1, keepdim=True) == 0
    counted = (true.sum(0) > 0) & ((true > 0) | (healthy & (guesses > 0)))
    return torch.where(counted, 2 * common / (guesses + true), math.nan)


def constant_dice(data: SampleSet, classes: int) -> tuple[float, int]:
    """Return the largest ``dice`` of predicting one class everywhere, and that class."""
    labels, cases, full = data.labels, getattr(data, "cases", None), getattr(data, "full", None)
    if full is None:
        counts = torch.cat([overlaps(part, part, classes) for part in in_parts(labels)])
    else:
        counts = full.overlaps(torch.zeros(labels.shape, dtype=torch.uint8), 0, classes)
        counts[:, 0] = counts[:, 2]
    counts[:, 1] = counts[:, 2].sum(1, keepdim=True)  # all known pixels are predicted as the class
    scores = dice(counts if cases is None else _together(counts, cases))[1:]
    present = int((~scores.isnan()).sum())
    if not present:
        return 0.0, 0
    best = int(scores.nan_to_num(-1.0).argmax())
    return float(scores[best]) / present, best + 1


def hausdorff95(predicted: Mask, truth: Mask) -> float:
    """Return the 95th percentile of the surface distances between two bool masks of one shape, in pixels.

    The larger of both directions; 0 if both masks are empty, the image's diagonal if one is. A surface has the
    positions with a neighbour (along an axis) outside the mask or the image.
    """
    from scipy import ndimage

    if predicted.shape != truth.shape:
        raise ValueError(f"truth: expected shape {list(predicted.shape)}, got {list(truth.shape)}")
    if not predicted.any() or not truth.any():
        return 0.0 if predicted.any() == truth.any() else math.hypot(*truth.shape)
    # Both surfaces lie within the bounding box of both masks.
    boxes = ndimage.find_objects((predicted | truth).astype(np.int8))
    predicted, truth = np.pad(predicted[boxes[0]], 1), np.pad(truth[boxes[0]], 1)
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted, truth)]
    far = [ndimage.distance_transform_edt(~outline) for outline in outlines]
    return float(max(np.percentile(far[1][outlines[0]], 95), np.percentile(far[0][outlines[1]], 95)))


def _distances(predicted: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> list[float]:
    """Return the distances of every image and every foreground class in its truth."""
    return [
        hausdorff95((guess == c) & (label >= 0), label == c)
        for guess, label in zip(predicted, truth, strict=True)
        for c in np.unique(label[label > 0])
    ]


def _case_rows(images: int, cases: Tensor | None) -> npt.NDArray[np.int64]:
    """Return the first image of every case, int64 ``[cases]``, by case number."""
    return np.arange(images) if cases is None else np.unique(cases.cpu().numpy(), return_index=True)[1]


def _together(counts: Tensor, cases: Tensor) -> Tensor:
    """Sum the images' counts [n, 3, C] by case."""
    names, case = torch.unique(cases.cpu(), return_inverse=True)
    return counts.new_zeros(len(names), *counts.shape[1:]).index_add_(0, case, counts)
