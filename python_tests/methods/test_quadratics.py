"""Fixed points of FedAvg and FedProx by formula, and the optimum of SCAFFOLD and FedDyn, in runs of linear regression.

Client k has the loss |X_k theta - y_k|^2 / n_k, with curvature A_k = 2 X_k^T X_k / n_k and optimum a_k.  With E steps
of plain gradient descent at rate eta from theta, and FedProx's weight mu (0 for FedAvg), a client's result is

    theta + Q_k A_k (a_k - theta),   Q_k = (I - (I - eta H_k)^E) H_k^-1,   H_k = A_k + mu I

so that the mean with weights w_k stays where ``sum_k w_k Q_k A_k (a_k - theta) = 0``.  The optimum of the weighted
objective has the same equation without Q_k.  For mu = 0, Q_k A_k is I - (I - eta A_k)^E.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedkern

SIZES, DIMENSION = (4, 12, 8, 6), 3
STEPS, RATE = 5, 0.1


@pytest.fixture(scope="module")
def clients():
    """Return the inputs fp64 [n, 3] and targets [n, 1] of clients that differ in curvature and in optimum."""
    rng = np.random.default_rng(2)
    pairs = []
    for n in SIZES:
        x = rng.normal(size=(n, DIMENSION)) * rng.uniform(0.7, 1.5, DIMENSION)
        y = x @ rng.normal(size=(DIMENSION, 1)) * 2 + 0.1 * rng.normal(size=(n, 1))
        pairs.append((x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)))
    return pairs


def weights(weighting):
    sizes = np.array(SIZES) if weighting == "samples" else np.ones(len(SIZES))
    return sizes / sizes.sum()


def curvature(x):
    return 2 * x.T @ x / len(x)


def fixed_point(clients, weighting, mu=0.0):
    """Return the fixed point of averaging the clients' results."""
    identity, system, pull = np.eye(DIMENSION), 0.0, 0.0
    for w, (x, y) in zip(weights(weighting), clients, strict=True):
        h = curvature(x) + mu * identity
        q = (identity - np.linalg.matrix_power(identity - RATE * h, STEPS)) @ np.linalg.inv(h)
        system, pull = system + w * q @ curvature(x), pull + w * q @ (2 * x.T @ y / len(x))
    return np.linalg.solve(system, pull)[:, 0]


def optimum(clients, weighting):
    """Return the minimum of the weighted mean of the clients' losses."""
    parts = [
        (w * curvature(x), w * 2 * x.T @ y / len(x)) for w, (x, y) in zip(weights(weighting), clients, strict=True)
    ]
    return np.linalg.solve(sum(a for a, _ in parts), sum(b for _, b in parts))[:, 0]


def run(method, clients, out, rounds, **options):
    """Return the parameters after a run of full-batch gradient descent at the clients, fp64 [3]."""
    sets = [TensorDataset(*(torch.tensor(part, dtype=torch.float32) for part in pair)) for pair in clients]
    torch.manual_seed(0)
    finished = fedkern.simulate(
        method, data=sets, test=TensorDataset(*sets[0].tensors), model=nn.Linear(DIMENSION, 1, bias=False),
        loss_fn=nn.MSELoss(), rounds=rounds, local_epochs=STEPS, batch_size=max(SIZES), lr=RATE, momentum=0.0,
        weight_decay=0.0, eval_every=rounds, checkpoint_every=rounds, seed=1, out=out,
        progress=False, pictures=False, **options,
    )  # fmt: skip
    return next(finished.model().parameters()).detach().double().numpy()[0]


TOLERANCE = 2e-6
"""Of parameters around 2 in a run, whose vectors are fp32."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedavg_stops_where_its_formula_says(weighting, clients, tmp_path):
    expected = fixed_point(clients, weighting)
    assert np.abs(run("fedavg", clients, tmp_path / "run", 30, weighting=weighting) - expected).max() < TOLERANCE
    assert np.abs(expected - optimum(clients, weighting)).max() > 0.1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_fedprox_stops_where_its_formula_says(mu, clients, tmp_path):
    expected = fixed_point(clients, "samples", mu)
    assert np.abs(run("fedprox", clients, tmp_path / "run", 40, mu=mu) - expected).max() < TOLERANCE
    plain, best = fixed_point(clients, "samples"), optimum(clients, "samples")
    assert 0.1 < np.abs(expected - best).max() < np.abs(plain - best).max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "rounds", "options"), [
    ("scaffold", 40, {"control": "I"}),
    ("scaffold", 40, {"control": "II"}),
    ("feddyn", 150, {"alpha": 0.5}),
    ("scaffold", 200, {"control": "II", "sample_fraction": 0.5}),
    ("feddyn", 300, {"alpha": 0.5, "sample_fraction": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_optimum_that_fedavg_misses_is_reached(weighting, method, rounds, options, clients, tmp_path):
    best = optimum(clients, weighting)
    theta = run(method, clients, tmp_path / "run", rounds, weighting=weighting, **options)
    assert np.abs(theta - best).max() < TOLERANCE
    assert np.abs(fixed_point(clients, weighting) - best).max() > 0.1
