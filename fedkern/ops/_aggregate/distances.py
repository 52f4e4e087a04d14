"""aggregate: distances between flat model vectors, Krum and the geometric median."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedkern.ops._aggregate import checks
from fedkern.ops._aggregate import robust_reference as robust
from fedkern.ops._aggregate.checks import Vectors
from fedkern.ops._aggregate.kernels import SHORT, AggregateKernels
from fedkern.ops._aggregate.mean import fake_vector, select
from fedkern.ops._aggregate.plain import PlainAggregate
from fedkern.ops._aggregate.robust_reference import MAX_FROM_DISTANCES, stack_piece, start_shares, subtract_vectors
from fedkern.ops._core import library
from fedkern.ops._core.backend import select_ordinary
from fedkern.ops._core.checks import check_count, check_number, show_value

# Vectors at larger distances than this, in multiples of most vectors', leave too few digits of most vectors' distances
# to a mean: see _products.
_MOST_APART = 1e8

# Elements of all vectors that are held in fp64 at once.
_HELD = 1 << 22

# The largest integer that operators of torch.library take.
_MAX_ITERATIONS = 2**63 - 1

# Up to this many vectors Krum's scores are summed in Python.
FEW = 20


def pairwise_distances(vectors: Vectors) -> Tensor:
    """Compute the Euclidean distances between all pairs of vectors.

    Differences are taken first and squared in fp64. So near-equal vectors have accurate distances, where the formula
    ``|x|^2 + |y|^2 - 2 x.y`` would lose all digits, and equal vectors are at distance 0.

    Args:
        vectors: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, of one dtype and device, any strides.

    Returns:
        ``[M, M]`` in fp64, exactly symmetric, with zeros on the diagonal. NaN in a vector makes its distances to
        others NaN. An infinity makes them infinite; two vectors that hold the same infinity in the same place do not
        differ there. There is no gradient.

    Raises:
        TypeError, ValueError: vectors are of the wrong type, dtype, device or shape, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    kernel: AggregateKernels | None = select_ordinary("aggregate", vectors, torch.is_grad_enabled())
    if kernel is not None:
        return kernel.distances(vectors)
    template, count = checks.check_vectors(vectors)
    checks.check_call("pairwise_distances", vectors, None, template, count)
    return _pairwise(vectors) if checks.eager(vectors) else _pairwise_operator(checks.rows_of(vectors))


def krum(vectors: Vectors, byzantine: int, keep: int = 1) -> Tensor:
    """Select the ``keep`` vectors that lie closest to others, and average them (Krum, arXiv 1703.02757).

    The score of a vector is the sum of its squared distances to the ``M - byzantine - 2`` closest other vectors. The
    vectors with the smallest scores are kept; of equal scores the first. ``keep=1`` is Krum and returns one of the
    vectors unchanged; a larger ``keep`` is Multi-Krum. A vector with NaN, or with an infinity that others do not hold
    in the same place, is infinitely far from them.

    Args:
        vectors: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, of one dtype and device, any strides.
        byzantine: number f of vectors that may be arbitrary, with ``2 f + 2 < M`` (needed by the paper's guarantee).
        keep: number of vectors that are averaged, from 1 to ``M - f``.

    Returns:
        ``[P]`` in the vectors' dtype. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
            On the CPU, also fewer than ``keep`` vectors have a finite score; on CUDA the result is then NaN.
        RuntimeError: a forced backend does not support the call.
    """
    kernel: AggregateKernels | None = select_ordinary("aggregate", vectors, torch.is_grad_enabled())
    if kernel is not None:
        _check_krum(byzantine, keep, checks.count_of(vectors))
        return _krum(kernel, vectors, byzantine, keep)
    template, count = checks.check_vectors(vectors)
    _check_krum(byzantine, keep, count)
    checks.check_call("krum", vectors, None, template, count)
    if not checks.eager(vectors):
        return _krum_operator(checks.rows_of(vectors), byzantine, keep)
    return _krum(select(vectors), vectors, byzantine, keep)


