"""The public split: images that everybody may see and no client holds."""

import pytest
import torch

from fedkern.data import load
from fedkern.errors import UserError


def ids(split):
    return set(split.ids)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "classes:2"])
def test_it_is_disjoint_from_every_client_and_they_share_out_the_rest(partition):
    data = load("digits", partition=partition, public_samples=200)
    held = [ids(client) for client in data.clients]
    assert len(data.public) == len(ids(data.public)) == 200
    assert not ids(data.public) & set().union(*held)
    assert len(ids(data.public) | set().union(*held)) == 1200
    assert not ids(data.public) & (ids(data.validation) | ids(data.tests[""]))


def test_beside_a_subset_the_clients_keep_their_data():
    without, beside = (load("digits", train_samples=500, public_samples=n) for n in (0, 300))
    assert without.public is None
    for a, b in zip(without.clients, beside.clients, strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.images, b.images)
    again = load("digits", train_samples=500, public_samples=300)
    assert beside.public.ids == again.public.ids
    assert load("digits", train_samples=500, public_samples=300, seed=1).public.ids != again.public.ids


def test_a_coloured_one_shows_the_clients_colours():
    data = load("colordigits", public_samples=150, correlation=1.0)
    seen = {tuple(image[:, 0, 0].tolist()) for client in data.clients for image in client.images}
    assert {tuple(image[:, 0, 0].tolist()) for image in data.public.images} <= seen
    assert data.public.masks is not None


@pytest.mark.parametrize(("train", "public"), [(None, 1200), (1000, 201), (None, 5000)])
def test_more_than_there_are_is_one_sentence(train, public):
    with pytest.raises(UserError, match=r"has 1200 training samples, so it cannot give \d+"):
        load("digits", train_samples=train, public_samples=public)
