"""Classification: one class of every sample.

Figures beyond the accuracy are by class, areas under ROC curves, and calibration. Definitions are scikit-learn's, whose
import would take longer than the rest of a short run's start.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedkern.tasks.cross_entropy import check_classes, cross_entropy
from fedkern.tasks.figure_names import Answers
from fedkern.tasks.protocols import JudgedSet, Members, SampleSet, TaskBatch
from fedkern.tasks.task import Constant, Figures, Rows, Task, check_shape, iterate_outputs, mean, to_dict

BINS = 15
"""Bins of the expected calibration error, as in the paper that proposed the figure for networks."""


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the counts int64 [C, C] by true class (row) and predicted class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def recalls(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the recall of every class, fp64 [C], NaN without samples."""
    right = torch.bincount(labels[labels == predicted], minlength=classes).double()
    return right / torch.bincount(labels, minlength=classes)  # 0 / 0 is NaN


def macro_f1(labels: Tensor, predicted: Tensor, classes: int) -> float:
    """Return the mean F1 of classes with samples."""
    right = torch.bincount(labels[labels == predicted], minlength=classes).double()
    true = torch.bincount(labels, minlength=classes)
    either = true + torch.bincount(predicted, minlength=classes)
    return float((2 * right / either)[true > 0].mean())


