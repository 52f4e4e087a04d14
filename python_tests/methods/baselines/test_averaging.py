"""Server steps of FedAvg, FedDyn and SCAFFOLD, and their clients, against the papers' algorithms."""

import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from fedkern import ops
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.network import Network
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.methods import FedAvg, FedDyn, Federation, Phase, Scaffold, Upload
from python_tests.saved_network import same_network

PHASE = Phase(0, "train", "update")


class Server:
    def __init__(self):
        self.state, self.round_cache, self.marks = {}, {}, set()

    def accumulator(self, size):
        return ops.Accumulator(size)


def uploads(count, samples, make):
    for k in range(count):
        yield Upload(k, samples[k], make(k))


def vectors(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "parameters": torch.randn(1001, generator=g),
        "buffers": torch.rand(33, generator=g),
        "integers": torch.randint(0, 100, (4,), generator=g),
    }


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_average_of_equal_models_is_that_model(weighting):
    server, method = Server(), FedAvg(FedAvg.Options(weighting=weighting))
    method.server_update(server, PHASE, uploads(7, [3, 1, 4, 1, 5, 9, 2], lambda k: vectors(0)))
    for name, value in vectors(0).items():
        assert torch.equal(server.state[name], value)
        assert server.state[name].dtype == value.dtype


@pytest.mark.parametrize(("weighting", "weights"), [("samples", [3, 1, 6]), ("uniform", [1, 1, 1])])
def test_weighted_average_and_maximum_of_integers(weighting, weights):
    server, method = Server(), FedAvg(FedAvg.Options(weighting=weighting))
    method.server_update(server, PHASE, uploads(3, [3, 1, 6], vectors))
    for name in ("parameters", "buffers"):
        expected = sum(w * vectors(k)[name].double() for k, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(server.state[name], expected.float(), rtol=1e-6, atol=1e-7)
    expected = torch.stack([vectors(k)["integers"] for k in range(3)]).amax(0)
    assert torch.equal(server.state["integers"], expected)


def test_no_upload_changes_nothing():
    server = Server()
    server.state["parameters"] = torch.ones(3)
    FedAvg().server_update(server, PHASE, iter(()))
    assert torch.equal(server.state["parameters"], torch.ones(3))


def test_uploads_are_not_kept():
    import weakref

    alive = []

    def stream():
        for k in range(4):
            assert all(ref() is None for ref in alive)
            message = vectors(k)
            alive.extend(weakref.ref(tensor) for tensor in message.values())
            handover = [Upload(k, 1, message)]
            del message
            yield handover.pop()

    FedAvg().server_update(Server(), PHASE, stream())
    assert len(alive) == 12


@pytest.mark.parametrize(("method", "without", "settings"), [
    ("fedprox", {"mu": 0}, {"mu": 1}),
    ("fedntd", {"beta": 0}, {}),
    ("moon", {"mu": 0}, {}),
    ("fedgid", {"intervention": False, "lambda": 0}, {}),
])  # fmt: skip
def test_without_its_term_a_method_is_fedavg_bit_for_bit(method, without, settings, make_data, make_config, tmp_path):
    """With the term the network differs, and the bytes are the same."""
    data = make_data()
    configs = make_config("fedavg"), make_config(method, options=without), make_config(method, options=settings)
    sent = [run(config, out=tmp_path / str(number), data=data)["bytes"] for number, config in enumerate(configs)]
    assert sent[0] == sent[1] == sent[2]
    assert same_network(tmp_path / "0", tmp_path / "1")
    assert not same_network(tmp_path / "0", tmp_path / "2")


def test_fedprox_holds_clients_closer_to_the_global_model(make_data, make_config, tmp_path):
    from fedkern.engine.store.record_files import read_metrics

    drifts = []
    for mu in (0.0, 1.0, 10.0):
        out = tmp_path / str(mu)
        run(make_config("fedprox", options={"mu": mu}, momentum=0.0, rounds=1, batch_size=4), out=out, data=make_data())
        drifts.append([client["drift"] for client in read_metrics(out)[0]["clients"].values()])
    assert all(a > b > c for a, b, c in zip(*drifts, strict=True))


# -- feddyn ------------------------------------------------------------------------------------------------------------


ALPHA = 0.3


class DynServer:
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
    method, server, m = FedDyn(FedDyn.Options(alpha=ALPHA, weighting="uniform")), DynServer(5), 4
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
    server = DynServer(1)
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


# -- scaffold ----------------------------------------------------------------------------------------------------------


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


# -- qffl --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "weighting"), [(0.0, "samples"), (0.5, "uniform"), (2.0, "samples")])
def test_qffl_takes_the_published_steps(q, weighting, make_data, make_config, tmp_path):
    data, settings = make_data(), {"model": "cnn-gn", "lr": LR, "momentum": 0.0, "batch_size": 64, "local_epochs": 1}
    config = make_config("qffl", rounds=3, options={"q": q, "weighting": weighting}, **settings)
    run(config, out=tmp_path, data=data)
    context = RunContext(config, data)
    network = Network(context.networks.build(), torch.device("cpu"))
    network.write(context.networks.initial())
    plain = network.module.double()
    weights = list(plain.parameters())
    for _ in range(3):
        steps, lipschitz = [torch.zeros_like(weight) for weight in weights], 0.0
        for k in range(3):
            client = context.samples.of_client(k)
            loss = cross_entropy(plain(client.pixels.take(np.arange(len(client))).double()), client.labels)
            gradients = torch.autograd.grad(loss, weights)
            share, power = len(client) if weighting == "samples" else 1, loss.item() ** q
            for step, gradient in zip(steps, gradients, strict=True):
                step += share * power * gradient
            squares = sum(float(gradient.square().sum()) for gradient in gradients)
            lipschitz += share * (q * loss.item() ** (q - 1) * squares + power / LR)
        with torch.no_grad():
            for weight, step in zip(weights, steps, strict=True):
                weight -= step / lipschitz
    trained = load_file(tmp_path / "model.safetensors")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained[name].double(), value, rtol=1e-4, atol=1e-6)