def geometric_median(
    vectors: Vectors,
    weights: Tensor | Sequence[float] | None = None,
    *,
    iterations: int = 100,
    tolerance: float = 1e-8,
    smoothing: float = 1e-6,
) -> Tensor:
    """Find the point with the smallest weighted sum of distances to the vectors (RFA, arXiv 1912.13445).

    Smoothed Weiszfeld iterations start at the weighted mean: ``z <- sum_m b_m x_m / sum_m b_m`` with
    ``b_m = w_m / max(smoothing, |x_m - z|)``. Every such point is a mean of the vectors with shares ``a``. So its
    distances follow from the products ``G`` of the vectors' differences to one of them:
    ``|x_m - z|^2 = G_mm - 2 (G a)_m + a.G a``. Up to 128 vectors are therefore read a few times, whatever the number
    of iterations.

    A vector's pull does not grow with its distance, so a minority of the weight cannot move the result far. The scale
    is the distance within which more than half of the weight lies from the vector of the smallest sum of distances
    (from the coordinate-wise median, for more than 128 vectors). Where a vector is more than 1e4 times the scale and
    1e10 times ``smoothing`` away, iterations start with the shares ``w_m / max(scale, distance)`` and not at the mean.

    Args:
        vectors: M tensors ``[P]``, or one ``[M, P]``; fp32, bf16, fp16 or fp64, of one dtype and device, any strides.
        weights: M finite numbers, at least 0 and not all 0; default: equal. A vector of weight zero has no influence.
        iterations: largest number of iterations; 0 gives the weighted mean.
        tolerance: length of a step, in multiples of the scale, at which the iterations stop.
        smoothing: lower bound of the distances that are divided by, in the vectors' units; greater than 0.

    Returns:
        ``[P]`` in the vectors' dtype. NaN in a vector of positive weight makes the result NaN. So does an infinity,
        unless all vectors hold it in the same place. Where only one vector has a positive weight, that vector is the
        result, whatever it holds. There is no gradient.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value is wrong, or a gradient was asked for.
        RuntimeError: a forced backend does not support the call.
    """
    iterations = min(check_count(iterations, "iterations", 0), _MAX_ITERATIONS)
    check_number(tolerance, "tolerance")
    check_number(smoothing, "smoothing", above=True)
    kernel = None if isinstance(weights, Tensor) else select_ordinary("aggregate", vectors, torch.is_grad_enabled())
    if kernel is not None and kernel.host and checks.count_of(vectors) <= MAX_FROM_DISTANCES:
        count = checks.count_of(vectors)
        numbers = [1.0] * count if weights is None else checks.near_one(kernel.numbers(weights, count))
        return _median_from_distances(kernel, vectors, numbers, iterations, tolerance, smoothing)
    template, count = checks.check_vectors(vectors)
    checks.check_call("geometric_median", vectors, weights, template, count)
    if weights is None:  # made on the device: a copy from the host would wait, and end the capture of a CUDA graph
        weight_tensor = torch.ones(count, dtype=torch.float64, device=template.device)
    else:
        weight_tensor = checks.as_tensor(weights, template, count)
    if not checks.eager(vectors, weights):
        return _geometric_median_operator(checks.rows_of(vectors), weight_tensor, iterations, tolerance, smoothing)
    return _geometric_median(vectors, weight_tensor, iterations, tolerance, smoothing)


def _pairwise(vectors: Vectors) -> Tensor:
    return select(vectors).distances(vectors)


def _check_krum(byzantine: int, keep: int, count: int) -> None:
    check_count(byzantine, "byzantine", 0)
    if 2 * byzantine + 2 >= count:
        raise ValueError(
            f"byzantine must be less than (M - 2) / 2 with M = {count} vectors, not {show_value(byzantine)}"
        )
    check_count(keep, "keep", 1, count - byzantine)


def _run_krum(vectors: list[Tensor], byzantine: int, keep: int) -> Tensor:
    _check_krum(byzantine, keep, len(vectors))
    return _krum(select(vectors), vectors, byzantine, keep)


def _krum(kernel: PlainAggregate, vectors: Vectors, byzantine: int, keep: int) -> Tensor:
    if kernel.host:
        chosen = _krum_weights(kernel.squared_distances(vectors), byzantine, keep)
        if keep == 1 and checks.size_of(vectors) <= SHORT:
            return vectors[chosen.index(1.0)].clone()
        return kernel.weighted_mean(vectors, chosen, None)
    shares = kernel.krum_shares(vectors, byzantine, keep)
    if shares is None:
        scores = _scores(kernel.squared_distances(vectors), byzantine)
        if scores.device.type == "cpu":
            _check_scores(scores.tolist(), keep)
        shares = _shares(scores, keep)
    return _mean(vectors, shares)


def _shares(scores: Tensor, keep: int) -> Tensor:
    """Return 1 for the vectors that Krum keeps, else 0, all NaN if a kept score is infinite.

    On a GPU the host would wait for a value, and end the capture of a CUDA graph.
    """
    ascending, order = scores.sort(stable=True)
    shares = torch.zeros_like(scores).index_fill_(0, order[:keep], 1.0)
    return shares.masked_fill_(ascending[keep - 1] == math.inf, math.nan)


