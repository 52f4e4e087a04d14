"""FedNTD's loss against its equations."""

import types

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedkern.methods import Batch, FedNTD, Phase
from fedkern.methods.baselines.fedntd import not_true
from python_tests.methods.proxies import Fixed

PHASE = Phase(1, "train", "update")


def parts(beta, temperature, local, glob, labels):
    n = len(labels)
    received = types.SimpleNamespace(message={}, model=Fixed(glob), round_cache={}, samples=n, epochs=1, phase=PHASE)
    batch = Batch(torch.zeros(n, 3, 4, 4), labels, np.arange(n), PHASE)
    method = FedNTD(FedNTD.Options(beta=beta, temperature=temperature))
    batch.drawn = method.prepare(local, batch, received)
    return method.loss(local, batch, received)


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.3, 3.0)])
def test_loss_is_the_published_one(beta, temperature):
    g = torch.Generator().manual_seed(3)
    own, glob = (3 * torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 2])
    local = Fixed(own)
    loss, seen = parts(beta, temperature, local, glob, labels)
    loss.backward()

    z = own.clone().requires_grad_()
    ntd = 0.0
    for i, y in enumerate(labels.tolist()):
        wrong = [c for c in range(5) if c != y]
        q_local = torch.softmax(z[i, wrong] / temperature, 0)
        q_global = torch.softmax(glob[i, wrong] / temperature, 0)
        ntd = ntd + (q_global * (q_global / q_local).log()).sum() / len(labels)
    expected = cross_entropy(z, labels) + beta * temperature**2 * ntd
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen["loss_ntd"], (temperature**2 * ntd).detach())
    torch.testing.assert_close(local.logits.grad, z.grad)


def test_the_true_class_is_left_to_the_labels():
    own, glob, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([5, 0, 3, 3])
    local = Fixed(own)
    loss, seen = parts(1.0, 1.0, local, glob, labels)
    moved = own.clone()
    moved[torch.arange(4), labels] += 10
    torch.testing.assert_close(parts(1.0, 1.0, Fixed(moved), glob, labels)[1]["loss_ntd"], seen["loss_ntd"])
    (loss - cross_entropy(local.logits, labels)).backward()
    torch.testing.assert_close(local.logits.grad[torch.arange(4), labels], torch.zeros(4), atol=1e-7, rtol=0)
    assert (not_true(own, labels) == -torch.inf).sum() == 4


def test_nothing_to_distil_where_the_models_agree():
    logits, labels = torch.randn(4, 6), torch.tensor([5, 0, 3, 3])
    shifted = logits + torch.tensor([[1.0], [-3.0], [0.0], [7.0]])
    assert float(parts(1.0, 1.0, Fixed(logits), shifted, labels)[1]["loss_ntd"]) < 1e-6
