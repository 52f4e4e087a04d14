"""aggregate: references of the robust means, the distances and the server optimisers, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors, Weights
from fedkern.ops._aggregate.philox import normal
from fedkern.ops._aggregate.reference import pieces
from fedkern.ops._aggregate.rules import RULES, ServerRule
from fedkern.ops._core.memory import placed

# Relative tolerance: a partial sum of weights this close to half of their sum counts as half, however it was rounded.
HALF = 2.0**-40


def stack(vectors: Vectors, piece: slice) -> Tensor:
    """One piece of all vectors, ``[M, n]``."""
    return vectors[:, piece] if isinstance(vectors, Tensor) else torch.stack([vector[piece] for vector in vectors])


def as_weights(weights: Weights, like: Tensor) -> Tensor:
    """fp64 ``[M]`` on the device of ``like``."""
    if isinstance(weights, Tensor):
        return weights.to(like.device, torch.float64)
    return placed(weights, like.device)


def sorted_mean_reference(vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
    """The (weighted) mean of the values at places [low, high) of every coordinate's ascending order, NaN last."""
    out = torch.empty_like(vectors[0], memory_format=torch.contiguous_format)
    for piece in pieces(len(out)):
        values, order = torch.sort(stack(vectors, piece), dim=0, stable=True)
        kept = values[low:high].double()
        if weights is None:
            out[piece] = kept.sum(0) / (high - low)
            continue
        shares = as_weights(weights, out)[order[low:high]]
        out[piece] = torch.where(shares == 0, 0.0, shares * kept).sum(0) / shares.sum(0)
    return out


def weighted_median_reference(vectors: Vectors, weights: Weights) -> Tensor:
    """The mean of the lower and the upper weighted median; see :func:`fedkern.ops.median`."""
    out = torch.empty_like(vectors[0], memory_format=torch.contiguous_format)
    given = as_weights(weights, out)
    half = given.cumsum(0)[-1] / 2
    for piece in pieces(len(out)):
        values, order = torch.sort(stack(vectors, piece), dim=0, stable=True)
        below = given[order].cumsum(0)
        last = len(values) - 1
        lower = (below < half * (1 - HALF)).sum(0, keepdim=True).clamp_max(last)
        upper = (below <= half * (1 + HALF)).sum(0, keepdim=True).clamp_max(last)
        middle = (values.gather(0, lower).double() + values.gather(0, upper).double())[0] / 2
        out[piece] = torch.where(half > 0, middle, math.nan)
    return out


def squared_distances_reference(vectors: Vectors) -> Tensor:
    """fp64 ``[M, M]``: squared distances between all pairs of vectors."""
    count = len(vectors)
    result = torch.zeros(count, count, dtype=torch.float64, device=vectors[0].device)
    for piece in pieces(vectors[0].shape[0]):
        wide = stack(vectors, piece).double()
        for m in range(1, count):
            result[m, :m] += (wide[:m] - wide[m]).square().sum(1)
    return result + result.t()


def squared_distances_to_reference(vectors: Vectors, point: Tensor) -> Tensor:
    """fp64 ``[M]``: squared distances to ``point [P]``."""
    result = torch.zeros(len(vectors), dtype=torch.float64, device=point.device)
    for piece in pieces(len(point)):
        result += (stack(vectors, piece).double() - point[piece]).square().sum(1)
    return result


def squared_norms_reference(vectors: Vectors) -> Tensor:
    """fp64 ``[M]``: squared Euclidean norms."""
    return squared_distances_to_reference(vectors, torch.zeros_like(vectors[0], dtype=torch.float64))


