"""aggregate: plain PyTorch references of the robust means, the distances and the server optimisers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors, Weights
from fedkern.ops._aggregate.reference import normal, pieces
from fedkern.ops._aggregate.rules import RULES, ServerCall, ServerRule
from fedkern.ops._core.memory import place_values

# Relative tolerance: a partial sum of weights this close to half of their sum counts as half, however it was rounded.
HALF = 2.0**-40

# Up to this many vectors the geometric median is found from their pairwise distances alone. They take one pass over
# the vectors with M / 2 differences per element; every iteration on the vectors themselves would take two passes.
MAX_FROM_DISTANCES = 128

# Distances of a vector from the others, in multiples of theirs and of ``smoothing``, beyond which the weighted mean is
# no start.
FAR, FAR_BESIDE_SMOOTHING = 1e4, 1e10


def stack_piece(vectors: Vectors, piece: slice) -> Tensor:
    return vectors[:, piece] if isinstance(vectors, Tensor) else torch.stack([vector[piece] for vector in vectors])


def as_weights(weights: Weights, like: Tensor) -> Tensor:
    return weights.to(like.device, torch.float64) if isinstance(weights, Tensor) else place_values(weights, like.device)


def sorted_mean_reference(vectors: Vectors, low: int, high: int, weights: Weights | None) -> Tensor:
    """Average places [low, high) of every coordinate's ascending order, NaN last."""
    out = torch.empty_like(vectors[0], memory_format=torch.contiguous_format)
    for piece in pieces(len(out)):
        values, order = torch.sort(stack_piece(vectors, piece), dim=0, stable=True)
        middle = values[low:high].double()
        if weights is None:
            out[piece] = middle.sum(0) / (high - low)
            continue
        shares = as_weights(weights, out)[order[low:high]]
        out[piece] = torch.where(shares == 0, 0.0, shares * middle).sum(0) / shares.sum(0)
    return out


def weighted_median_reference(vectors: Vectors, weights: Weights) -> Tensor:
    out = torch.empty_like(vectors[0], memory_format=torch.contiguous_format)
    weight_tensor = as_weights(weights, out)
    half = weight_tensor.cumsum(0)[-1] / 2
    for piece in pieces(len(out)):
        values, order = torch.sort(stack_piece(vectors, piece), dim=0, stable=True)
        below = weight_tensor[order].cumsum(0)
        last = len(values) - 1
        lower = (below < half * (1 - HALF)).sum(0, keepdim=True).clamp_max(last)
        upper = (below <= half * (1 + HALF)).sum(0, keepdim=True).clamp_max(last)
        middle = (values.gather(0, lower).double() + values.gather(0, upper).double())[0] / 2
        out[piece] = torch.where(half > 0, middle, math.nan)
    return out


