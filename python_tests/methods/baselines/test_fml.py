"""FML's losses against their equations, its messages and its state."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot, softmax

from fedkern import models
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.server import Server
from fedkern.errors import UserError
from fedkern.methods import FML, FedLPFM, Phase
from fedkern.methods.baselines.fml import Pair
from python_tests.methods.proxies import PHASE, Fixed, scene

EQUAL = {"momentum": 0.9}  # the methods' own defaults differ


def test_fml_is_its_equations_with_the_other_side_detached():
    proxy, teacher, batch = scene(1)
    pair, t = Pair(Fixed(teacher[0]), proxy), 2.0
    method = FML(FML.Options(alpha=0.7, beta=0.4, temperature=t))
    total, _ = method.loss(pair, batch, None)
    total.backward()
    h, z, target = pair.private.logits.detach(), proxy.logits.detach(), one_hot(batch.targets, 5).double()

    def gradient(own, peer, weight):
        distilled = t * (softmax(own / t, 1) - softmax(peer / t, 1))
        return (weight * (softmax(own, 1) - target) + (1 - weight) * distilled) / 7

    torch.testing.assert_close(pair.private.logits.grad, gradient(h, z, 0.7), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(proxy.logits.grad, gradient(z, h, 0.4), rtol=1e-6, atol=1e-9)


def test_fml_sends_the_proxy_alone_and_keeps_private_models(make_data, make_config, tmp_path):
    data = make_data()
    plain = run(make_config("fedavg"), out=tmp_path / "a", data=data)
    summary = run(make_config("fml", options={"private": "cnn/3"}), out=tmp_path / "b", data=data)
    assert summary["bytes"] == plain["bytes"]
    states = [Client(RunContext(make_config("fml"), data), k, {}) for k in range(2)]
    method, server = FML(), Server(RunContext(make_config("fml"), data))
    method.start(server)
    for client in states:
        method.client_update(client, PHASE, method.send(server, PHASE))
    private, second = (client.state["private"]["head.weight"] for client in states)
    assert not torch.equal(private, second)
    before = private.clone()
    method.client_update(states[0], Phase(1, "train", "update"), method.send(server, PHASE))
    assert not torch.equal(states[0].state["private"]["head.weight"], before)


def test_fml_private_models_begin_apart(make_data, make_config):
    """They differ from the shared model and from each other, and are the same at every call."""
    context = RunContext(make_config("fml"), make_data())
    clients = [Client(context, k, {}) for k in range(2)]
    shared = clients[0].network().state_dict()
    private, second, again = (FML()._private(clients[k]).state_dict() for k in (0, 1, 0))
    weights = [name for name in shared if name.endswith("weight") and shared[name].dim() > 1]
    assert not any(torch.equal(private[name], shared[name]) for name in weights)
    assert not any(torch.equal(private[name], second[name]) for name in weights)
    assert all(torch.equal(private[name], again[name]) for name in private)
    assert all(torch.equal(shared[name], value) for name, value in clients[1].network().state_dict().items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("buffers", ["average", "local"])
def test_fml_without_mutual_terms_is_fedavg(buffers, make_data, make_config, tmp_path):
    """With alpha = beta = 1 neither network affects the other, and the proxy trains as FedAvg's network."""
    data = make_data()
    run(make_config("fedavg", buffers=buffers, **EQUAL), out=tmp_path / "a", data=data)
    run(make_config("fml", options={"alpha": 1, "beta": 1}, buffers=buffers, **EQUAL), out=tmp_path / "b", data=data)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_fml_private_models_of_another_kind(make_data, make_config, tmp_path):
    with pytest.raises(UserError, match='there is no model "cn", choose one of'):
        run(make_config("fml", options={"private": "cn"}), out=tmp_path / "a", data=make_data())
    with pytest.raises(UserError, match='must be MODEL or MODEL/WIDTH, not "cnn/x"'):
        run(make_config("fml", options={"private": "cnn/x"}), out=tmp_path / "b", data=make_data())
    assert not any(tmp_path.iterdir())


def test_the_parsed_names_are_the_published_ones():
    options = {option.name for option in FedLPFM.Options.list_options()}
    assert {"teacher", "lambda", "temperature", "prompts"} <= options
    assert math.isclose(FedLPFM.Options().lam, 0.5)
    assert models.MODELS["mobilenetv2"].width == 32
