"""Client weights for the worst mixture: updates, effect, a saddle point, and the projection on a chi-square ball."""

import math
import time
import types

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fedkern import ops
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.methods import AFL, Federation, Phase, Upload
from fedkern.methods.common.robust_weights import distance, exponentiated_step, project
from fedkern.settings.config import load_settings
from python_tests.interrupted import Kill, KillAt, outcome
from python_tests.methods.feddra_parts import JOINT, LOSSES, SETTINGS

# Client weights.


def losses(p, values):
    """Return the server's step for these losses."""
    p.method.server_update(p.server, LOSSES, iter([Upload(k, 1, {"loss": value}) for k, value in enumerate(values)]))
    p.server.state["current"] = []  # they were asked about no model
    return p.method.weights(p.server)


def test_weights_follow_losses_within_the_ball(parts):
    p = parts(rho=0.1)
    assert np.allclose(p.method.weights(p.server), 1 / 3)
    assert np.allclose(losses(p, [2.0, 2.0, 2.0]), 1 / 3, atol=1e-15)
    w = losses(p, [1.0, 1.0, 2.0])
    assert w[2] > w[1] == w[0]
    for _ in range(20):
        w = losses(p, [1.0, 1.0, 5.0])
    assert distance(w) == pytest.approx(0.1, abs=1e-9)
    assert p.server.report["weights_distance"] == pytest.approx(0.1, abs=1e-9)
    assert p.server.report["robust_worst_loss"] == 5.0
    assert np.allclose(losses(parts(rho=0.0), [1.0, 2.0, 9.0]), 1 / 3, atol=1e-15)


def test_the_other_centre_is_the_shares_of_the_samples(parts):
    p = parts(weighting="samples", rho=0.05)
    shares = np.array([20, 13, 9]) / 42
    assert np.allclose(p.method.weights(p.server), shares)
    for _ in range(9):
        w = losses(p, [1.0, 1.0, 9.0])
    assert distance(w, shares) == pytest.approx(0.05, abs=1e-9)
    assert w[2] > shares[2]


