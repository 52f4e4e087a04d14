"""FedDyn's client and server against algorithm 1 of the paper."""

import types

import pytest
import torch
from safetensors.torch import load_file

from fedkern import ops
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.methods import FedDyn, Federation, Phase, Upload

PHASE = Phase(0, "train", "update")
ALPHA = 0.3


class Server:
    """A stand-in for the server of four clients and a network of six parameters."""

    def __init__(self, rounds):
        self.state, self.round_cache, self.marks = {}, {}, set()
        self.federation = Federation(rounds, (10, 30, 20, 40), classes=2)

    def initial(self):
        return {"parameters": torch.zeros(6)}

    def accumulator(self, size):
        return ops.Accumulator(size)


def test_gradient_is_that_of_the_regularised_objective():
    theta = torch.randn(50, dtype=torch.float64, requires_grad=True)
    received, g = (torch.randn(50, dtype=torch.float64) for _ in range(2))
    (-(g * theta).sum() + ALPHA / 2 * ((theta - received) ** 2).sum()).backward()
    gradients = torch.zeros(50, dtype=torch.float64)
    given = types.SimpleNamespace(parameters=received, message={"alpha": ALPHA}, extras={"correction": -g})
    FedDyn().adjust_gradient(theta.detach(), gradients, given)
    torch.testing.assert_close(gradients, theta.grad)


def test_a_client_keeps_its_gradient():
    sent, before = torch.randn(9), torch.randn(9)
    theta = torch.randn(9)

    def train(method, phase, message, extras):
        assert torch.equal(extras["correction"], -before)
        return {"parameters": theta}

    client = types.SimpleNamespace(state={"gradient": before.clone()}, device=torch.device("cpu"), train=train)
    answer = FedDyn().client_update(client, PHASE, {"parameters": sent, "alpha": ALPHA})
    torch.testing.assert_close(client.state["gradient"], before - ALPHA * (theta - sent))
    assert set(answer) == {"parameters"}


@pytest.mark.parametrize("absent", [(), (0, 2)])
def test_server_follows_the_paper_with_h(absent):
    method, server, m = FedDyn(FedDyn.Options(alpha=ALPHA, weighting="uniform")), Server(5), 4
    method.start(server)
    theta, h = server.state["parameters"].double(), torch.zeros(6, dtype=torch.float64)
    for r in range(5):
        present = [k for k in range(m) if k not in absent or r % 2]
        own = {k: torch.randn(6) for k in present}
        assert torch.equal(method.send(server, PHASE)[present[0]]["parameters"], server.state["parameters"])
        method.server_update(server, PHASE, iter([Upload(k, 7 * k + 1, {"parameters": own[k]}) for k in present]))
        h = h - ALPHA / m * sum(own[k].double() - theta for k in present)
        average = sum(own[k].double() for k in present) / len(present)
        theta = average - h / ALPHA
        torch.testing.assert_close(server.state["parameters"].double(), theta, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(server.state["average"].double(), average, rtol=1e-5, atol=1e-6)


def test_weighting_by_samples_scales_alpha():
    server = Server(1)
    for weighting, expected in (("uniform", [0.3] * 4), ("samples", [0.75, 0.25, 0.375, 0.1875])):
        method = FedDyn(FedDyn.Options(alpha=ALPHA, weighting=weighting))
        method.start(server)
        sent = method.send(server, PHASE)
        assert [sent[k]["alpha"] for k in range(4)] == pytest.approx(expected)  # samples 10, 30, 20, 40


def test_what_is_evaluated_and_what_it_costs(make_data, make_config, tmp_path):
    data = make_data()
    avg = run(make_config("fedavg"), out=tmp_path / "avg", data=data)["bytes"]
    for name in ("average", "server"):
        config = make_config("feddyn", options={"evaluate": name})
        dyn = run(config, out=tmp_path / name, data=data)["bytes"]
        assert dyn["up"] == avg["up"]
        assert dyn["down"] == avg["down"] + 8 * 2 * 3  # alpha_k, to three clients in two rounds
    state = Checkpoints(tmp_path / "average")
    state.open()
    server = state.server_state()
    torch.testing.assert_close(server["parameters"], server["average"] + server["shift"])
    sums = {
        name: float(sum(v.double().sum() for k, v in load_file(tmp_path / name / "model.safetensors").items()
                        if k in dict(_network(make_config, data).named_parameters())))
        for name in ("average", "server")
    }  # fmt: skip
    assert sums["average"] == pytest.approx(float(server["average"].double().sum()), rel=1e-6)
    assert sums["server"] == pytest.approx(float(server["parameters"].double().sum()), rel=1e-6)


def _network(make_config, data):
    from fedkern.engine.context import RunContext

    return RunContext(make_config("feddyn"), data).networks.build()


def test_statistics_are_weighted_as_the_models_are(make_pairs, make_config):
    """``--buffers pool`` uses the weights of the average, which are uniform for any ``weighting``."""
    for weighting in ("samples", "uniform"):
        method = FedDyn(FedDyn.Options(weighting=weighting))
        assert method.weight(None, Upload(0, 30, {})) == method.weight(None, Upload(1, 10, {}))
