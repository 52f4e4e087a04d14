"""MOON's loss against its equations, and the fate of a client's previous model."""

import copy
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from fedkern import models
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.methods import Batch, Moon, Phase
from fedkern.ops import FlatParameters
from python_tests.saved_network import same_network

PHASE = Phase(1, "train", "update")


def network(seed):
    made = models.build("cnn", classes=3, channels=3, image_size=16, seed=seed, width=4).double()
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):  # statistics of its own, so that eval mode means something
            buffer.normal_(generator=torch.Generator().manual_seed(seed))
    return made


@pytest.mark.parametrize(("mu", "temperature"), [(1.0, 0.5), (5.0, 0.1)])
def test_loss_is_the_published_one(mu, temperature):
    local, glob, previous = network(1), network(2).eval(), network(3).eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 3, (6,))
    received = types.SimpleNamespace(
        message={}, extras={"previous": {}}, model=glob, round_cache={"network": previous}, samples=6, epochs=1,
        phase=PHASE,
    )  # fmt: skip
    method = Moon(Moon.Options(mu=mu, temperature=temperature))
    batch = Batch(images, labels, np.arange(6), PHASE)
    batch.drawn = method.prepare(local, batch, received)
    loss, seen = method.loss(local, batch, received)

    z, z_glob, z_prev = (net.features(images) for net in (local, glob, previous))
    towards = torch.exp(cosine_similarity(z, z_glob) / temperature)
    away = torch.exp(cosine_similarity(z, z_prev) / temperature)
    expected = -torch.log(towards / (towards + away)).mean()
    torch.testing.assert_close(seen["loss_con"], expected.detach())
    torch.testing.assert_close(loss, cross_entropy(local.head(z), labels) + mu * expected)
    loss.backward()
    assert all(p.grad is not None for p in local.parameters())
    assert all(p.grad is None for net in (glob, previous) for p in net.parameters())


def test_previous_equal_to_global_gives_log_two_and_no_gradient():
    local, glob = network(1), network(2).eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 3, (6,))
    received = types.SimpleNamespace(
        message={}, extras={"previous": {}}, model=glob, round_cache={"network": glob}, samples=6, epochs=1, phase=PHASE
    )
    batch = Batch(images, labels, np.arange(6), PHASE)
    batch.drawn = Moon().prepare(local, batch, received)
    loss, seen = Moon().loss(local, batch, received)
    torch.testing.assert_close(seen["loss_con"], torch.tensor(2.0, dtype=torch.float64).log())
    loss.backward()
    with_contrast = [p.grad.clone() for p in local.parameters()]
    local.zero_grad()
    cross_entropy(local(images), labels).backward()
    for a, p in zip(with_contrast, local.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_the_first_round_is_fedavg_bit_for_bit(make_data, make_config, tmp_path):
    for method in ("fedavg", "moon"):
        run(make_config(method, rounds=1), out=tmp_path / method, data=make_data())
    assert same_network(tmp_path / "fedavg", tmp_path / "moon")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("buffers", ["average", "local", "drop"])
def test_the_previous_model_stays_with_the_client(buffers, make_data, make_config, tmp_path):
    kept = {}

    class Watched(Moon):
        def client_update(self, client, phase, message):
            if phase.round:
                assert torch.equal(client.state["previous"]["parameters"], kept[client.id])
            result = super().client_update(client, phase, message)
            kept[client.id] = result["parameters"].clone()
            return result

        def loss(self, model, batch, received):
            result = super().loss(model, batch, received)
            if received.phase.round:
                flat = FlatParameters(copy.deepcopy(self._previous(received)))
                torch.testing.assert_close(flat.parameters, received.extras["previous"]["parameters"])
            return result

    import fedkern.methods.method_registry as registry

    before = registry.METHODS["moon"]
    registry.METHODS["moon"] = Watched
    try:
        summary = run(make_config("moon", buffers=buffers, local_epochs=2), out=tmp_path / "moon", data=make_data())
    finally:
        registry.METHODS["moon"] = before
    plain = run(make_config("fedavg", buffers=buffers, local_epochs=2), out=tmp_path / "avg", data=make_data())
    assert summary["bytes"] == plain["bytes"]
    state = Checkpoints(tmp_path / "moon")
    state.open()
    assert torch.equal(state.client_state(1)["previous"]["parameters"], kept[1])
