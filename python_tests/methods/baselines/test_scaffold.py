"""SCAFFOLD's control variates against algorithm 1 of the paper."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.methods import FedAvg, Phase, Scaffold
from python_tests.saved_network import same_network

PHASE = Phase(0, "train", "update")
LR = 0.05


def train(make_data, make_config, option, **settings):
    """Play a client's exchange with its own control variate.

    Returns the message, the control variate, the answer, the client and the run's context.
    """
    config = make_config("scaffold", lr=LR, momentum=0.0, **settings)
    context = RunContext(config, make_data())
    message = context.networks.initial()
    g = torch.Generator().manual_seed(1)
    size = message["parameters"].numel()
    own, message["control"] = (1e-2 * torch.randn(size, generator=g) for _ in range(2))
    client = Client(context, 0, {"control": own.clone()})
    answer = Scaffold(Scaffold.Options(control=option)).client_update(client, PHASE, message)
    return message, own, answer, client, context


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_option_two_is_the_published_quotient_under_plain_sgd(weight_decay, make_data, make_config):
    message, own, answer, client, _ = train(make_data, make_config, "II", local_epochs=2, weight_decay=weight_decay)
    steps = 2 * 3  # 20 samples in batches of 8
    quotient = own - message["control"] + (message["parameters"] - answer["parameters"]) / (steps * LR)
    if weight_decay:  # the optimiser's decay is no gradient of the loss, so it stays out
        assert not torch.allclose(client.state["control"], quotient, rtol=1e-3, atol=1e-4)
    else:
        torch.testing.assert_close(client.state["control"], quotient, rtol=1e-4, atol=2e-5)
    assert torch.equal(answer["control"], client.state["control"] - own)


@pytest.mark.parametrize(("settings", "atol"), [({}, 1e-6), ({"model": "resnet8", "freeze_bn_after": 0}, 1e-5)])
def test_option_one_is_the_gradient_at_the_received_model(settings, atol, make_data, make_config):
    """Fixed statistics are the received ones."""
    message, _, _, client, context = train(make_data, make_config, "I", **settings)
    network = Network(context.networks.build(), torch.device("cpu"))
    network.write(message)
    network.fixed = "freeze_bn_after" in settings
    network.train_mode()
    gradient = network.gradients
    data = context.samples.of_client(0)
    cross_entropy(network.module(data.pixels.take(np.arange(len(data)))), data.labels).backward()
    torch.testing.assert_close(client.state["control"], gradient, rtol=1e-4, atol=atol)


def test_a_variate_that_is_not_finite_is_refused_and_forgotten(make_data, make_config, tmp_path, monkeypatch):
    honest = Scaffold.gradient

    def gradient(self, client, phase, message):
        return honest(self, client, phase, message) * (torch.nan if client.id == 1 else 1)

    monkeypatch.setattr(Scaffold, "gradient", gradient)
    settings = {"options": {"control": "I"}, "rounds": 3}
    with pytest.raises(UserError, match=r"infinite values in control; .*--on-nan skip"):
        run(make_config("scaffold", **settings), out=tmp_path / "stop", data=make_data())
    summary = run(make_config("scaffold", on_nan="skip", **settings), out=tmp_path / "skip", data=make_data())
    assert "refused-upload-1" in summary["diagnostics"]
    state = Checkpoints(tmp_path / "skip")
    state.open()
    shares = np.array([20, 9]) / 42
    expected = sum(s * state.client_state(k)["control"] for s, k in zip(shares, (0, 2), strict=True))
    torch.testing.assert_close(state.server_state()["control"], expected, rtol=1e-4, atol=1e-6)
    assert "control" not in state.client_state(1)


def test_local_steps_are_corrected_by_both_variates(make_data, make_config):
    message, own, answer, _, context = train(make_data, make_config, "II", batch_size=20)  # a single step
    plain = Client(context, 0, {}).train(FedAvg(), PHASE, {k: v for k, v in message.items() if k != "control"})
    expected = plain["parameters"] - LR * (message["control"] - own)
    torch.testing.assert_close(answer["parameters"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.sampled
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("option", ["I", "II"])
def test_the_servers_variate_is_the_mean_of_the_clients(weighting, option, make_data, make_config, tmp_path):
    options = {"weighting": weighting, "control": option}
    config = make_config("scaffold", rounds=4, sample_fraction=0.67, options=options)
    run(config, out=tmp_path, data=make_data())
    state = Checkpoints(tmp_path)
    state.open()
    sizes = [20, 13, 9] if weighting == "samples" else [1, 1, 1]
    own = [state.client_state(k).get("control") for k in range(3)]
    assert sum(variate is not None for variate in own) >= 2
    expected = sum(n * c.double() for n, c in zip(sizes, own, strict=True) if c is not None) / sum(sizes)
    torch.testing.assert_close(state.server_state()["control"].double(), expected, rtol=1e-4, atol=1e-6)


def test_bytes_double_but_for_the_buffers_and_the_first_round_is_fedavg(make_data, make_config, tmp_path):
    data = make_data()
    a = run(make_config("fedavg", rounds=1), out=tmp_path / "a", data=data)["bytes"]
    b = run(make_config("scaffold", rounds=1), out=tmp_path / "b", data=data)["bytes"]
    size = RunContext(make_config(), data).networks.initial()["parameters"].numel()
    for direction in ("up", "down"):
        assert b[direction] - a[direction] == 3 * 4 * size
        assert b["clients"]["1"][direction] - a["clients"]["1"][direction] == 4 * size
    assert same_network(tmp_path / "a", tmp_path / "b")


def test_server_learning_rate_scales_the_step(make_data, make_config, tmp_path):
    moved = {}
    for rate in (1.0, 0.5):
        config = make_config("scaffold", rounds=1, options={"server_lr": rate})
        run(config, out=tmp_path / str(rate), data=make_data())
        state = Checkpoints(tmp_path / str(rate))
        state.open()
        start = RunContext(config, make_data()).networks.initial()["parameters"]
        moved[rate] = state.server_state()["parameters"] - start
    torch.testing.assert_close(moved[0.5], 0.5 * moved[1.0], rtol=1e-4, atol=1e-7)