def geometric_median_reference(
    vectors: Vectors, weights: Weights | None, iterations: int, tolerance: float, smoothing: float
) -> Tensor:
    """Smoothed Weiszfeld iterations (RFA, arXiv 1912.13445, algorithm 2) on the vectors themselves, in fp64."""
    wide = [vector.double() for vector in vectors]
    given = as_weights([1.0] * len(wide) if weights is None else weights, wide[0])
    shares = given / given.sum()

    def mean(of: Tensor) -> Tensor:
        terms = [torch.where(share == 0, 0.0, share * vector) for share, vector in zip(of, wide, strict=True)]
        return torch.stack(terms).sum(0) / of.sum()

    point = mean(shares)
    before = math.inf
    for _ in range(iterations):
        distances = torch.stack([(vector - point).norm() for vector in wide])
        inner = torch.where(shares == 0, 0.0, shares / distances.clamp_min(smoothing))
        objective = float(torch.where(shares == 0, 0.0, shares * distances).sum())
        if abs(before - objective) <= tolerance * objective:
            break
        before, point = objective, mean(inner)
    return point.to(vectors[0].dtype)


def krum_scores_reference(squared: Tensor, byzantine: int) -> Tensor:
    """``[M]``: for every vector the sum of its M - byzantine - 2 smallest squared distances to others."""
    others = squared.clone().fill_diagonal_(-1.0).sort(dim=1).values[:, 1:]
    return others[:, : squared.shape[0] - byzantine - 2].sum(1)


def server_step_reference(
    global_: Tensor,
    vectors: Vectors,
    weights: Weights,
    rule: ServerRule,
    first: Tensor | None,
    second: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """One round of FedAvg, FedAvgM, FedAdam, FedYogi or FedAdagrad in fp64; see :func:`fedkern.ops.server_step`."""
    given = as_weights(weights, global_)
    total = given.cumsum(0)[-1]
    count = len(vectors)
    squares, products = (torch.zeros(count, dtype=torch.float64, device=global_.device) for _ in range(2))
    square = torch.zeros((), dtype=torch.float64, device=global_.device)
    for piece in pieces(len(global_)):
        old = global_[piece].double()
        deltas = stack(vectors, piece).double() - old
        mean = torch.zeros_like(old)
        for weight, delta in zip(given, deltas, strict=True):
            # A client of weight zero does not count, whatever it sent.
            mean = torch.where(weight == 0, mean, mean + weight * delta)
        mean = mean / total
        squares += deltas.square().sum(1)
        products += (deltas * mean).sum(1)
        square += mean.square().sum()
        one = None if first is None else first[piece]
        two = None if second is None else second[piece]
        out[piece] = old + _update(mean, rule, one, two)
    scale = (squares * square).sqrt()
    cosines = torch.where(scale == 0, 0.0, products / scale)
    return squares.sqrt(), cosines


def _update(mean: Tensor, rule: ServerRule, first: Tensor | None, second: Tensor | None) -> Tensor:
    """Returns the change of the global model; updates the states in place."""
    name = RULES[rule.rule]
    if first is None:
        return rule.learning_rate * mean
    if name == "momentum":
        momentum = rule.beta1 * first.double() + mean
        first.copy_(momentum)
        return rule.learning_rate * momentum
    assert second is not None
    one = rule.beta1 * first.double() + (1 - rule.beta1) * mean
    two, square = second.double(), mean * mean
    if name == "adam":
        two = rule.beta2 * two + (1 - rule.beta2) * square
    elif name == "yogi":
        two = two - (1 - rule.beta2) * square * torch.sign(two - square)
    else:
        two = two + square
    first.copy_(one)
    second.copy_(two)
    return rule.learning_rate * one / (two.sqrt() + rule.tau)


def scale_and_noise_reference(
    vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int
) -> Sequence[Tensor]:
    """M tensors ``[P]``: every vector times its factor, plus normal noise of standard deviation ``deviation``."""
    rows = []
    for m, (vector, factor) in enumerate(zip(vectors, factors, strict=True)):
        row = torch.empty_like(vector, memory_format=torch.contiguous_format)
        for piece in pieces(len(row)):
            wide = vector[piece].double() * factor
            if deviation:
                place = (offset + m * len(row) + piece.start) % (1 << 64)
                wide += deviation * normal(piece.stop - piece.start, seed, place, row.device)
            row[piece] = wide
        rows.append(row)
    return rows
