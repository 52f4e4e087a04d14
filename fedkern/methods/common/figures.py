"""Figures of a network on a test set, by task."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.methods.common.multilabel_figures import multilabel
from fedkern.methods.common.registered_metrics import Answers
from fedkern.methods.common.segmentation_figures import segmentation
from fedkern.methods.common.supervised import pair_figures
from fedkern.models import StagedNetwork, object_share
from fedkern.models.precision import computing

MAIN_FIGURES = ("accuracy", "dice", "i2t_r1", "macro_auroc")
"""Main figures, one per task; the metrics of every run include one of them."""


AHEAD = 16
"""Most batches that wait for a thread; more batches would only use memory."""


def is_main(name: str) -> bool:
    """Whether a metric is a main figure, with any prefix: ``ood_accuracy``, ``vote_accuracy``."""
    return name.endswith(MAIN_FIGURES)


def figures(model: nn.Module, data: Any) -> dict[str, float]:
    """Figures for ``data.task``: `classification` (the default), `multilabel`, `segmentation` or `pair_figures`."""
    of_task = {"retrieval": pair_figures, "segmentation": segmentation, "multilabel": multilabel}
    return of_task.get(getattr(data, "task", ""), classification)(model, data)


def answers(model: nn.Module, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """A network's outputs for ``data.batches()`` with the labels, in order.

    If ``data.pool`` is a pool of threads, several batches run at once; the outputs are the same as with one thread.
    """
    pool: ThreadPoolExecutor | None = getattr(data, "pool", None)
    if pool is None:
        for images, labels in data.batches():
            yield model(images), labels
        return
    asked = torch.no_grad()(model)
    ahead: deque[tuple[Future[Tensor], Tensor]] = deque()
    for images, labels in data.batches():
        # Copy this thread's context: the precision of networks is a context variable.
        ahead.append((pool.submit(copy_context().run, asked, images), labels))
        if len(ahead) > AHEAD:
            done, known = ahead.popleft()
            yield done.result(), known
    for done, known in ahead:
        yield done.result(), known


@torch.no_grad()
def classification(model: nn.Module, data: Any) -> dict[str, float]:
    """Returns ``accuracy``, ``loss`` (nats) and ``confidence``, the mean probability of the true class.

    ``data.batches()`` yields (images fp32 [B, C, H, W], labels int64 [B]).  ``data.record(predictions)``, where it
    exists, receives the predicted classes int64 [n] in order (the engine looks for classes never predicted), and
    ``data.keep(logits)``, where it exists and is not None, the logits [n, C] on the CPU in order.
    ``data.metrics``, where it exists, holds further metrics (see `registered_metrics`), whose values are added by name.
    """
    correct, loss, confidence, total = 0, 0.0, 0.0, 0
    predictions, kept = [], []
    keep = getattr(data, "keep", None)
    gathered = Answers(getattr(data, "metrics", ()))
    for said, labels in answers(model, data):
        gathered.add(said, labels)
        logits = said.double()
        log_probability = F.log_softmax(logits, 1).gather(1, labels[:, None])
        predicted = logits.argmax(1)
        correct += int((predicted == labels).sum())
        loss -= float(log_probability.sum())
        confidence += float(log_probability.exp().sum())
        total += labels.numel()
        predictions.append(predicted)
        if keep is not None:
            kept.append(said.cpu())
    if total == 0:
        raise ValueError("data: expected at least one sample, given none")
    record = getattr(data, "record", None)
    if record is not None:
        record(torch.cat(predictions))
    if keep is not None:
        keep(torch.cat(kept))
    found = {"accuracy": correct / total, "loss": loss / total, "confidence": confidence / total}
    return {**found, **gathered.figures()}


@computing("fp32")
def gradcam(network: nn.Module, sets: Mapping[str, Any], count: int) -> dict[str, float]:
    """The share of Grad-CAM mass inside the object, on the first ``count`` images of every test set with masks."""
    metrics: dict[str, float] = {}
    if not count or not isinstance(network, StagedNetwork) or not network.maps:
        return metrics
    for prefix, data in sets.items():
        if prefix != "validation_" and data.split.masks is not None and bool(data.split.masks.any()):
            for name, value in object_share(network, data.masked_batches(count)).items():
                metrics[prefix + name] = float(value)
    return metrics
