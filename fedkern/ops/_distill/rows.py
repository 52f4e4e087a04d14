"""Rows of logits: their shapes and the reductions of their losses."""

import math

import torch
from torch import Tensor

# Reductions of row losses to the result. Schemas of torch.library carry the numbers.
REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2}
NONE, SUM, BATCHMEAN = 0, 1, 2

# How ensemble_kl combines its teachers: a mixture of probabilities, a mixture of logits, or a mean of divergences.
PROBS, LOGITS, MEAN = 0, 1, 2

# Most dimensions of logits [B, C, *positions] that the core takes.
MAX_DIMS = 9


def row_shape(logits: Tensor) -> torch.Size:
    shape = logits.shape
    return shape[:1] + shape[2:]


def row_count(logits: Tensor) -> int:
    return math.prod(row_shape(logits))


def mean_scale(logits: Tensor, reduction: int) -> float:
    count = logits.numel()
    return logits.shape[1] / count if reduction == BATCHMEAN and count else 1.0
