"""Drawn data of three papers, and their networks.

``fcube`` is the FCUBE of NIID-Bench (Li et al., ICDE 2022, arXiv 2102.02079): points of a cube, whose class is the side
of the plane x1 = 0 on which they lie.  Every client has two of the eight octants, which are symmetric about the
origin.  ``synthetic`` is Synthetic(alpha, beta) of FedProx (Li et al., MLSys 2020, arXiv 1812.06127), with the sizes
and splits of q-FFL (Li et al., ICLR 2020, arXiv 1905.10497) or pFedMe (T. Dinh et al., NeurIPS 2020, arXiv 2006.08848).

    python -m fedkern.run fedavg --data examples/papers/synthetic.py:fcube --model examples/papers/synthetic.py:Plane
    python -m fedkern.run qffl --data examples/papers/synthetic.py:synthetic --model examples/papers/synthetic.py:Linear

The tables of these papers are ``benchmarks/studies/fcube.toml``, ``qffl.toml`` and ``pfedme.toml``.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedkern import FederatedData, UserError, register_data
from fedkern.streams import stream

POINTS = 500
"""Points of an octant of FCUBE's training data, as in the released code; its test set has twice as many."""
SIDES = ((1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1))
"""Signs of one octant of every client of FCUBE; the other one has the opposite signs."""
FEATURES, CLASSES, USERS = 60, 10, 100
DRAWN = -1


class Plane(nn.Linear):
    """The released code's network for FCUBE, a linear one."""

    def __init__(self) -> None:
        super().__init__(3, 2)


class Perceptron(nn.Sequential):
    """Three hidden layers of 32, 16 and 8 units, the network of the paper's other tables of numbers."""

    def __init__(self) -> None:
        sizes = (3, 32, 16, 8)
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(8, 2))


class Linear(nn.Linear):
    """Multinomial logistic regression on Synthetic."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES)


class Hidden(nn.Sequential):
    """pFedMe's network on Synthetic, with 20 hidden units."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 20), nn.ReLU(), nn.Linear(20, CLASSES))


@register_data("fcube", clients=4)
def fcube(*, seed: int) -> tuple[dict[str, TensorDataset], TensorDataset]:
    """Points of a cube with the side of a plane as their class; a client has two opposite octants."""
    octants = {}
    for client, signs in enumerate(SIDES):
        points = stream(seed, "fcube", client=client).random((2 * POINTS, 3)) * signs
        points[1::2] *= -1
        octants[f"octants {client}"] = _points(points)
    return octants, _points(stream(seed, "fcube-test").uniform(-1, 1, (2 * POINTS, 3)))


def _points(points: np.ndarray) -> TensorDataset:
    return TensorDataset(torch.from_numpy(points).float(), torch.from_numpy(points[:, 0] <= 0).long())


@register_data("synthetic", clients=USERS)
def synthetic(
    *, seed: int, alpha: float = 1.0, beta: float = 1.0, draw: int = DRAWN, times: int = 1, validation: float = 0.1
) -> FederatedData:
    """Synthetic(alpha, beta): 100 clients, each with a linear law of its own of 60 features and 10 classes.

    A tenth of a client's samples is its own test set.

    Args:
        seed: the run's, which splits the samples.
        alpha: deviation of the means of the clients' laws.
        beta: deviation of the means of the clients' features.
        draw: seed of the samples themselves, for NumPy's ``RandomState``; -1: the run's seed decides.  The released
            code of pFedMe has 0.
        times: factor on all sizes, 5 in the released code of pFedMe.
        validation: share of a client's samples for the validation set.
    """
    if not 0 <= validation < 0.9:
        raise UserError(f"validation={validation:g} leaves no sample to train on: give a share from 0 to below 0.9.")
    word = int(stream(seed, "synthetic").integers(2**32)) if draw == DRAWN else draw
    rng = np.random.RandomState(word)  # draws in the order of the released code, so that its seed gives its data
    sizes = (rng.lognormal(4, 2, USERS).astype(int) + 50) * times
    laws, centres = rng.normal(0, alpha, USERS), rng.normal(0, beta, USERS)
    means = [rng.normal(centre, 1, FEATURES) for centre in centres]
    covariance = np.diag(np.arange(1, FEATURES + 1) ** -1.2)
    parts: dict[str, dict[str, TensorDataset]] = {"train": {}, "validation": {}, "test": {}}
    for user, (size, law, mean) in enumerate(zip(sizes, laws, means, strict=True)):
        weight, bias = rng.normal(law, 1, (FEATURES, CLASSES)), rng.normal(law, 1, CLASSES)
        x = rng.multivariate_normal(mean, covariance, size)
        y = torch.from_numpy(np.argmax(x @ weight + bias, axis=1))
        order = stream(seed, "synthetic-split", client=user).permutation(size)
        ends = [int((0.9 - validation) * size), int(0.9 * size)]
        for name, rows in zip(parts, np.split(order, ends), strict=True):
            parts[name][f"user {user}"] = TensorDataset(torch.from_numpy(x[rows]).float(), y[rows])
    sets = {"validation": parts["validation"]} if validation else {}
    return FederatedData.from_datasets(parts["train"], parts["test"], classes=CLASSES, **sets)
