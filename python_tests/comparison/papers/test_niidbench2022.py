"""Network and splits of NIID-Bench's MNIST rows."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedkern.comparison.papers.niidbench2022 import CNN, shares
from fedkern.errors import UserError

LABELS = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(6000) % 10))


def test_the_network_is_the_released_codes():
    torch.manual_seed(0)
    network = CNN()
    assert sum(p.numel() for p in network.parameters()) == 44_426
    images = torch.rand(3, 1, 28, 28)
    conv, second, *linear = [layer for layer in network if hasattr(layer, "weight")]
    maps = functional.max_pool2d(functional.conv2d(images, conv.weight, conv.bias).relu(), 2)
    hidden = functional.max_pool2d(functional.conv2d(maps, second.weight, second.bias).relu(), 2).flatten(1)
    assert hidden.shape == (3, 16 * 4 * 4)
    for layer in linear[:-1]:
        hidden = layer(hidden).relu()
    torch.testing.assert_close(network(images), linear[-1](hidden))


@pytest.mark.parametrize("count", [2, 3])
def test_a_party_has_its_own_digit_and_others_whose_holders_share_equally(count):
    second = []
    for seed in range(20):
        parts = shares(LABELS, 10, f"classes:{count}", seed)
        digits = [set(LABELS[rows].tolist()) for rows in parts]
        assert all(len(hand) == count and own in hand for own, hand in enumerate(digits))
        second += [digit for own, hand in enumerate(digits) for digit in hand - {own}]
        for digit in range(10):
            counts = [int((LABELS[rows] == digit).sum()) for rows in parts if digit in LABELS[rows]]
            assert max(counts) - min(counts) <= 1
    assert set(second) == set(range(10))
    # fedkern's own classes:S gives each digit to S clients
    assert max(second[: 10 * (count - 1)].count(digit) for digit in range(10)) > count - 1


def test_fewer_parties_than_digits_are_refused():
    with pytest.raises(UserError, match="a client for every digit, not 9: use --clients 10"):
        shares(LABELS, 9, "classes:2", 0)


def test_unequal_parties_see_the_same_distribution():
    sizes = [len(rows) for rows in shares(LABELS, 10, "quantity:0.5", 0)]
    assert min(sizes) >= 10
    assert max(sizes) > 3 * sorted(sizes)[4]
    largest = max(shares(LABELS, 10, "quantity:0.5", 0), key=len)
    assert np.bincount(LABELS[largest], minlength=10).min() > 0.07 * len(largest)
