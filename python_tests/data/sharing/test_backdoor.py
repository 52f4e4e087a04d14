"""Tests of backdoors: half of the attacker's images carry patch and target label.

The attack is tested on all other classes.
"""

import pytest
import torch

from fedkern.data import load
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import kept_data, load_data

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
    victims = clean.labels != 3
    assert len(attacked) == int(victims.sum())
    assert bool((attacked.labels == 3).all())
    assert torch.equal(attacked.images[..., :26, :], clean.images[victims][..., :26, :])
    assert bool((attacked.images[..., 26:31, 26:31] == 255).all())


def test_the_table_counts_what_is_trained_on():
    data = load("digits", options={"backdoor_clients": 2}, **CLIENTS)
    for counts, split in zip(data.statistics.counts, data.clients, strict=True):
        assert counts.tolist() == torch.bincount(split.labels, minlength=10).tolist()
    assert (data.statistics.counts[:2, 0] >= 15).all()


def test_what_is_held_out_is_clean():
    """Clients' own test sets keep their labels, and the first client that trains is backdoored."""
    wanted = {"seed": 0, "client_test": 0.2, "held_out_client": "0", **CLIENTS}
    plain, attacked = (
        RunConfig.make("fedavg", data="digits", data_options=options, **wanted)
        for options in ({}, {"backdoor_clients": 1, "backdoor_target": 3})
    )
    before, after = (kept_data(config, load_data(config)) for config in (plain, attacked))
    assert set(after.tests) == {"", "held_out", "backdoor", "held_out_backdoor"}
    for before_split, after_split in zip(
        (*before.client_tests, before.tests["held_out"], before.clients[1]),
        (*after.client_tests, after.tests["held_out"], after.clients[1]),
        strict=True,
    ):
        assert torch.equal(before_split.images, after_split.images)
        assert torch.equal(before_split.labels, after_split.labels)
    clean, poisoned = before.clients[0], after.clients[0]
    changed = (poisoned.images != clean.images).flatten(1).any(1)
    assert int(changed.sum()) == round(len(clean) / 2)
    assert after.statistics.counts[0].tolist() == torch.bincount(poisoned.labels, minlength=10).tolist()


def test_a_backdoor_is_for_classification():
    config = RunConfig.make("fedavg", data="segdigits", model="unet", data_options={"backdoor_clients": 1})
    with pytest.raises(UserError, match='backdoor_clients is for classification, and data set "segdigits" is for segm'):
        kept_data(config, load_data(config))


def test_wrong_requests_are_one_sentence():
    for options, said in (
        ({"backdoor_clients": 4}, "backdoor_clients is 4, but the data are shared out among 3"),
        ({"backdoor_clients": 1, "backdoor_target": 10}, "backdoor_target is 10, but .* classes 0 to 9"),
        ({"backdoor_clients": 1, "backdoor_size": 32}, "backdoor_size is 32, but the images"),
        ({"backdoor_clients": 1, "backdoor_size": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            load("digits", options=options, **CLIENTS)
