"""Networks and splits of FedAvg's first table."""

import numpy as np
import pytest
import torch

from fedkern.comparison.papers import niidbench2022
from fedkern.comparison.papers.mcmahan2017 import CNN, TwoNN, mnist, shares
from fedkern.errors import UserError
from python_tests.comparison.idx_files import write_mnist

LABELS = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(6000) % 10))


@pytest.mark.parametrize(("kind", "parameters"), [(TwoNN, 199_210), (CNN, 1_663_370)])
def test_the_networks_have_the_papers_number_of_parameters(kind, parameters):
    network = kind()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("split", "clients", "partition"),
    [
        (shares, 100, "iid"),
        (shares, 100, "classes:2"),
        (niidbench2022.shares, 10, "dirichlet:0.5"),
        (niidbench2022.shares, 10, "classes:2"),
        (niidbench2022.shares, 10, "quantity:0.5"),
    ],
)
def test_every_image_is_at_one_client(split, clients, partition):
    parts = split(LABELS, clients, partition, 3)
    assert split is not shares or [len(rows) for rows in parts] == [60] * 100
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(6000))
    assert all(torch.equal(*pair) for pair in zip(parts, split(LABELS, clients, partition, 3), strict=True))
    assert not torch.equal(parts[0], split(LABELS, clients, partition, 4)[0])


def test_a_shard_has_one_digit_and_a_client_two_shards():
    digits = [len(LABELS[rows].unique()) for rows in shares(LABELS, 100, "classes:2", 0)]
    assert set(digits) == {1, 2}  # every digit fills 20 whole shards here
    assert len(LABELS[shares(LABELS, 100, "iid", 0)[0]].unique()) > 5


def test_another_partition_is_refused():
    with pytest.raises(UserError, match="iid and classes:2"):
        shares(LABELS, 100, "dirichlet:0.5", 0)


@pytest.mark.parametrize(("read", "clients"), [(mnist, 20), (niidbench2022.mnist, 10)])
def test_mnist_has_all_images_as_pixels_in_0_to_1(read, clients, tmp_path):
    write_mnist(tmp_path, train=400, test=30)
    data = read(tmp_path, clients, "classes:2", 0)
    assert sum(data.client_sizes) == 400
    assert len(data.tests[""]) == 30
    assert len(data.validation) == 0
    assert (data.form.mean, data.form.std) == ((0.0,), (1.0,))