def _scores(squared: Tensor, byzantine: int) -> Tensor:
    """Compute Krum's scores, setting non-finite entries of ``squared`` to infinity."""
    return robust.krum_scores_reference(squared.nan_to_num_(nan=math.inf, posinf=math.inf), byzantine)


def _krum_weights(squared: Tensor, byzantine: int, keep: int) -> list[float]:
    count = len(squared)
    if count > FEW:
        scores = _scores(squared, byzantine).tolist()
    else:  # the calls of torch would take longer than the sums
        scores = []
        for m, row in enumerate(squared.tolist()):
            to_others = sorted([x if x == x else math.inf for x in row[:m] + row[m + 1 :]])
            scores.append(sum(to_others[: count - byzantine - 2]))
    _check_scores(scores, keep)
    kept = {*sorted(range(count), key=scores.__getitem__)[:keep]}
    return [float(m in kept) for m in range(count)]


def _check_scores(scores: list[float], keep: int) -> None:
    """Raise ValueError if fewer than ``keep`` scores are finite: Krum would keep the first of equal scores."""
    finite = sum(score < math.inf for score in scores)
    if finite < keep:
        raise ValueError(
            f"vectors must have {keep} finite score{'s' * (keep > 1)} to choose by, but {finite} of {len(scores)} are: "
            "the other vectors hold NaN or infinities of their own; leave them out"
        )


