"""Multi-label classification, with AUROC and average precision as in scikit-learn."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedkern.tasks.classification import areas
from fedkern.tasks.protocols import JudgedSet, Label, SampleSet, TaskBatch
from fedkern.tasks.task import Figures, Floats, Rows, Task, check_shape, mean, to_dict

MAIN = "macro_auroc"
"""Main figure: mean of the labels' areas under the ROC curve."""


class Multilabel(Task):
    """Multi-label classification: labels uint8 ``[n, L]`` of 0 and 1, and a logit for every label."""

    name, main, sampled = "multilabel", MAIN, MAIN
    target, partition = "labels", "iid"
    offers = frozenset({"loss", "criterion", "images"})
    lacks = "no label that some images have and others lack"
    outside = 16

    def criterion(self, outputs: Tensor, batch: TaskBatch) -> Tensor:
        return binary_cross_entropy_with_logits(outputs, batch.targets.to(outputs.dtype))

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(1)

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        """Return ``loss`` (mean binary cross-entropy in nats) and `label_figures`, and keep logits [n, L]."""
        pairs = [(model(batch.inputs), batch.targets) for batch in data.batches()]
        if not pairs:
            raise ValueError("data: expected at least one sample, given none")
        logits, labels = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
        if keep := getattr(data, "keep", None):
            keep(logits)
        loss = float(binary_cross_entropy_with_logits(logits.double(), labels.double()))
        return {**label_figures(logits, labels), "loss": loss}

    def final(self, data: SampleSet, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        labels = data.labels.cpu()
        functions = {"auroc": areas, "average_precision": average_precisions}
        means = {name: mean([of(logits, labels) for logits in outputs]) for name, of in functions.items()}
        return Figures(per_class={name: to_dict(values, names) for name, values in means.items()})

    def resample_figure(
        self, output: Tensor, labels: Tensor, cases: Tensor | None, rows: Rows, units: Rows, counts: Floats
    ) -> Floats:
        weights = np.ascontiguousarray(counts.T) * (not output.isnan().any())
        areas_drawn = []
        for scores, truth in zip(output.double().numpy()[rows].T, labels.numpy()[rows].T, strict=True):
            has, lacks = np.flatnonzero(truth), np.flatnonzero(truth == 0)
            lacks = lacks[np.argsort(scores[lacks])]
            below = np.zeros((len(lacks) + 1, len(counts)))
            np.cumsum(weights[units[lacks]], 0, out=below[1:])
            ends = [below[np.searchsorted(scores[lacks], scores[has], side)] for side in ("left", "right")]
            drawn = weights[units[has]]  # ties count one half
            with np.errstate(invalid="ignore"):
                areas_drawn.append((drawn * (ends[0] + ends[1])).sum(0) / (2 * drawn.sum(0) * below[-1]))
        figures: Floats = torch.from_numpy(np.stack(areas_drawn)).nanmean(0).numpy()
        return figures

    def has_main_figure(self, data: SampleSet) -> bool:
        return bool((data.labels != data.labels[:1]).any())

    def chance(self, data: SampleSet | None, classes: int, **facts: object) -> float | None:
        return 0.5

    def is_constant(self, data: JudgedSet) -> bool:
        outputs = [logits for _, logits in data.kept if logits.shape == data.labels.shape]
        return bool(outputs) and len(data) > 1 and all(map(predicts_alike, outputs))

    def convert_labels(self, labels: Tensor) -> Tensor:
        if labels.is_complex() or not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(
                f"labels of shape {list(labels.shape)} are several labels an image and must be 0 or 1, but some are "
                "neither; give a single class an image as whole numbers [n]"
            )
        return labels.to(torch.uint8)

    def check_labels(self, labels: Tensor, samples: int, sides: Sequence[int]) -> None:
        check_shape(labels, torch.uint8, (samples, labels.shape[-1]))

    def check_range(self, labels: Tensor, classes: int, where: str) -> None:
        if labels.dtype != torch.uint8:
            raise ValueError(f"labels of {labels.dtype} in {where}, expected uint8")
        if labels.shape[1:] != (classes,) or classes < 2:
            raise ValueError(
                f"labels {list(labels.shape)} in {where}, expected a column for each of the {classes} labels, of which "
                "there are at least two"
            )
        if labels.numel() and int(labels.max()) > 1:
            raise ValueError(f"the label {int(labels.max())} in {where}, expected 0 and 1")

    def blank(self, samples: int, classes: int) -> Tensor:
        return torch.zeros(samples, classes, dtype=torch.uint8)

    def counts(self, labels: np.ndarray, classes: int) -> npt.NDArray[np.int64]:
        counts: npt.NDArray[np.int64] = labels.sum(0, dtype=np.int64)
        return counts

    def classless(self, classes: int) -> str:
        return "several labels an image and no single class"

    def shared_classes(self, labels: np.ndarray, classes: int) -> tuple[npt.NDArray[np.int64], int]:
        return np.zeros(len(labels), dtype=np.int64), 1

    def kinds(self, labels: np.ndarray, rare: bool) -> npt.NDArray[np.int64]:
        kinds = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
        return np.where(np.bincount(kinds)[kinds] > 1, kinds, kinds.max() + 1) if rare else kinds

    def image_labels(self, labels: Tensor) -> Tensor:
        return labels

    def shown_classes(self, labels: Tensor) -> Tensor:
        return labels.sum(0).nonzero().flatten()

    def label_text(self, label: Label, classes: Sequence[str]) -> str:
        return "|".join(name for name, has in zip(classes, label.tolist(), strict=True) if has) or "none"

    def map_labels(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        return labels.new_zeros(len(labels), classes).index_copy_(1, torch.tensor(places), labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def prediction_text(self, probabilities: Tensor, classes: Sequence[str]) -> str:
        return "|".join(name for name, value in zip(classes, probabilities.tolist(), strict=True) if value > 0.5)

    def answer_text(self, probabilities: Tensor, classes: Sequence[str]) -> str:
        named = zip(classes, probabilities.tolist(), strict=True)
        return ", ".join(f"{name} {value:.3f}" for name, value in named if value > 0.5) or "no label"


MULTILABEL = Multilabel()


def label_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the figures over all labels, without undefined ones, or all NaN if a logit is.

    ``logits`` and ``labels`` (0 and 1) are ``[n, L]``; a label is predicted if its logit is above 0.

    Returns:
        - ``macro_auroc``: mean of :func:`areas`;
        - ``mean_average_precision``: mean of :func:`average_precisions`;
        - ``macro_f1``: mean F1 of the labels that occur;
        - ``exact_match``: share of the images with all labels right (subset accuracy).
    """
    predicted, true = logits > 0, labels.bool()
    f1 = 2 * (predicted & true).sum(0).double() / (predicted.sum(0) + true.sum(0))
    figures = {
        MAIN: float(areas(logits, labels).nanmean()),
        "mean_average_precision": float(average_precisions(logits, labels).nanmean()),
        "macro_f1": float(f1[true.any(0)].mean()),  # NaN without a label that occurs
        "exact_match": float((predicted == true).all(1).double().mean()),
    }
    if bool(logits.isnan().any()):  # no label is predicted then, which would be right for many images
        return dict.fromkeys(figures, math.nan)
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the average precision of every label, fp64 ``[L]``, NaN without positives or with a NaN score.

    Images with equal scores share a threshold.
    """
    result = torch.full((scores.shape[1],), math.nan, dtype=torch.float64)
    for column in range(scores.shape[1]):
        truth = labels[:, column].double()
        if not bool(truth.any()) or bool(scores[:, column].isnan().any()):
            continue
        values, place = torch.unique(scores[:, column], return_inverse=True)
        hits = torch.bincount(place, weights=truth, minlength=len(values)).flip(0)  # from the highest score down
        images = torch.bincount(place, minlength=len(values)).flip(0)
        result[column] = float((hits * hits.cumsum(0) / images.cumsum(0)).sum() / truth.sum())
    return result


def predicts_alike(logits: Tensor) -> bool:
    """Return whether every label is predicted for all images or none."""
    predicted = logits > 0
    return bool((predicted == predicted[:1]).all())
