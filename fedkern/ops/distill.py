"""distill: distillation losses over logits, class axis 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _rows(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    if math.isinf(temperature):
        return 0.5 * (teacher - student).var(1, unbiased=False)
    log_p = torch.log_softmax(teacher / temperature, 1)
    log_q = torch.log_softmax(student / temperature, 1)
    p = log_p.exp()
    return temperature**2 * torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(1)


def _reduce(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        rows = torch.where(weight == 0, torch.zeros_like(rows), rows * weight)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / max(rows.numel(), 1)


def kl_div(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    return _reduce(_rows(teacher, student, temperature), weight, reduction)


def dual_kl(
    a: Tensor,
    b: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    direction: str = "teacher",
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    if direction == "teacher":
        rows = _rows(teacher, a, temperature) + _rows(teacher, b, temperature)
    else:
        rows = _rows(a, teacher, temperature) + _rows(b, teacher, temperature)
    return _reduce(rows, weight, reduction)


def entropy(logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
    log_p = torch.log_softmax(logits, 1)
    return _reduce(-(log_p.exp() * log_p).sum(1), None, reduction)
