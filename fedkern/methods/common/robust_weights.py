"""Client weights for the worst mixture of clients: exponentiated gradient and projection on a chi-square ball.

The set of weights is the ball around the centre c, uniform or by samples (docs/methods/feddra.md, section 7):

    Q = { p : p >= 0, sum p = 1, sum_k (p_k - c_k)^2 / c_k <= 2 rho },    for c = 1/N:  N sum p^2 <= 2 rho + 1

Around 1/N and from rho = (N - 1) / 2 on, Q is the whole simplex, as in agnostic federated learning (Mohri et al., 2019,
arXiv 1902.00146). All computations are in float64.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]
FLOOR = 1e-3
"""Least weight from which the exponentiated step starts, relative to the mean weight.  The projection may set a weight
to exactly zero, which a multiplicative step could never raise again."""
SHARPNESS = 1e-12
"""Relative tolerance of the bisection around a centre other than uniform."""


def exponentiated_step(weights: Weights, losses: Weights, eta: float) -> Weights:
    """Return ``v_k = w_k exp(eta l_k)``, normalised: the ascent step of the mixture's loss in the entropy's geometry.

    A client with an unknown loss (NaN) keeps its weight, and equal losses keep all weights, even zeros.
    """
    judged = ~np.isnan(losses)
    result = weights.copy()
    if judged.any() and np.ptp(losses[judged]) > 0:
        mass = float(weights[judged].sum())
        shift = eta * (losses[judged] - losses[judged].max())
        grown = np.maximum(weights[judged], FLOOR / len(weights)) * np.exp(shift)
        result[judged] = grown * (mass / grown.sum() if mass > 0 else FLOOR / len(weights) / grown.sum())
    return result / float(result.sum())


def project(point: Weights, rho: float, centre: Weights | None = None) -> Weights:
    """Return the nearest point of the ball Q around ``centre`` (None: uniform) in the Euclidean distance.

    Around uniform weights in closed form (docs/methods/feddra.md, section 7), around other centres by bisection to
    1e-12.
    """
    n, bound = len(point), 2 * rho + 1
    if (n * float(point @ point) if centre is None else _spread(point, centre)) <= bound:
        return point.copy()
    if centre is None:
        return _around_uniform(point, bound / n)
    return centre.copy() if rho == 0 else _around(point, centre, bound)


def distance(weights: Weights, centre: Weights | None = None) -> float:
    """Return the smallest rho whose ball contains the weights."""
    c = np.full(len(weights), 1 / len(weights)) if centre is None else centre
    return (_spread(weights, c) - 1) / 2


def _spread(p: Weights, c: Weights) -> float:
    """Return ``sum p^2 / c``, which is 1 at the centre."""
    return float((p * p / c).sum())


def _around_uniform(v: Weights, bound: float) -> Weights:
    """Project a point outside of ``sum p^2 <= bound``.

    The m largest entries become ``1/m + sqrt(R / V) (v_i - mean)`` with ``R = bound - 1/m`` and their scatter V, for
    the largest m that keeps all of them at least 0, and the others 0.
    """
    n = len(v)
    order = np.argsort(-v, kind="stable")
    high = v[order] - 1 / n  # centred near zero, so that the scatter of close values keeps its precision
    m = np.arange(1, n + 1)
    mean = np.cumsum(high) / m
    scatter = np.cumsum(high * high) - m * mean * mean
    room = bound - 1 / m
    with np.errstate(divide="ignore", invalid="ignore"):
        lowest = 1 / m + np.sqrt(np.maximum(room, 0) / scatter) * (high - mean)
    fits = (room >= 0) & (scatter > 0) & (lowest >= 0)
    p = np.zeros(n)
    # Without scatter (only ties are left) the nearest point is uniform on as many tied entries as the bound needs.
    count = int(m[fits][-1]) if fits.any() else min(n, math.ceil(1 / bound - 1e-12))
    if not fits.any():
        p[order[:count]] = 1 / count
        return p
    centred = high[:count] - high[:count].mean()
    p[order[:count]] = np.maximum(1 / count + math.sqrt(room[count - 1] / float(centred @ centred)) * centred, 0)
    return p / float(p.sum())


def _around(v: Weights, c: Weights, bound: float) -> Weights:
    """Project a point outside of ``sum p^2 / c <= bound``, with multiplier ``(1 - t) / t``."""
    order = np.argsort(-v, kind="stable")
    v_sorted, c_sorted = v[order], c[order]

    def solve(t: float) -> Weights:
        # p_k = max(0, a_k (v_k - nu)) with a_k = c_k t / (c_k t + 1 - t); nu makes the sum 1.
        a = c_sorted * t / (c_sorted * t + (1 - t))
        nu = (np.cumsum(a * v_sorted) - 1) / np.cumsum(a)
        count = np.flatnonzero(v_sorted > nu)[-1] + 1
        solution: Weights = np.maximum(a * (v_sorted - nu[count - 1]), 0) * (np.arange(len(v)) < count)
        return solution

    low, high = 0.0, 1.0  # t = 0 is the centre, t = 1 the point itself
    while high - low > SHARPNESS * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _spread(solve(middle), c_sorted) > bound:
            high = middle
        else:
            low = middle
    p = np.empty(len(v))
    p[order] = solve(low) if low > 0 else c_sorted
    return p / float(p.sum())