def test_an_average_uses_the_weights(parts):
    p = parts(stages="one")
    w = losses(p, [1.0, 2.0, 4.0])
    _, uploads = p.exchange(JOINT)
    expected = sum(w[u.client_id] * u.message["parameters"].double() for u in uploads)
    assert torch.allclose(p.server.state["parameters"].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_round_of_clients_without_weight_still_has_a_mean(parts):
    p = parts(stages="one")
    p.server.state["weights"] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    p.exchange(JOINT, chosen=[0, 1])
    assert torch.isfinite(p.server.state["parameters"]).all()


def test_one_sgd_step_on_weighted_losses_is_the_weighted_average(parts):
    """Method notes 3.6.

    Batch norm's statistics are averaged with other weights.
    """
    results = {}
    sgd = {"optimizer": "sgd", "momentum": 0.0, "local_steps": 1, "lr": 0.05}
    for apply in ("aggregate", "loss"):
        p = parts(settings=sgd, stages="one", dro_apply=apply, anchors=False)
        losses(p, [1.0, 2.0, 4.0])
        before = p.server.state["parameters"].clone()
        p.exchange(JOINT)
        results[apply] = p.server.state["parameters"] - before
    assert results["loss"].norm() > 0
    assert (results["aggregate"] - results["loss"]).abs().max() < 1e-5 * results["loss"].abs().max()


def test_adamw_does_not_see_the_weights_of_the_released_code(parts):
    """Method notes 3.6: Adam is invariant to the scale of a loss, and the average is uniform."""
    results = []
    for values in ([1.0, 1.0, 1.0], [0.0, 0.0, 4.0]):
        p = parts(settings={"weight_decay": 0.05}, stages="one", dro_apply="loss_code", anchors=False)
        w = losses(p, values)
        sent, _ = p.exchange(JOINT)
        assert [sent[k]["scale"] for k in range(3)] == pytest.approx(w.tolist())
        results.append(p.server.state["parameters"] - p.context.networks.initial()["parameters"])
    assert np.ptp(w) > 0.4
    # But for gradients that are nothing but rounding (biases before batch norm), which Adam makes as large as any.
    close = (results[0] - results[1]).abs() < 0.01 * results[0].abs().max()
    assert close.float().mean() > 0.9


def report_losses(p, values):
    """Return every client's reported losses of models with the losses ``values``, by client."""
    told = {client.id: [] for client in p.clients}
    for value in values:
        p.method.judge = lambda model, batch, value=value: torch.tensor(value)
        for upload in p.exchange(LOSSES)[1]:
            told[upload.client_id].append(upload.message["loss"])
    return told


def test_a_loss_is_the_mean_over_the_latest_rounds_of_enough_samples(parts):
    """A fifth of 40, 20 and 13 samples in batches of 3: each round judges 6, 3 and 3 samples."""
    values = [1.0, 2.0, 4.0, 8.0]
    assert report_losses(parts(sizes=(40, 20, 13), loss_share=0.2), values) == dict.fromkeys(range(3), values)
    p = parts(sizes=(40, 20, 13), loss_share=0.2, loss_samples=7)
    means = [1.0, 1.5, 7 / 3, 14 / 3]
    assert report_losses(p, values) == {0: [1.0, 1.5, 3.0, 6.0], 1: pytest.approx(means), 2: pytest.approx(means)}
    assert [client.state["losses"].tolist() for client in p.clients] == [
        [[8.0, 6.0], [4.0, 6.0]], *[[[8.0, 3.0], [4.0, 3.0], [2.0, 3.0]]] * 2
    ]  # fmt: skip
    client, before = p.clients[0], p.clients[0].state["losses"].clone()
    client.state["losses"] = kept = torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    assert p.method.running(client, 3.0, 6) == pytest.approx((18 + 10) / 7)  # by samples, not by rounds
    assert kept.tolist() == [[10.0, 1.0]]  # what a refused client gets back
    assert p.method.running(client, 3.0, 7) == 3.0
    assert len(before) == 2


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["afl", "feddra"])
def test_kept_losses_move_to_workers_and_are_resumed(method, make_data, make_pairs, make_config, tmp_path):
    settings, data = ({"rounds": 3}, make_data) if method == "afl" else ({**SETTINGS, "rounds": 3}, make_pairs)

    def play(name, listener=None, **changes):
        feddra = {"alignment_steps": 1, "stage_schedule": "sequential"}  # whose anchors need kept inputs of the heads
        options = {"loss_samples": 9, **(feddra if method == "feddra" else {})}
        config = make_config(method, **settings, options=options, **changes)
        return (
            run(config, out=tmp_path / name, data=data(), listener=listener)
            if listener
            else run(config, out=tmp_path / name, data=data())
        )

    play("one")
    play("two", workers=2)
    with pytest.raises(Kill):
        play("killed", KillAt("client", 1, round=2))
    run(load_settings(tmp_path / "killed"), out=tmp_path / "killed", data=data(), resume=True)
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one") == outcome(tmp_path / "killed")
    states = [Checkpoints(tmp_path / name).last_client_state(2) for name in ("one", "two", "killed")]
    assert all(torch.equal(state["losses"], states[0]["losses"]) for state in states)
    assert len(states[0]["losses"]) > 1
    assert method == "afl" or states[0]["heads"].keys() == {"rows", "image_head", "text_head"}


def test_too_few_samples_are_named(make_pairs, make_config, tmp_path):
    with pytest.raises(UserError, match="Client 1 has 3 samples"):
        run(make_config("feddra", **SETTINGS, clients=2), out=tmp_path, data=make_pairs((9, 3)))
    given = {**SETTINGS, "options": {**SETTINGS.get("options", {}), "loss_split": "train"}}
    run(make_config("feddra", **given, clients=2), out=tmp_path, data=make_pairs((9, 3)))  # none is kept from it


def test_agnostic_learning_leaves_the_published_ball(make_data, make_config, tmp_path):
    config = make_config("afl", rounds=3, options={"eta": 5.0, "loss_share": 0.3})
    metrics = run(config, out=tmp_path, data=make_data())["metrics"]
    assert metrics["weights_distance"] <= 1.0
    assert metrics["largest_weight"] > 0.4
    assert AFL().radius == math.inf