def _mean(vectors: Vectors, shares: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the weighted mean. NaN shares, which come from NaN in the vectors, give NaN."""
    return select(vectors).weighted_mean(vectors, shares.tolist() if shares.device.type == "cpu" else shares, out)


def _geometric_median(vectors: Vectors, weights: Tensor, iterations: int, tolerance: float, smoothing: float) -> Tensor:
    count, device = len(vectors), vectors[0].device
    if weights.device.type == "cpu":
        checks.check_weights(weights.detach(), count)
    weight_tensor = checks.near_one(weights.to(device, torch.float64))
    kernel = select(vectors)
    if type(kernel) is PlainAggregate:
        return robust.geometric_median_reference(vectors, weight_tensor, iterations, tolerance, smoothing)
    if kernel.host and count <= MAX_FROM_DISTANCES:
        return _median_from_distances(kernel, vectors, weight_tensor.tolist(), iterations, tolerance, smoothing)
    if not iterations:
        return _mean(vectors, weight_tensor / weight_tensor.sum())
    shares = kernel.geometric_shares(vectors, weight_tensor, iterations, tolerance, smoothing)
    if shares is not None:
        return _mean(vectors, shares)
    # On a GPU the host reads no result: all iterations run, and a flag keeps the shares once they have settled.
    used = weight_tensor > 0
    products: Tensor | None = None
    if count <= MAX_FROM_DISTANCES:
        both_used = used & used[:, None]
        distances = torch.where(both_used, kernel.squared_distances(vectors), 0.0).sqrt_()
        middle = torch.where(used, distances @ weight_tensor, math.inf).argmin(0, keepdim=True)
        radii = distances.index_select(0, middle)[0]
        centre = _point(vectors, torch.zeros_like(weight_tensor).scatter_(0, middle, 1.0))
        scale, current = start_shares(radii, weight_tensor, smoothing)
        products = torch.where(both_used, _products(kernel, vectors, centre, radii, scale), 0.0)
    else:
        centre = kernel.weighted_median(vectors, weight_tensor).double()
        scale, current = start_shares(kernel.squared_distances_to(vectors, centre).sqrt_(), weight_tensor, smoothing)
    settled = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(iterations):
        distances = _distances_to_mean(vectors, current, products)
        pulls = torch.where(used, weight_tensor / distances.clamp_min(smoothing), 0.0)
        following = pulls / pulls.sum()
        step = _step(vectors, current, following, products)
        current = torch.where(settled, current, following)
        settled = settled | (step <= tolerance * scale)
        if device.type == "cpu" and bool(settled):
            break
    # A single vector with NaN is at no distance from itself.
    return _mean(vectors, torch.where(used.sum() == 1, used.double(), current))


def _median_from_distances(
    kernel: PlainAggregate,
    vectors: Vectors,
    weights: Sequence[float],
    iterations: int,
    tolerance: float,
    smoothing: float,
) -> Tensor:
    if not iterations:
        return kernel.weighted_mean(vectors, weights, None)
    used = [m for m, weight in enumerate(weights) if weight > 0]
    weight_array = np.array(weights)[used]
    squared = kernel.squared_distances(vectors).numpy()[np.ix_(used, used)]
    with np.errstate(all="ignore"):  # NaN and infinities spread as they do in torch
        distances = np.sqrt(squared)
        middle = int((distances * weight_array).sum(1).argmin())
        radii = distances[middle]
        order = radii.argsort(kind="stable")
        below = weight_array[order].cumsum()
        scale = max(float(radii[order[min(int((2 * below <= below[-1]).sum()), len(order) - 1)]]), smoothing)
        largest = float(radii.max())
        if largest <= _MOST_APART * scale:
            products = (squared[middle, :, None] + squared[middle] - squared) / 2
        else:
            rows = [vectors[m] for m in used]
            parts = torch.from_numpy(radii), torch.tensor(scale, dtype=torch.float64)
            products = _products(kernel, rows, rows[middle], *parts).numpy()
        far = largest > max(robust.FAR * scale, robust.FAR_BESIDE_SMOOTHING * smoothing)
        pulls = weight_array / np.maximum(radii, scale) if far else weight_array
        shares = _weiszfeld(products, weight_array, pulls / pulls.sum(), iterations, tolerance * scale, smoothing)
    all_shares = [0.0] * len(weights)
    for m, share in zip(used, shares.tolist(), strict=True):
        all_shares[m] = share
    return kernel.weighted_mean(vectors, all_shares, None)


def _weiszfeld(
    products: np.ndarray, weights: np.ndarray, shares: np.ndarray, iterations: int, shortest: float, smoothing: float
) -> np.ndarray:
    """Return the shares after the iterations, in NumPy, whose calls cost less than torch's."""
    squares = products.diagonal()
    for _ in range(iterations):
        sums = (products * shares).sum(1)  # not by BLAS, whose bits may depend on its threads
        distances = np.sqrt(np.maximum(squares - 2 * sums + (shares * sums).sum(), 0.0))
        following = weights / np.maximum(distances, smoothing)
        following /= following.sum()
        change, shares = following - shares, following
        if float(((products * change).sum(1) * change).sum()) <= shortest * shortest:
            break
    return shares


def _products(kernel: PlainAggregate, vectors: Vectors, centre: Tensor, radii: Tensor, scale: Tensor) -> Tensor:
    """Return the products ``<x_m - centre, x_k - centre>``, fp64 ``[M, M]``, from distances.

    Vectors are first drawn to ``scale`` at most: beside one 1e8 times as far away no digit of their products would be
    left.
    """
    factors = (scale / radii).clamp_max_(1.0)
    count, size = len(radii), len(centre)
    squared = torch.zeros(count, count, dtype=torch.float64, device=radii.device)
    norms = torch.zeros_like(radii)
    length = max(_HELD // count, 1)
    for begin in range(0, size, length):
        piece = slice(begin, begin + length)
        drawn = subtract_vectors(stack_piece(vectors, piece).double(), centre[piece].double()).mul_(factors[:, None])
        squared += kernel.squared_distances(drawn)
        norms += kernel.squared_norms(drawn)
    return (norms[:, None] + norms - squared) / (2 * factors[:, None] * factors)


def _point(vectors: Vectors, shares: Tensor) -> Tensor:
    return _mean(vectors, shares, torch.empty(vectors[0].shape[0], dtype=torch.float64, device=shares.device))


def _distances_to_mean(vectors: Vectors, shares: Tensor, products: Tensor | None) -> Tensor:
    if products is None:
        return select(vectors).squared_distances_to(vectors, _point(vectors, shares)).sqrt_()
    sums = products @ shares
    return (products.diagonal() - 2 * sums + shares @ sums).clamp_min_(0.0).sqrt_()


def _step(vectors: Vectors, shares: Tensor, following: Tensor, products: Tensor | None) -> Tensor:
    if products is None:
        distance: Tensor = subtract_vectors(_point(vectors, following), _point(vectors, shares)).norm()
        return distance
    change = following - shares
    return (change @ (products @ change)).clamp_min_(0.0).sqrt_()


_pairwise_operator = library.register(
    "pairwise_distances",
    "(Tensor[] vectors) -> Tensor",
    _pairwise,
    fake=lambda vectors: vectors[0].new_empty((len(vectors), len(vectors)), dtype=torch.float64),
)
_krum_operator = library.register(
    "krum", "(Tensor[] vectors, int byzantine, int keep) -> Tensor", _run_krum, fake=fake_vector
)
_geometric_median_operator = library.register(
    "geometric_median",
    "(Tensor[] vectors, Tensor weights, int iterations, float tolerance, float smoothing) -> Tensor",
    _geometric_median,
    fake=fake_vector,
)
