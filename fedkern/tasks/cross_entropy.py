"""Mean cross-entropy of samples or pixels with the same bits every time."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.errors import UserError


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return PyTorch's mean cross-entropy, a scalar in nats.

    ``logits`` are fp ``[B, C, ...]``, ``targets`` int64 ``[B, ...]`` or probabilities, ``weight`` fp ``[C]``.
    """
    loss = partial(F.cross_entropy, logits, targets, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if targets.shape == logits.shape or not added_in_any_order(logits):
        try:
            return loss()
        except IndexError:  # on the CPU
            check_classes(logits, targets[targets != ignore_index])
            raise
    counted = targets != ignore_index
    counts = counted if weight is None else torch.where(counted, weight[targets.where(counted, 0)], 0.0)
    return loss(reduction="none").sum() / counts.sum()  # losses are 0 where they are not counted


def check_classes(logits: Tensor, targets: Tensor) -> None:
    low, high = int(targets.min()), int(targets.max())
    if high >= logits.shape[1]:
        raise UserError(too_few(logits, high, "the network"))
    if low < 0:
        raise UserError(f"a target is {low}, and classes are numbered from 0: number them so, or leave it out as -100.")


def too_few(logits: Tensor, largest: int, network: str) -> str:
    lack = f"{logits.shape[1]} outputs for {1 + largest} classes, as a target is {largest}"
    return f"{network} has {lack}: give it as many outputs, or number the classes from 0."


def added_in_any_order(logits: Tensor) -> bool:
    """Return whether PyTorch's kernel sums these pixels' losses in a changing order."""
    return logits.is_cuda and logits.dim() > 2


def repeatable(loss: Callable[..., object], outputs: object) -> Callable[..., object]:
    """Replace PyTorch's module by :func:`cross_entropy` if its bits change from call to call."""
    if type(loss) is not nn.CrossEntropyLoss or loss.reduction != "mean":
        return loss
    if not (isinstance(outputs, Tensor) and added_in_any_order(outputs)):
        return loss
    return partial(
        cross_entropy, weight=loss.weight, ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing
    )