# A truth that can be computed.

OPTIMA = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [4.0, 4.0]])
OFFSETS = np.array([0.5, 1.0, 0.0, -3.0])


class Quadratic(AFL):
    """Clients with L_k = |theta - a_k|^2 / 2 + b_k in the plane, one gradient step a round."""

    rho = 0.0

    @property
    def radius(self):
        return self.rho

    def client_update(self, client, phase, message):
        theta = self.held(client, message)["parameters"]
        if phase.exchange == "losses":
            client.state["model"] = {"parameters": theta}
            away = theta.double().numpy() - OPTIMA[client.id]
            return {"loss": float(away @ away / 2 + OFFSETS[client.id])}
        return {"parameters": theta - 0.05 * (theta - torch.tensor(OPTIMA[client.id], dtype=torch.float32))}


def best_weights(rho):
    """Return the weights of the saddle point, where the least mixed loss is largest."""

    def least(w):
        return -(w @ (OFFSETS + (OPTIMA**2).sum(1) / 2) - ((w @ OPTIMA) ** 2).sum() / 2)

    ball = {"type": "ineq", "fun": lambda w: 2 * rho + 1 - 4 * w @ w}
    even = {"type": "eq", "fun": lambda w: w.sum() - 1}
    start = np.full(4, 0.25)
    return minimize(least, start, bounds=[(0, 1)] * 4, constraints=[ball, even], method="SLSQP").x


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rho", [0.1, 0.5, math.inf])
def test_weights_approach_those_of_the_worst_mixture(rho):
    method = Quadratic(AFL.Options(eta=0.02))
    method.rho = rho
    server = types.SimpleNamespace(
        state={}, round_cache={}, report={}, federation=Federation(800, (5,) * 4, 2), accumulator=ops.Accumulator,
        marks=set(), initial=lambda: {"parameters": torch.zeros(2)},
    )  # fmt: skip
    clients = [types.SimpleNamespace(id=k, samples=5, state={}, report={}) for k in range(4)]
    method.start(server)
    for r in range(800):
        for name in ("update", "losses"):
            phase = Phase(r, "train", name)
            sent = method.send(server, phase)
            uploads = [Upload(c.id, 5, method.client_update(c, phase, sent.get(c.id, sent))) for c in clients]
            method.server_update(server, phase, iter(uploads))
    truth = best_weights(min(rho, 100.0))
    assert np.abs(method.weights(server) - truth).max() < 0.01
    assert np.abs(truth - 0.25).max() > 0.1
    assert np.allclose(server.state["parameters"].numpy(), truth @ OPTIMA, atol=0.05)


# -- robust weights ----------------------------------------------------------------------------------------------------


def spread(p, c):
    return float((p * p / c).sum())


def cases(count, seed=0):
    """Yield (point, rho, centre): few and many clients, small and huge radii, ties, corners, even points."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(rng.integers(2, 7))
        v = rng.dirichlet(np.full(n, rng.choice([0.1, 1.0, 5.0])))
        if i % 4 == 0:  # ties
            v = np.floor(v * 4) + (i % 8 == 0)
            v = v / v.sum() if v.sum() else np.full(n, 1 / n)
        if i % 50 == 0:
            v = np.eye(n)[rng.integers(n)]
        c = np.full(n, 1 / n) if i % 2 else rng.dirichlet(np.full(n, 4.0)) * 0.9 + 0.1 / n
        yield v, float(rng.choice([1e-9, 1e-6, 1e-3, 0.05, 0.3, 1.0, 3.0])), c, bool(i % 2)


def solve(v, rho, c):
    """Return the ball's nearest point by sequential quadratic programming, scaled so that its radius is 1."""
    scale = np.sqrt(2 * rho * c)
    pull = scale * (v - c)
    size = max(np.linalg.norm(pull), 1e-300)
    start = np.zeros(len(v))
    ball = {"type": "ineq", "fun": lambda u: 1 - u @ u, "jac": lambda u: -2 * u}
    even = {"type": "eq", "fun": lambda u: scale @ u / scale.max(), "jac": lambda u: scale / scale.max()}
    result = minimize(
        lambda u: (0.5 * np.sum((scale * u) ** 2) - pull @ u) / size, start,
        jac=lambda u: (scale * scale * u - pull) / size, bounds=[(low, None) for low in -c / scale],
        constraints=[ball, even], method="SLSQP", options={"ftol": 1e-15, "maxiter": 200},
    )  # fmt: skip
    return c + scale * result.x


