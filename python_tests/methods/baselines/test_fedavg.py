"""FedAvg's server step, and FedProx's gradient."""

import types

import pytest
import torch

from fedkern import ops
from fedkern.engine.run import run
from fedkern.methods import FedAvg, FedProx, Phase, Upload
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


def test_fedprox_adds_the_gradient_of_its_proximal_term():
    theta = torch.randn(50, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(50, dtype=torch.float64)
    (0.5 * 0.3 * ((theta - anchor) ** 2).sum()).backward()
    gradients = torch.zeros(50, dtype=torch.float64)
    received = types.SimpleNamespace(parameters=anchor)
    FedProx(FedProx.Options(mu=0.3)).adjust_gradient(theta.detach(), gradients, received)
    torch.testing.assert_close(gradients, theta.grad)


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
