"""FedGID's loss against its equations in plain PyTorch, and the invariants of docs/methods/fedgid.md."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedkern import models
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import Batch, FedGID, Phase
from fedkern.methods.fedgid import batch_statistics_only

PHASE = Phase(0, "train", "update")


class Received:
    def __init__(self, model, samples=20, epochs=1, phase=PHASE):
        self.model, self.samples, self.epochs, self.phase = model, samples, epochs, phase
        self.round_cache, self.message = {}, {}


def network(seed, model="cnn", width=4, side=16, dtype=torch.float32):
    return models.build(model, classes=3, channels=3, image_size=side, seed=seed, width=width).to(dtype)


class Scene:
    """A local and a global network, a batch and a bank in float64, for close comparison with oracles."""

    def __init__(self, make_data, make_config, model="cnn", shared=False, phase=PHASE, epochs=1, **options):
        self.method = FedGID(FedGID.Options.parse(options))
        self.context = RunContext(make_config("fedgid"), make_data())
        self.client = Client(self.context, 0, {})
        self.local = network(1, model, dtype=torch.float64)
        self.frozen = network(1 if shared else 2, model, dtype=torch.float64)
        self.frozen.requires_grad_(False)
        g = torch.Generator().manual_seed(5)
        for net in (self.local, self.frozen):  # statistics of their own, so that eval mode means something
            for layer in net.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    g2 = g if not shared else torch.Generator().manual_seed(6)
                    layer.running_mean += 0.1 * torch.randn(layer.running_mean.shape, generator=g2)
        self.frozen.eval()
        self.received = Received(self.frozen, phase=phase, epochs=epochs)
        data = self.context.samples.of_client(0)
        data.pixels._normalise = _double(data.pixels._normalise)
        rows = np.array([3, 1, 4, 11, 5])
        self.batch = Batch(data.pixels.take(rows), data.labels[rows], rows, phase)
        self.batch.drawn = self.method.draw(self.client, self.batch, np.random.default_rng(0))
        if "bank" in self.batch.drawn:
            pixels = self.batch.drawn["bank"].pixels
            pixels._normalise = _double(pixels._normalise)

    def loss(self):
        with torch.no_grad():
            self.batch.drawn |= self.method.prepare(self.local, self.batch, self.received)
        result = self.method.loss(self.local, self.batch, self.received)
        return result if isinstance(result, tuple) else (result, {})

    def oracle(self, alpha=0.6, lam=1.0, temperature=1.0, stage="layer2", kl="local_global", on="features", gi=True):
        """Return the equations of section 1.3, line by line."""
        x, y = self.batch.inputs, self.batch.targets
        f_i = self.local.features(x)
        z = self.local.head(f_i)
        with torch.no_grad():
            f_g = self.frozen.features(x)
        total = cross_entropy(z, y)
        pairs = [(f_i, z)]
        if gi:
            bank, index = self.batch.drawn["bank"], self.batch.drawn["index"]
            h_b = self.frozen.stages(bank.take(index), upto=stage).detach()
            a = torch.as_tensor(alpha, dtype=x.dtype)
            a = a.reshape(-1, *[1] * (h_b.dim() - 1)) if a.dim() else a
            h_inv = a * self.local.stages(x, upto=stage) + (1 - a) * h_b
            f_inv = self.local.tail(h_inv, after=stage)
            z_inv = self.local.head(f_inv)
            total = total + cross_entropy(z_inv, y)
            pairs.append((f_inv, z_inv))
        for f, logits in pairs:
            u, g = (f, f_g) if on == "features" else (logits, self.frozen.head(f_g))
            p, q = (u, g) if kl == "local_global" else (g, u)
            p, q = torch.softmax(p / temperature, 1), torch.softmax(q / temperature, 1)
            total = total + lam * temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
        return total


def _double(function):
    return lambda *arguments: function(*arguments).double()


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.sampled(12)
@pytest.mark.parametrize("model", ["cnn", "resnet8"])
@pytest.mark.parametrize("stage", ["feature", "layer1", "layer2", "layer3"])
@pytest.mark.parametrize("kl", ["local_global", "global_local"])
@pytest.mark.parametrize("on", ["features", "logits"])
@pytest.mark.parametrize("gi", [True, False])
def test_loss_and_gradient_are_the_papers_equations(model, stage, kl, on, gi, make_data, make_config):
    scene = Scene(
        make_data, make_config, model,
        alpha=0.7, temperature=2.0, mix_stage=stage, kl_direction=kl, distill_on=on, intervention=gi, **{"lambda": 0.4},
    )  # fmt: skip
    scene.local.train()
    loss, seen = scene.loss()
    expected = scene.oracle(0.7, 0.4, 2.0, stage, kl, on, gi)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(scene.local, loss), gradient(scene.local, expected), rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in scene.frozen.parameters())
    assert ("loss_gi" in seen) == gi == ("bank" in scene.batch.drawn)


def test_map_means_the_last_stage_but_one(make_data, make_config):
    a, b = (Scene(make_data, make_config, mix_stage=s).loss()[0] for s in ("map", "layer2"))
    assert torch.equal(a, b)
    assert models.resolve_stage(network(0), "map") == "layer2"


def test_intervention_alone(make_data, make_config):
    gi = Scene(make_data, make_config, distillation=False)
    total, seen = gi.loss()
    assert "loss_gd" not in seen
    torch.testing.assert_close(total, gi.oracle(lam=0.0), rtol=1e-9, atol=1e-9)


def test_alpha_one_mixes_nothing(make_data, make_config):
    scene = Scene(make_data, make_config, alpha=1.0, **{"lambda": 0.0})
    assert scene.batch.drawn == {}  # no background is drawn or computed
    total, seen = scene.loss()
    assert seen["loss_gi"] == seen["loss_em"]
    torch.testing.assert_close(total, 2 * seen["loss_em"])
    # ... and that is the limit of really mixing with alpha = 1
    mixing = Scene(make_data, make_config, alpha=0.5, **{"lambda": 0.0})
    mixing.method = FedGID(FedGID.Options.parse({"alpha": 1.0, "lambda": 0.0}))
    torch.testing.assert_close(mixing.loss()[0], total, rtol=1e-9, atol=1e-9)


def test_no_gradient_reaches_the_global_encoder_or_the_backgrounds(make_data, make_config):
    scene = Scene(make_data, make_config)
    scene.frozen.requires_grad_(True)
    bank = scene.batch.drawn["bank"]
    images = bank.take(None).requires_grad_(True)
    bank.take = lambda rows, rng=None: images if rows is None else images[rows]
    before = {k: v.clone() for k, v in scene.frozen.state_dict().items()}
    loss, _ = scene.loss()
    loss.backward()
    assert images.grad is None
    assert all(p.grad is None for p in scene.frozen.parameters())
    assert all(p.grad is not None for p in scene.local.parameters())
    assert all(torch.equal(before[k], v) for k, v in scene.frozen.state_dict().items())


def test_at_the_start_of_a_round_local_and_global_features_agree(make_data, make_config):
    scene = Scene(make_data, make_config, shared=True, intervention=False)
    scene.local.eval()
    _, seen = scene.loss()
    assert 0 <= float(seen["loss_gd"]) < 1e-12
    scene.local.train()  # with the batch's statistics they do not
    assert float(scene.loss()[1]["loss_gd"]) > 1e-9


def test_the_engines_global_copy_is_frozen_in_eval_mode_and_built_once(make_data, make_config, monkeypatch, tmp_path):
    seen = []

    class Spy(FedGID):
        def loss(self, model, batch, received):
            frozen = received.model
            vector = torch.cat([p.detach().flatten() for p in frozen.parameters()])
            seen.append((batch.phase.round, id(frozen), vector))
            assert not frozen.training
            assert not any(p.requires_grad for p in frozen.parameters())
            return super().loss(model, batch, received)

    from fedkern.methods import METHODS

    monkeypatch.setitem(METHODS, "fedgid", Spy)
    writes = []
    real = Network.write

    def write(self, message):
        writes.append(self)
        real(self, message)

    monkeypatch.setattr(Network, "write", write)
    run(make_config("fedgid"), out=tmp_path, data=make_data())
    frozen = [w for w in writes if any(id(w.module) == entry[1] for entry in seen)]
    assert len(frozen) == 2  # once per round, for all clients
    for round in (0, 1):
        copies = [vector for r, _, vector in seen if r == round]
        assert all(torch.equal(copies[0], copy) for copy in copies)


def test_running_statistics_of_the_tail_ignore_mixed_features(make_data, make_config):
    scene = Scene(make_data, make_config, mix_stage="layer1", **{"lambda": 0.0})
    scene.local.train()
    scene.loss()
    twin = network(1, dtype=torch.float64)
    twin.load_state_dict(Scene(make_data, make_config, mix_stage="layer1").local.state_dict())
    twin.train()
    twin(scene.batch.inputs)
    state = scene.local.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in twin.state_dict().items() if "running" in k)
    counts = [int(v) for k, v in state.items() if "num_batches" in k]
    assert counts == [1, 1, 1]


def test_statistics_guard_restores_and_leaves_eval_mode_alone():
    model = network(0).train()
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    with batch_statistics_only(model):
        assert not norm.track_running_stats
    assert norm.track_running_stats
    with batch_statistics_only(model.eval()):
        assert norm.track_running_stats


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("on", ["features", "logits"])
def test_caching_over_epochs_changes_nothing(on, epochs, make_data, make_config):
    scene = Scene(make_data, make_config, epochs=epochs, distill_on=on)
    loss = scene.loss()[0]
    assert ("anchor" in scene.received.round_cache) == (epochs > 1)
    scene.batch.epoch = 1
    calls = []
    scene.frozen.register_forward_hook(lambda *_: calls.append(1))
    again = scene.loss()[0]
    torch.testing.assert_close(again, scene.oracle(on=on), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, loss, rtol=1e-9, atol=1e-9)


def test_random_backgrounds_are_uniform_over_the_bank(make_data, make_config):
    scene, rng = Scene(make_data, make_config), np.random.default_rng(0)
    size = len(scene.batch.drawn["bank"])
    indices = [scene.method.draw(scene.client, scene.batch, rng)["index"] for _ in range(400 * size)]
    assert np.bincount(np.concatenate(indices), minlength=size) / (2000 * size) == pytest.approx(1 / size, rel=0.15)


def test_the_label_stays_that_of_the_original_image(make_data, make_config):
    scene = Scene(make_data, make_config, alpha=0.0, mix_stage="feature", distillation=False)
    _, seen = scene.loss()
    bank, index = scene.batch.drawn["bank"], scene.batch.drawn["index"]
    z = scene.local.head(scene.frozen.features(bank.take(index)))
    torch.testing.assert_close(seen["loss_gi"], cross_entropy(z, scene.batch.targets), rtol=1e-9, atol=1e-9)


def test_empty_bank_trains_without_intervention_and_says_so(make_data, make_config, tmp_path):
    data = make_data()
    data.clients[1].masks[:] = False
    data.clients[2].masks[1:] = False
    summary = run(make_config("fedgid"), out=tmp_path, data=data)
    assert "client 1" in summary["diagnostics"]["background-bank-empty"]
    assert "1 of the 9 images of client 2" in summary["diagnostics"]["background-bank-sparse"]
    from fedkern.engine.store.record_files import read_metrics

    clients = read_metrics(tmp_path)[0]["clients"]
    assert "loss_gi" in clients["0"]
    assert "loss_gi" not in clients["1"]


def test_an_intervention_that_changes_nothing_is_reported(make_data, make_config, tmp_path):
    inert = run(make_config("fedgid", options={"alpha": 0.9999}), out=tmp_path / "a", data=make_data())
    assert "intervention-inert" in inert["diagnostics"]
    active = run(make_config("fedgid", options={"alpha": 0.1}), out=tmp_path / "b", data=make_data())
    assert "intervention-inert" not in active["diagnostics"]


def test_an_alpha_of_1_needs_no_masks(make_data, make_config, tmp_path):
    data = make_data()
    plain = dataclasses.replace(data, clients=tuple(dataclasses.replace(c, masks=None) for c in data.clients))
    summary = run(make_config("fedgid", rounds=2, options={"alpha": 1}), out=tmp_path, data=plain)
    assert summary["rounds"] == len(read_metrics(tmp_path)) == 2


def test_unknown_stage_ends_the_run_before_it_starts(make_data, make_config, tmp_path):
    with pytest.raises(UserError, match="layer4"):
        run(make_config("fedgid", options={"mix_stage": "layer4"}), out=tmp_path, data=make_data())
    assert not list(tmp_path.iterdir())