@pytest.mark.filterwarnings("ignore:Values in x")
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_projection_is_the_solvers(count):
    for v, rho, c, uniform in cases(count):
        p = project(v, rho, None if uniform else c)
        assert p.min() >= 0
        assert abs(p.sum() - 1) < 1e-12
        assert spread(p, c) <= 2 * rho + 1 + 1e-9
        assert np.abs(p - solve(v, rho, c)).max() < 1e-6 * min(1, math.sqrt(2 * rho))  # relative to the ball
        inside = 0.9 * p + 0.1 * c
        assert np.array_equal(project(inside, rho, None if uniform else c), inside)


def test_radius_zero_is_the_centre_and_the_whole_simplex_holds_its_corners():
    c = np.array([0.5, 0.3, 0.2])
    corner = np.array([0.0, 1.0, 0.0])
    assert np.allclose(project(corner, 0.0), 1 / 3, atol=1e-15)
    assert np.array_equal(project(corner, 0.0, c), c)
    assert np.array_equal(project(corner, 1.0), corner)  # (3 - 1) / 2
    assert np.array_equal(project(corner, math.inf), corner)
    assert project(corner, 0.99).max() < 1
    assert distance(corner) == pytest.approx(1.0)


def test_ten_thousand_clients_take_milliseconds():
    rng = np.random.default_rng(0)
    v, c = rng.dirichlet(np.full(10_000, 0.3)), rng.dirichlet(np.full(10_000, 5.0))
    for centre, limit in ((None, 0.02), (c, 0.2)):  # the best of some on a busy machine; 1 ms and 20 ms on an idle one
        best = min(_seconds(lambda centre=centre: project(v, 0.05, centre)) for _ in range(10))
        assert best < limit
    assert spread(project(v, 0.05, c), c) == pytest.approx(1.1, abs=1e-9)


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# The exponentiated step.


def test_equal_losses_leave_the_weights_alone_and_a_larger_one_raises_its_own():
    w = np.array([0.5, 0.3, 0.2])
    assert np.allclose(exponentiated_step(w, np.full(3, 7.0), 0.5), w, atol=1e-15)
    corner = np.array([0.0, 0.6, 0.4])  # at zero a client starts from a floor, but not where nothing is to be gained
    assert np.array_equal(exponentiated_step(corner, np.full(3, 7.0), 0.5), corner)
    v = exponentiated_step(w, np.array([1.0, 1.0, 3.0]), 0.5)
    assert v[2] > w[2]
    assert v[0] / v[1] == pytest.approx(w[0] / w[1])
    assert v[2] / v[1] == pytest.approx(w[2] / w[1] * math.exp(0.5 * 2))


def test_huge_losses_do_not_overflow():
    v = exponentiated_step(np.full(3, 1 / 3), np.array([1e6, 0.0, 1e6]), 10.0)
    assert np.allclose(v, [0.5, 0, 0.5])


def test_a_client_at_zero_comes_back():
    w = np.array([0.0, 0.6, 0.4])
    for _ in range(20):
        w = project(exponentiated_step(w, np.array([3.0, 1.0, 1.0]), 0.5), 1.0)
    assert w[0] > 0.9


def test_absent_clients_keep_their_weight():
    w = np.array([0.4, 0.3, 0.2, 0.1])
    v = exponentiated_step(w, np.array([np.nan, 1.0, np.nan, 5.0]), 1.0)
    assert v[0] == pytest.approx(0.4)
    assert v[2] == pytest.approx(0.2)
    assert v[3] > w[3]
    assert np.allclose(exponentiated_step(w, np.full(4, np.nan), 1.0), w)