def areas(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve of every label, fp64 ``[L]``.

    NaN if all images have the label, or none, or if a score is NaN. Ties count one half. ``scores`` and ``labels`` are
    ``[n, L]``.
    """
    result = torch.full((scores.shape[1],), math.nan, dtype=torch.float64)
    for column in range(scores.shape[1]):
        has_label = labels[:, column].bool()
        positive, negative = int(has_label.sum()), int((~has_label).sum())
        if positive and negative and not bool(scores[:, column].isnan().any()):
            ranks = mean_ranks(scores[:, column])
            result[column] = (float(ranks[has_label].sum()) - positive * (positive + 1) / 2) / (positive * negative)
    return result


def roc_areas(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve of every class against all others, fp64 [C]."""
    return areas(scores, one_hot(labels, scores.shape[1]))


def macro_auc(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of :func:`roc_areas`, NaN with fewer than two classes."""
    areas = [area for area in roc_areas(scores, labels).tolist() if not math.isnan(area)]
    return sum(areas) / len(areas) if areas else math.nan


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1].

    Mean distance of confidence (the largest probability) and accuracy over ``bins`` of equal width, (0, 1/B] and so on,
    by their samples (Guo et al., ICML 2017, arXiv 1706.04599, equations 2 and 3). Not in scikit-learn.
    """
    confidence, predicted = probabilities.max(1)
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    distance = confidence - (predicted == labels).double()
    return float(torch.bincount(place, weights=distance, minlength=bins).abs().sum()) / len(labels)


def mean_ranks(values: Tensor) -> Tensor:
    """Return the ranks from 1, fp64 ``[n]``, where equal values share their mean rank."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = ((2 * counts.cumsum(0) - counts + 1).double() / 2)[group]
    return ranks


MATRIX = 1000
"""Most classes of a kept confusion matrix; larger ones cannot be drawn."""


class Classification(Task):
    """Classification by softmax.

    ``ignored`` is the class of samples that do not count.
    """

    name, main, sampled = "classification", "accuracy", "accuracy"
    pictures = ("gradcam",)
    offers = frozenset({"loss", "criterion", "classes", "images", "features"})
    concurrent = True
    ignored: ClassVar[int] = -100
    takes_logits = plain_loss = True

    def read_targets(self, targets: object) -> object:
        if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.dtype == torch.bool):
            return targets.long()
        return targets

    def criterion(self, outputs: Tensor, batch: TaskBatch) -> Tensor:
        return cross_entropy(outputs, batch.targets)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        """Return ``accuracy``, ``loss`` (nats) and ``confidence``, the mean probability of the true class.

        Predictions are int64 [n], and kept answers are logits [n, C] on the CPU. Registered metrics in ``data.metrics``
        are added.
        """
        return self.figures_of(iterate_outputs(model, data), data)

    def figures_of(
        self, pairs: Iterable[tuple[Tensor, Tensor]], data: object, client: int | None = None
    ) -> dict[str, float]:
        """Return the figures of pairs of logits ``[B, C]`` and classes ``[B]``, of a client's network if given."""
        correct, loss, confidence, total = 0, 0.0, 0.0, 0
        predictions, all_outputs = [], []
        keep = getattr(data, "keep", None)
        gathered = Answers(getattr(data, "metrics", ()))
        for outputs, labels in pairs:
            predictions.append(outputs.argmax(1))
            if keep is not None:
                all_outputs.append(outputs.cpu())
            if not bool((counted := labels != self.ignored).all()):
                outputs, labels = outputs[counted], labels[counted]
            gathered.add(outputs, labels)
            logits = outputs.double()
            try:
                log_probability = F.log_softmax(logits, 1).gather(1, labels[:, None])
            except RuntimeError:  # on the CPU
                check_classes(logits, labels)
                raise
            correct += int((logits.argmax(1) == labels).sum())
            loss -= float(log_probability.sum())
            confidence += float(log_probability.exp().sum())
            total += labels.numel()
        if total == 0:
            raise ValueError("data: expected at least one sample, given none")
        if record := getattr(data, "record", None):
            record(torch.cat(predictions))
        if keep is not None:
            keep(torch.cat(all_outputs), **({} if client is None else {"client": client}))
        figures = {"accuracy": correct / total, "loss": loss / total, "confidence": confidence / total}
        return {**figures, **gathered.figures()}

    @torch.no_grad()
    def member_figures(self, model: Members, data: JudgedSet) -> dict[str, float]:
        clients = len([*model.members])
        correct, loss, confidence = (torch.zeros(clients, dtype=torch.float64) for _ in range(3))
        total = 0
        keep, all_outputs = getattr(data, "keep", None), []
        for batch in data.batches():
            outputs, labels = model.logits(batch.inputs), batch.targets
            if keep is not None:
                all_outputs.append(outputs.cpu())
            counted = labels != self.ignored
            logits, labels = outputs[:, counted].double(), labels[counted]
            truth = F.log_softmax(logits, 2).gather(2, labels.expand(clients, -1)[..., None])[..., 0]
            correct += (logits.argmax(2) == labels).sum(1).cpu()
            loss -= truth.sum(1).cpu()
            confidence += truth.exp().sum(1).cpu()
            total += labels.numel()
        if keep is not None:
            for k, client_outputs in enumerate(torch.cat(all_outputs, 1)):
                keep(client_outputs, client=k)
        accuracy = correct / total
        return {
            "accuracy": float(accuracy.mean()),
            "lowest_accuracy": float(accuracy.min()),
            "highest_accuracy": float(accuracy.max()),
            "loss": float(loss.mean()) / total,
            "confidence": float(confidence.mean()) / total,
        }

    def final(self, data: SampleSet, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        labels = data.labels.cpu().long()
        counted = labels != self.ignored
        labels, outputs = labels[counted], [logits[counted] for logits in outputs]
        summaries = [_summarise_logits(logits, labels) for logits in outputs]
        metrics = {
            figure: sum(row[figure] for row, _ in summaries) / len(summaries)
            for figure in summaries[0][0]
            if all(figure in row for row, _ in summaries)
        }
        tables = [table for _, table in summaries]
        per_class = {
            figure: to_dict(mean([table[figure] for table in tables]), names)
            for figure in tables[0]
            if all(figure in table for table in tables)
        }
        if len(names) > MATRIX:
            return Figures(metrics, per_class)
        matrices = [confusion(labels, logits.double().argmax(1), len(names)) for logits in outputs]
        return Figures(metrics, per_class, torch.stack(matrices).sum(0))

    def parts(self, output: Tensor, labels: Tensor, cases: Tensor | None) -> Tensor:
        right = (output.double().argmax(1) == labels).double()
        return torch.where((labels < 0) | (labels == self.ignored), math.nan, right)[:, None]

    def kept_shape(self, data: SampleSet, classes: int) -> tuple[int, ...]:
        return len(data.labels), classes

    def constant(self, data: SampleSet, classes: Sequence[str]) -> Constant | None:
        labels = data.labels.cpu()
        labels = labels[labels != self.ignored]
        counts = torch.bincount(labels, minlength=len(classes))
        top, present = int(counts.max()), int((counts > 0).sum())
        if present < 2:
            return None
        name = classes[int(counts.argmax())] if int((counts == top).sum()) == 1 else ""
        return Constant({"accuracy": top / len(labels), "balanced_accuracy": 1 / present}, name)

    def chance(
        self, data: SampleSet | None, classes: int, *, counts: Rows | None = None, candidates: float = 0.0
    ) -> float | None:
        if self.main != self.__class__.main:
            return None
        if counts is None and data is not None:
            counts = np.bincount(data.labels[data.labels != self.ignored].numpy())
        return float(counts.max() / counts.sum()) if counts is not None and counts.sum() else None


class Unlabelled(Classification):
    """Classification of images without known classes: labels are -1, and the images are no test set."""

    name = "unlabelled"

    def check_labels(self, labels: Tensor, samples: int, sides: Sequence[int]) -> None:
        check_shape(labels, torch.int64, (samples,))


CLASSIFICATION = Classification()
UNLABELLED = Unlabelled()


def _summarise_logits(logits: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return a network's figures from its logits [n, C], and every class's, fp64 [C]."""
    logits = logits.double()
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    class_recalls = recalls(labels, predicted, classes)
    figures = {"balanced_accuracy": float(class_recalls.nanmean()), "macro_f1": macro_f1(labels, predicted, classes)}
    table = {"recall": class_recalls}
    probabilities = logits.softmax(1)
    if bool(probabilities.isfinite().all()):  # a logit may overflow, though every parameter is finite
        areas = roc_areas(probabilities, labels)
        if not math.isnan(area := float(areas.nanmean())):
            figures["auroc"], table["auroc"] = area, areas
        figures["ece"] = calibration_error(probabilities, labels)
    return figures, table
