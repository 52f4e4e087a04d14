"""Classification: one class of every sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.tasks import classification_figures as of_classes
from fedkern.tasks.base import Constant, Figures, Task, answers, mean, named
from fedkern.tasks.registered_metrics import Answers

MATRIX = 1000
"""Most classes of a confusion matrix that is kept: a larger one cannot be drawn."""


class Classification(Task):
    """One class of every sample, by softmax."""

    name, main, sampled = "classification", "accuracy", "accuracy"
    pictures = ("gradcam",)
    offers = frozenset({"loss", "criterion", "classes", "images", "features"})
    concurrent = True

    def criterion(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    @torch.no_grad()
    def figures(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Returns ``accuracy``, ``loss`` (nats) and ``confidence``, the mean probability of the true class.

        Predictions are int64 [n], and the answers kept are the logits [n, C] on the CPU.  ``data.metrics``, where it
        exists, holds further metrics (see `registered_metrics`), whose values are added by name.
        """
        correct, loss, confidence, total = 0, 0.0, 0.0, 0
        predictions, all_outputs = [], []
        keep = getattr(data, "keep", None)
        gathered = Answers(getattr(data, "metrics", ()))
        for outputs, labels in answers(model, data):
            gathered.add(outputs, labels)
            logits = outputs.double()
            log_probability = F.log_softmax(logits, 1).gather(1, labels[:, None])
            predicted = logits.argmax(1)
            correct += int((predicted == labels).sum())
            loss -= float(log_probability.sum())
            confidence += float(log_probability.exp().sum())
            total += labels.numel()
            predictions.append(predicted)
            if keep is not None:
                all_outputs.append(outputs.cpu())
        if total == 0:
            raise ValueError("data: expected at least one sample, given none")
        record = getattr(data, "record", None)
        if record is not None:
            record(torch.cat(predictions))
        if keep is not None:
            keep(torch.cat(all_outputs))
        figures = {"accuracy": correct / total, "loss": loss / total, "confidence": confidence / total}
        return {**figures, **gathered.figures()}

    @torch.no_grad()
    def member_figures(self, model: Any, data: Any) -> dict[str, float]:
        clients = len(model.members)
        correct, loss, confidence = (torch.zeros(clients, dtype=torch.float64) for _ in range(3))
        total = 0
        keep, all_outputs = getattr(data, "keep", None), []
        for batch in data.batches():
            outputs, labels = model.logits(batch.inputs), batch.targets
            if keep is not None:
                all_outputs.append(outputs.cpu())
            logits = outputs.double()
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

    def final(self, data: Any, outputs: Sequence[Tensor], names: Sequence[str]) -> Figures:
        labels = data.labels.cpu().long()
        each = [_classified(logits, labels) for logits in outputs]
        metrics = {
            figure: sum(one[figure] for one, _ in each) / len(each)
            for figure in each[0][0]
            if all(figure in one for one, _ in each)
        }
        tables = [table for _, table in each]
        per_class = {
            figure: named(mean([table[figure] for table in tables]), names)
            for figure in tables[0]
            if all(figure in table for table in tables)
        }
        matrix = None
        if len(names) <= MATRIX:
            matrices = [of_classes.confusion(labels, logits.double().argmax(1), len(names)) for logits in outputs]
            matrix = torch.stack(matrices).sum(0)
        return Figures(metrics, per_class, matrix)

    def parts(self, output: Tensor, labels: Tensor, cases: Tensor | None) -> Tensor:
        right = (output.double().argmax(1) == labels).double()
        return torch.where(labels < 0, math.nan, right)[:, None]

    def constant(self, data: Any, classes: Sequence[str]) -> Constant | None:
        labels = data.labels.cpu()
        counts = torch.bincount(labels, minlength=len(classes))
        top, present = int(counts.max()), int((counts > 0).sum())
        if present < 2:
            return None
        name = classes[int(counts.argmax())] if int((counts == top).sum()) == 1 else ""
        return Constant({"accuracy": top / len(labels), "balanced_accuracy": 1 / present}, name)

    def chance(
        self, data: Any, classes: int, *, counts: npt.NDArray[np.int64] | None = None, candidates: float = 0.0
    ) -> float | None:
        if counts is None and data is not None:
            counts = np.bincount(data.labels.numpy())
        return float(counts.max() / counts.sum()) if counts is not None and counts.sum() else None


CLASSIFICATION = Classification()


def _classified(logits: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One network's figures from its logits [n, C], and those of every class, fp64 [C]."""
    logits = logits.double()
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    recalls = of_classes.recalls(labels, predicted, classes)
    figures = {
        "balanced_accuracy": float(recalls.nanmean()),
        "macro_f1": of_classes.macro_f1(labels, predicted, classes),
    }
    table = {"recall": recalls}
    probabilities = logits.softmax(1)
    if bool(probabilities.isfinite().all()):  # a logit may overflow, though every parameter is finite
        areas = of_classes.roc_areas(probabilities, labels)
        if not math.isnan(area := float(areas.nanmean())):
            figures["auroc"], table["auroc"] = area, areas
        figures["ece"] = of_classes.calibration_error(probabilities, labels)
    return figures, table
