"""Backdoors: half of the attacker's images carry patch and target label; the attack is tested on all other classes."""

import pytest
import torch

from fedkern.data import load
from fedkern.errors import UserError

CLIENTS = {"clients": 3, "partition": "iid", "train_samples": 90}


def test_only_the_attackers_clients_and_the_test_change():
    plain = load("digits", **CLIENTS)
    data = load("digits", options={"backdoor_clients": 1, "backdoor_target": 3, "backdoor_size": 5}, **CLIENTS)
    before, after = plain.clients[0], data.clients[0]
    patched = (after.images != before.images).flatten(1).any(1)
    assert int(patched.sum()) == round(len(before) / 2)
    assert bool((after.labels[patched] == 3).all())
    assert torch.equal(after.labels[~patched], before.labels[~patched])
    changed = (after.images != before.images).any(0).any(0).nonzero()
    assert (changed.amin(0).tolist(), changed.amax(0).tolist()) == ([26, 26], [30, 30])
    assert bool((after.images[patched][..., 26:31, 26:31] == 255).all())
    for k in (1, 2):
        assert torch.equal(plain.clients[k].images, data.clients[k].images)
    assert torch.equal(plain.validation.images, data.validation.images)
    assert set(data.tests) == {"", "backdoor"}
    clean, attacked = data.tests[""], data.tests["backdoor"]
    assert torch.equal(clean.images, plain.tests[""].images)
    others = clean.labels != 3
    assert len(attacked) == int(others.sum())
    assert bool((attacked.labels == 3).all())
    assert torch.equal(attacked.images[..., :26, :], clean.images[others][..., :26, :])
    assert bool((attacked.images[..., 26:31, 26:31] == 255).all())


def test_wrong_requests_are_one_sentence():
    for options, said in (
        ({"backdoor_clients": 4}, "backdoor_clients is 4, but the data are shared out among 3"),
        ({"backdoor_clients": 1, "backdoor_target": 10}, "backdoor_target is 10, but .* classes 0 to 9"),
        ({"backdoor_clients": 1, "backdoor_size": 32}, "backdoor_size is 32, but the images"),
        ({"backdoor_clients": 1, "backdoor_size": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            load("digits", options=options, **CLIENTS)
