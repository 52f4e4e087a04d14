"""Ditto's personal networks against plain PyTorch, beside a global network that is FedAvg's."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedkern
from fedkern import models
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.methods import Ditto
from python_tests.interrupted import Kill, KillAt, outcome
from python_tests.personal_runs import SETTINGS, play, same


class Recording(Ditto):
    """Ditto that notes the images of every batch of the personal networks."""

    rows: ClassVar[list] = []

    def loss(self, model, batch, received):
        if batch.phase.exchange == "own":
            Recording.rows.append((batch.phase.round, received.samples, batch.inputs.clone(), batch.targets.clone()))
        return super().loss(model, batch, received)


def test_the_global_network_and_the_bytes_are_those_of_fedavg(tmp_path):
    average, ditto = (
        play(tmp_path / "fedavg", "fedavg", client_test=0.0, rounds=2),
        play(tmp_path / "ditto", "ditto", client_test=0.0, rounds=2),
    )
    assert same(average.model().state_dict(), ditto.model().state_dict())
    assert average.summary["bytes"] == ditto.summary["bytes"]
    losses = [[clients[k]["loss"] for k in clients] for clients in ditto.history["clients"]]
    assert losses == [[clients[k]["loss"] for k in clients] for clients in average.history["clients"]]
    assert all("loss_own" in told for told in ditto.history["clients"][0].values())


def test_personal_networks_are_those_of_the_algorithm(tmp_path):
    Recording.rows, lam = [], 0.5
    average = play(tmp_path / "average", "fedavg", rounds=1)  # what clients receive in the second round
    run = play(tmp_path / "run", Recording(**{"lambda": lam}), rounds=2)
    start = models.build("cnn", classes=10, channels=1, image_size=28, seed=0, width=2)
    received = [start.state_dict(), average.model().state_dict()]
    sizes = list(dict.fromkeys(size for _, size, *_ in Recording.rows))
    if len(sizes) < 3:
        pytest.skip("clients of one size cannot be told apart")
    for client, size in enumerate(sizes):
        own = copy.deepcopy(start).train()
        for turn in range(2):
            optimiser = torch.optim.SGD(own.parameters(), 0.05, 0.9, weight_decay=run.config.weight_decay)
            for _, _, images, targets in [row for row in Recording.rows if row[:2] == (turn, size)]:
                optimiser.zero_grad()
                distance = sum(
                    (parameter - received[turn][name]).square().sum() for name, parameter in own.named_parameters()
                )
                (cross_entropy(own(images), targets) + lam / 2 * distance).backward()
                if run.config.clip_norm:
                    nn.utils.clip_grad_norm_(own.parameters(), run.config.clip_norm)
                optimiser.step()
        found = run.model(client=client).state_dict()
        torch.testing.assert_close(found, own.state_dict(), rtol=2e-3, atol=2e-4)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.exhaustive
def test_bits_in_two_workers_and_killed_and_resumed(tmp_path):
    settings = {"sample_fraction": 0.7, "optimizer_state": "keep"}
    run, two = play(tmp_path / "one", "ditto", **settings), play(tmp_path / "two", "ditto", workers=2, **settings)
    with pytest.raises(Kill):
        play(tmp_path / "killed", "ditto", listener=KillAt("client", 1, round=2), **settings)
    resumed = fedkern.load(tmp_path / "killed").resume(progress=False, pictures=False)
    for repeated in (two, resumed):
        assert outcome(repeated.out) == outcome(run.out)
        for k in range(3):
            assert same(run.model(client=k).state_dict(), repeated.model(client=k).state_dict())
    kept = Checkpoints(run.out).last_client_state(0)
    assert {"optimizer update", "optimizer own", "own"} == {name.rsplit(" ", 1)[0] for name in kept}


def test_what_does_not_fit_is_refused(tmp_path):
    for settings, said in (
        ({"personal": "head.*"}, "ditto with these options is none"),
        ({"buffers": "local"}, "buffers=.local. is not for ditto"),
        ({"dp_clip": 1.0, "dp_noise": 1.0}, "dp_noise is not for ditto: it covers what clients upload"),
    ):
        with pytest.raises(UserError, match=said):
            play(tmp_path / "run", "ditto", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_it_is_compared_by_own_and_worst_client(tmp_path):
    found = fedkern.compare(["fedavg", "fedper", "ditto"], seeds=[1], out=tmp_path / "x", **SETTINGS)
    assert [row["group"] for row in found.table] == ["fedavg", "fedper", "ditto"]
    for row in found.table:
        assert 0 <= row["worst_client_accuracy"] <= row["mean_client_accuracy"] <= 1
        assert row["bytes"] < found.table[0]["bytes"] or row["group"] != "fedper"
