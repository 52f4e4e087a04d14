"""Network and splits of NIID-Bench's MNIST rows."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedkern.comparison import published
from fedkern.comparison.papers.niidbench2022 import CNN, shares
from fedkern.data.sharing.partition import partition
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


def test_a_party_has_its_own_digit_and_another_one_whose_holders_share_equally():
    second = []
    for seed in range(20):
        parts = shares(LABELS, 10, "classes:2", seed)
        digits = [set(LABELS[rows].tolist()) for rows in parts]
        assert all(len(pair) == 2 and own in pair for own, pair in enumerate(digits))
        second += [next(iter(pair - {own})) for own, pair in enumerate(digits)]
        for digit in range(10):
            counts = [int((LABELS[rows] == digit).sum()) for rows in parts if digit in LABELS[rows]]
            assert max(counts) - min(counts) <= 1
    assert set(second) == set(range(10))
    assert max(second[:10].count(digit) for digit in range(10)) > 1  # fedkern's own classes:2 gives each digit to two


def test_more_parties_begin_with_the_first_digit_again():
    digits = [set(LABELS[rows].tolist()) for rows in shares(LABELS, 12, "classes:2", 0)]
    assert 0 in digits[10]
    assert 1 in digits[11]


def test_dirichlet_is_fedkerns_own():
    expected = partition("dirichlet:0.5", LABELS.numpy(), 10, 3)
    for rows, own in zip(shares(LABELS, 10, "dirichlet:0.5", 3), expected, strict=True):
        assert torch.equal(rows, torch.from_numpy(own))


def test_fewer_parties_than_digits_are_refused():
    with pytest.raises(UserError, match="a client for every digit, not 9: use --clients 10"):
        shares(LABELS, 9, "classes:2", 0)


def test_cells_play_the_papers_settings():
    paper = published.read_paper("niidbench2022")
    for cell in paper.cells:  # the table in the paper itself is unread
        assert (cell.published is None) == ("FedProx" in cell.name)  # whose published mu is the best of four
        assert cell.published is None or "Flower's baseline" in cell.source
        words = " ".join(paper.words(cell.command))
        for setting in (
            "--clients 10", "--rounds 50", "--local-epochs 10", "--batch-size 64", "--lr 0.01", "--momentum 0.9",
            "--weight-decay 0.00001",
        ):  # fmt: skip
            assert setting in words, cell.name
        assert ("mu=0.01" in words) == ("FedProx" in cell.name)
        assert cell.seeds == (0,)