def subtract_vectors(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x - y``, and 0 between equal infinities: a shared mask of -inf must not separate models."""
    return torch.where(x == y, 0.0, x - y)


def squared_distances_reference(vectors: Vectors) -> Tensor:
    count = len(vectors)
    result = torch.zeros(count, count, dtype=torch.float64, device=vectors[0].device)
    for piece in pieces(vectors[0].shape[0]):
        wide = stack_piece(vectors, piece).double()
        for m in range(1, count):
            result[m, :m] += subtract_vectors(wide[:m], wide[m]).square().sum(1)
    return result + result.t()


def squared_distances_to_reference(vectors: Vectors, point: Tensor) -> Tensor:
    result = torch.zeros(len(vectors), dtype=torch.float64, device=point.device)
    for piece in pieces(len(point)):
        result += subtract_vectors(stack_piece(vectors, piece).double(), point[piece]).square().sum(1)
    return result


def geometric_median_reference(
    vectors: Vectors, weights: Weights | None, iterations: int, tolerance: float, smoothing: float
) -> Tensor:
    """Iterate smoothed Weiszfeld steps (RFA, arXiv 1912.13445, algorithm 2) in fp64."""
    wide = torch.stack([vector.double() for vector in vectors])
    weight_tensor = as_weights([1.0] * len(wide) if weights is None else weights, wide)
    wide, weight_tensor = wide[weight_tensor > 0], weight_tensor[weight_tensor > 0]
    if len(wide) == 1:
        return wide[0].to(vectors[0].dtype)
    shares = weight_tensor / weight_tensor.sum()
    if iterations:
        if len(vectors) <= MAX_FROM_DISTANCES:
            radii = squared_distances_reference(wide).sqrt()
            radii = radii[(radii @ weight_tensor).argmin()]
        else:
            radii = squared_distances_to_reference(wide, weighted_median_reference(wide, weight_tensor)).sqrt()
        scale, shares = start_shares(radii, weight_tensor, smoothing)
    point = (shares[:, None] * wide).sum(0)
    for _ in range(iterations):
        pulls = weight_tensor / squared_distances_to_reference(wide, point).sqrt().clamp_min(smoothing)
        before, point = point, (pulls[:, None] * wide).sum(0) / pulls.sum()
        if float(subtract_vectors(point, before).norm()) <= tolerance * float(scale):
            break
    return point.to(vectors[0].dtype)


def start_shares(radii: Tensor, weights: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the scale of a geometric median, and the shares of its iterations' start.

    The scale is the distance within which more than half of the weight lies, of ``radii`` from a point among most
    vectors. Distant vectors (:data:`FAR` times the scale) start with small shares: 100 iterations may not lead back
    from their mean.
    """
    used = weights > 0
    order = torch.where(used, radii, math.inf).argsort(stable=True)
    below = weights[order].cumsum(0)
    middle = (2 * below <= below[-1]).sum().clamp_max(len(order) - 1)
    scale = radii.gather(0, order.gather(0, middle[None]))[0].clamp_min(smoothing)
    far = torch.where(used, radii, 0.0).max() > (FAR * scale).clamp_min(FAR_BESIDE_SMOOTHING * smoothing)
    pulls = torch.where(used & far, weights / torch.maximum(radii, scale), weights)
    pulls = pulls + torch.where(used, radii - radii, 0.0)  # NaN where the distance is not finite
    return scale, pulls / pulls.sum()


def krum_scores_reference(squared: Tensor, byzantine: int) -> Tensor:
    """Sum each vector's M - byzantine - 2 smallest squared distances to others, ``[M]``."""
    to_others = squared.clone().fill_diagonal_(-1.0).sort(dim=1).values[:, 1:]
    return to_others[:, : squared.shape[0] - byzantine - 2].sum(1)


def server_step_reference(call: ServerCall, out: Tensor) -> tuple[Tensor, Tensor]:
    """Perform one round of a server optimiser in fp64, writing the model to ``out``."""
    global_, vectors, weights, rule, moment1, moment2, _, similarities = call
    weight_tensor = as_weights(weights, global_)
    total = weight_tensor.cumsum(0)[-1]
    count = len(vectors) if similarities else 0
    squares, products = (torch.zeros(count, dtype=torch.float64, device=global_.device) for _ in range(2))
    square = torch.zeros((), dtype=torch.float64, device=global_.device)
    for piece in pieces(len(global_)):
        old = global_[piece].double()
        deltas = subtract_vectors(stack_piece(vectors, piece).double(), old)
        mean = torch.zeros_like(old)
        for weight, delta in zip(weight_tensor, deltas, strict=True):
            # A client of weight zero does not count, whatever it sent.
            mean = torch.where(weight == 0, mean, mean + weight * delta)
        mean = mean / total
        if similarities:
            squares += deltas.square().sum(1)
            products += (deltas * mean).sum(1)
            square += mean.square().sum()
        piece1 = None if moment1 is None else moment1[piece]
        piece2 = None if moment2 is None else moment2[piece]
        out[piece] = old + _update(mean, rule, piece1, piece2)
    scale = (squares * square).sqrt()
    return squares.sqrt(), torch.where(scale == 0, 0.0, products / scale)


def _update(mean: Tensor, rule: ServerRule, moment1: Tensor | None, moment2: Tensor | None) -> Tensor:
    """Update the states in place, and return the change of the global model."""
    name = RULES[rule.rule]
    if moment1 is None:
        return rule.learning_rate * mean
    if name == "momentum":
        momentum = rule.beta1 * moment1.double() + mean
        moment1.copy_(momentum)
        return rule.learning_rate * momentum
    assert moment2 is not None
    direction = rule.beta1 * moment1.double() + (1 - rule.beta1) * mean
    spread, square = moment2.double(), mean * mean
    if name == "adam":
        spread = rule.beta2 * spread + (1 - rule.beta2) * square
    elif name == "yogi":
        spread = spread - (1 - rule.beta2) * square * torch.sign(spread - square)
    else:
        spread = spread + square
    moment1.copy_(direction)
    moment2.copy_(spread)
    return rule.learning_rate * direction / (spread.sqrt() + rule.tau)


def scale_and_noise_reference(
    vectors: Vectors, factors: Tensor, deviation: float, seed: int, offset: int
) -> Sequence[Tensor]:
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
