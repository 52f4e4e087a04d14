"""The exponentiated step and the projection on a chi-square ball, against a quadratic-programming solver."""

import math
import time

import numpy as np
import pytest
from scipy.optimize import minimize

from fedkern.methods.common.robust_weights import distance, exponentiated_step, project


def spread(p, c):
    return float((p * p / c).sum())


def cases(count, seed=0):
    """Yield (point, rho, centre): few and many clients, small and huge radii, ties, corners, even points."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(rng.integers(2, 7))
        v = rng.dirichlet(np.full(n, rng.choice([0.1, 1.0, 5.0])))
        if i % 4 == 0:  # ties
            v = np.floor(v * 4) + (i % 8 == 0)
            v = v / v.sum() if v.sum() else np.full(n, 1 / n)
        if i % 50 == 0:
            v = np.eye(n)[rng.integers(n)]
        c = np.full(n, 1 / n) if i % 2 else rng.dirichlet(np.full(n, 4.0)) * 0.9 + 0.1 / n
        yield v, float(rng.choice([1e-9, 1e-6, 1e-3, 0.05, 0.3, 1.0, 3.0])), c, bool(i % 2)


def solve(v, rho, c):
    """Return the ball's nearest point by sequential quadratic programming, scaled so that its radius is 1."""
    scale = np.sqrt(2 * rho * c)
    pull = scale * (v - c)
    size = max(np.linalg.norm(pull), 1e-300)
    start = np.zeros(len(v))
    ball = {"type": "ineq", "fun": lambda u: 1 - u @ u, "jac": lambda u: -2 * u}
    even = {"type": "eq", "fun": lambda u: scale @ u / scale.max(), "jac": lambda u: scale / scale.max()}
    result = minimize(
        lambda u: (0.5 * np.sum((scale * u) ** 2) - pull @ u) / size, start,
        jac=lambda u: (scale * scale * u - pull) / size, bounds=[(low, None) for low in -c / scale],
        constraints=[ball, even], method="SLSQP", options={"ftol": 1e-15, "maxiter": 200},
    )  # fmt: skip
    return c + scale * result.x


@pytest.mark.filterwarnings("ignore:Values in x")
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_projection_is_the_solvers(count):
    for v, rho, c, uniform in cases(count):
        p = project(v, rho, None if uniform else c)
        assert p.min() >= 0
        assert abs(p.sum() - 1) < 1e-12
        assert spread(p, c) <= 2 * rho + 1 + 1e-9
        assert np.abs(p - solve(v, rho, c)).max() < 1e-6 * min(1, math.sqrt(2 * rho))  # relative to the ball


def test_both_ways_agree_around_uniform_weights():
    for v, rho, _, _ in cases(200, seed=1):
        assert np.abs(project(v, rho) - project(v, rho, np.full(len(v), 1 / len(v)))).max() < 1e-10


@pytest.mark.parametrize("uniform", [True, False])
def test_projection_is_idempotent_keeps_order_and_what_lies_inside(uniform):
    for v, rho, c, _ in cases(200, seed=2):
        centre = None if uniform else c
        p = project(v, rho, centre)
        assert np.abs(project(p, rho, centre) - p).max() < 1e-9
        if uniform:
            assert (np.diff(p[np.argsort(v, kind="stable")]) >= -1e-15).all()
        inside = 0.9 * p + 0.1 * (1 / len(v) if uniform else c)
        assert np.array_equal(project(inside, rho, centre), inside)


def test_radius_zero_is_the_centre_and_the_whole_simplex_holds_its_corners():
    c = np.array([0.5, 0.3, 0.2])
    corner = np.array([0.0, 1.0, 0.0])
    assert np.allclose(project(corner, 0.0), 1 / 3, atol=1e-15)
    assert np.array_equal(project(corner, 0.0, c), c)
    assert np.array_equal(project(corner, 1.0), corner)  # (3 - 1) / 2
    assert np.array_equal(project(corner, math.inf), corner)
    assert project(corner, 0.99).max() < 1
    assert distance(corner) == pytest.approx(1.0)


def test_five_clients_and_the_published_radius():
    p = project(np.eye(5)[2], 1.0)  # docs/methods/feddra.md, 7: no client can exceed 0.766
    assert p[2] == pytest.approx((1 + math.sqrt(8)) / 5, abs=1e-12)
    assert np.allclose(np.delete(p, 2), p[0], atol=0)


def test_small_radii_stay_in_the_ball():
    """The released bisection leaves the ball here: rho = 0.05 with 3, 5 and 8 clients."""
    for n in (3, 5, 8):
        p = project(np.eye(n)[0], 0.05)
        assert n * float(p @ p) == pytest.approx(1.1, abs=1e-12)


def test_ten_thousand_clients_take_milliseconds():
    rng = np.random.default_rng(0)
    v, c = rng.dirichlet(np.full(10_000, 0.3)), rng.dirichlet(np.full(10_000, 5.0))
    for centre, limit in ((None, 0.02), (c, 0.2)):  # the best of some on a busy machine; 1 ms and 20 ms on an idle one
        best = min(_seconds(lambda centre=centre: project(v, 0.05, centre)) for _ in range(10))
        assert best < limit
    assert spread(project(v, 0.05, c), c) == pytest.approx(1.1, abs=1e-9)


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# The exponentiated step.


def test_equal_losses_leave_the_weights_alone_and_a_larger_one_raises_its_own():
    w = np.array([0.5, 0.3, 0.2])
    assert np.allclose(exponentiated_step(w, np.full(3, 7.0), 0.5), w, atol=1e-15)
    corner = np.array([0.0, 0.6, 0.4])  # at zero a client starts from a floor, but not where nothing is to be gained
    assert np.array_equal(exponentiated_step(corner, np.full(3, 7.0), 0.5), corner)
    v = exponentiated_step(w, np.array([1.0, 1.0, 3.0]), 0.5)
    assert v[2] > w[2]
    assert v[0] / v[1] == pytest.approx(w[0] / w[1])
    assert v[2] / v[1] == pytest.approx(w[2] / w[1] * math.exp(0.5 * 2))


def test_huge_losses_do_not_overflow():
    v = exponentiated_step(np.full(3, 1 / 3), np.array([1e6, 0.0, 1e6]), 10.0)
    assert np.allclose(v, [0.5, 0, 0.5])


def test_a_client_at_zero_comes_back():
    w = np.array([0.0, 0.6, 0.4])
    for _ in range(20):
        w = project(exponentiated_step(w, np.array([3.0, 1.0, 1.0]), 0.5), 1.0)
    assert w[0] > 0.9


def test_absent_clients_keep_their_weight():
    w = np.array([0.4, 0.3, 0.2, 0.1])
    v = exponentiated_step(w, np.array([np.nan, 1.0, np.nan, 5.0]), 1.0)
    assert v[0] == pytest.approx(0.4)
    assert v[2] == pytest.approx(0.2)
    assert v[3] > w[3]
    assert np.allclose(exponentiated_step(w, np.full(4, np.nan), 1.0), w)
