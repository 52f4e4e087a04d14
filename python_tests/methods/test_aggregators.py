"""Robust rules, server optimisers, fixed points by formula, and batches that could end in a single sample."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedkern
from fedkern import ops
from fedkern.data import Split
from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import AGGREGATORS, METHODS, FedAvg, FedIOD, register_aggregator
from fedkern.methods.aggregators import Gathered, Rule
from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.server_rules import ServerRule
from fedkern.settings.config import RunConfig
from python_tests.interrupted import KillAt, check_interruption

SIZES = (20, 13, 9, 15, 11)
AVERAGED = {"fedproto": {"options": {"networks": "averaged"}}}


@pytest.fixture
def rules(registries):
    return register_aggregator


def vectors(count=7, size=5):
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(1)))


WEIGHTS = [3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 2.0]


@pytest.mark.parametrize(("text", "expected"), [
    ("median", lambda x, w: ops.median(x, w)),
    ("trimmed_mean", lambda x, w: ops.trimmed_mean(x, 1, w)),
    ("trimmed_mean:trim=2", lambda x, w: ops.trimmed_mean(x, 2, w)),
    ("krum", lambda x, w: ops.krum(x, 1, 1)),
    ("krum:keep=3,byzantine=2", lambda x, w: ops.krum(x, 2, 3)),
    ("geometric_median", lambda x, w: ops.geometric_median(x, w)),
])  # fmt: skip
def test_a_rule_is_the_operator(text, expected):
    assert torch.equal(Rule(text)(vectors(), WEIGHTS), expected(vectors(), WEIGHTS))


def test_the_text_of_a_rule_is_the_same_for_every_spelling():
    for text in ("krum", " krum ", "krum:byzantine=1", "krum:keep=1, byzantine = 1"):
        assert Rule(text).text == "krum:byzantine=1,keep=1"
    assert Rule("median").text == "median"
    assert RunConfig.make("fedavg", aggregator="trimmed_mean").aggregator == "trimmed_mean:trim=1"
    assert RunConfig.make("fedavg").aggregator == "mean"


@pytest.mark.parametrize(("text", "message"), [
    ("medien", '--aggregator must be one of mean, median, .*, not "medien".*Did you mean "median"'),
    ("median:trim=1", 'has no option "trim=1".*It has no options'),
    ("krum:keeps=1", 'has no option "keeps=1".*Did you mean "keep".*It has byzantine, keep'),
    ("krum:", 'has no option ""'),
    ("krum:keep", 'has no option "keep"'),
    ("krum:keep=1,keep=2", "has the option keep twice"),
    ("krum:keep=many", 'Option "keep" of --aggregator krum must be an integer, not "many"'),
])  # fmt: skip
def test_a_text_that_is_no_rule(text, message):
    with pytest.raises(UserError, match=message):
        RunConfig.make("fedavg", aggregator=text)


@pytest.mark.parametrize(("text", "message"), [
    ("trimmed_mean:trim=3", r"trim=3 cannot combine 5 uploads \(trim must be less than half"),
    ("trimmed_mean:trim=-1", "cannot combine 5 uploads"),
    ("krum:byzantine=2", r"cannot combine 5 uploads \(byzantine must be less than"),
])  # fmt: skip
def test_too_few_clients_are_found_before_anything_is_written(make_data, make_config, refuses, tmp_path, text, message):
    config = make_config("fedavg", aggregator=text)
    with refuses(message):
        run(config, out=tmp_path / "run", data=make_data(SIZES))


def train(make_data, make_config, out, **settings):
    run(make_config("fedavg", **settings), out=out, data=make_data(SIZES))
    return torch.cat([value.flatten().double() for value in read_model(out)[0].state_dict().values()])


class Hostile(FedAvg):
    """FedAvg with a client whose upload is an outlier."""

    def client_update(self, client, phase, message):
        answer = super().client_update(client, phase, message)
        if client.id == 2:
            answer["parameters"] = answer["parameters"] + 1e3
        return answer


def test_a_run_takes_the_rule_and_ignores_an_outlier(make_data, make_config, tmp_path, monkeypatch):
    usual = train(make_data, make_config, tmp_path / "usual")
    monkeypatch.setitem(METHODS, "fedavg", Hostile)
    for text in ("krum", "mean"):
        attacked = train(make_data, make_config, tmp_path / text, aggregator=text)
        assert (float((attacked - usual).abs().max()) < 20) == (text != "mean"), text


@pytest.mark.parametrize("text", ["median", "trimmed_mean", "krum", "geometric_median"])
def test_robust_rules_ignore_an_outlier(text):
    hostile = vectors()
    hostile[2] = hostile[2] + 1e3
    assert float((Rule(text)(hostile, WEIGHTS) - Rule(text)(vectors(), WEIGHTS)).abs().max()) < 20


AVERAGING = [name for name, kind in sorted(METHODS.items()) if kind(kind.Options()).averages]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", AVERAGING)
def test_every_method_that_averages_takes_a_rule(method, make_small, tmp_path):
    config, data = make_small(method, 2, aggregator="median", **AVERAGED.get(method, {}))
    run(config, out=tmp_path / "run", data=data)


def test_krum_takes_a_client_with_its_running_statistics(make_data, make_config, tmp_path, monkeypatch):
    seen = []

    class Keeping(FedAvg):
        """FedAvg that looks at its uploads."""

        def server_update(self, server, phase, uploads):
            kept = list(uploads)
            super().server_update(server, phase, iter(kept))
            weights = {name: server.state[name] for name in ("parameters", "buffers")}
            seen.append([all(torch.equal(u.message[name], value) for name, value in weights.items()) for u in kept])

    monkeypatch.setitem(METHODS, "fedavg", Keeping)
    run(make_config("fedavg", aggregator="krum"), out=tmp_path / "run", data=make_data(SIZES))
    assert [found.count(True) for found in seen] == [1, 1]


def test_gathered_vectors_are_cut_as_they_came():
    gathered = Gathered(Rule("trimmed_mean:trim=0"))
    for k, weight in enumerate((1.0, 3.0)):
        message = {"parameters": torch.full((3,), float(k)), "buffers": torch.full((2,), 10.0 * k), "integers": 0}
        gathered.add(message, weight)
    found = gathered.result()
    assert {name: value.tolist() for name, value in found.items()} == {
        "parameters": [0.75, 0.75, 0.75],
        "buffers": [7.5, 7.5],
    }
    assert Gathered(Rule("median")).result() == {}


def test_a_rule_of_ones_own(rules, make_data, make_config, tmp_path):
    calls = []

    @rules("first")
    def first(vectors, weights, row=0, doubled=False):
        """One client's network."""
        calls.append((len(vectors), weights.tolist(), row))
        return vectors[row] * (2 if doubled else 1)

    config = make_config("fedavg", aggregator="first:row=3")
    assert config.aggregator == "first:row=3,doubled=false"
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    assert calls == [(5, [float(n) for n in SIZES], 3)] * 2
    uniform = make_config("fedavg", aggregator="first", options={"weighting": "uniform"})
    run(uniform, out=tmp_path / "uniform", data=make_data(SIZES))
    assert calls[-1] == (5, [1.0] * 5, 0)


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda vectors, weights: 1 / 0, r"cannot combine 5 uploads \(ZeroDivisionError"),
    (lambda vectors, weights: vectors, "must return one floating-point vector of .* elements, not list"),
    (lambda vectors, weights: vectors[0][:3], r"not torch.float32 \[3\]"),
    (lambda vectors, weights: vectors[0].long(), "not torch.int64"),
])  # fmt: skip
def test_what_a_rule_gets_wrong(rules, make_data, make_config, refuses, tmp_path, wrong, message):
    wrong.__doc__ = "Wrong."
    rules("wrong")(wrong)
    with refuses(message):
        run(make_config("fedavg", aggregator="wrong"), out=tmp_path / "run", data=make_data(SIZES))


def test_registering_wrongly(rules):
    def good(vectors, weights):
        """Good."""

    with pytest.raises(ValueError, match='aggregator "mean" is already registered'):
        rules("mean")(good)
    for function, message in (
        (lambda vectors: None, "expected the parameters vectors and weights, given 1"),
        (lambda vectors, weights, trim: None, "expected a default for the option trim"),
        (lambda vectors, weights, trim=None: None, "expected a text or a number as default of trim"),
    ):
        function.__doc__ = "Wrong."
        with pytest.raises(TypeError, match=message):
            rules("own")(function)
    assert "own" not in AGGREGATORS


# -- quadratics --------------------------------------------------------------------------------------------------------


QUADRATIC_SIZES, DIMENSION = (4, 12, 8, 6), 3
STEPS, RATE = 5, 0.1


@pytest.fixture(scope="module")
def clients():
    """Return the inputs fp64 [n, 3] and targets [n, 1] of clients that differ in curvature and in optimum."""
    rng = np.random.default_rng(2)
    pairs = []
    for n in QUADRATIC_SIZES:
        x = rng.normal(size=(n, DIMENSION)) * rng.uniform(0.7, 1.5, DIMENSION)
        y = x @ rng.normal(size=(DIMENSION, 1)) * 2 + 0.1 * rng.normal(size=(n, 1))
        pairs.append((x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)))
    return pairs


def weights(weighting):
    sizes = np.array(QUADRATIC_SIZES) if weighting == "samples" else np.ones(len(QUADRATIC_SIZES))
    return sizes / sizes.sum()


def curvature(x):
    return 2 * x.T @ x / len(x)


def fixed_point(clients, weighting, mu=0.0):
    """Return the fixed point of averaging the clients' results."""
    identity, system, pull = np.eye(DIMENSION), 0.0, 0.0
    for w, (x, y) in zip(weights(weighting), clients, strict=True):
        h = curvature(x) + mu * identity
        q = (identity - np.linalg.matrix_power(identity - RATE * h, STEPS)) @ np.linalg.inv(h)
        system, pull = system + w * q @ curvature(x), pull + w * q @ (2 * x.T @ y / len(x))
    return np.linalg.solve(system, pull)[:, 0]


def optimum(clients, weighting):
    """Return the minimum of the weighted mean of the clients' losses."""
    parts = [
        (w * curvature(x), w * 2 * x.T @ y / len(x)) for w, (x, y) in zip(weights(weighting), clients, strict=True)
    ]
    return np.linalg.solve(sum(a for a, _ in parts), sum(b for _, b in parts))[:, 0]


def run_quadratics(method, clients, out, rounds, **options):
    """Return the parameters after a run of full-batch gradient descent at the clients, fp64 [3]."""
    sets = [TensorDataset(*(torch.tensor(part, dtype=torch.float32) for part in pair)) for pair in clients]
    torch.manual_seed(0)
    finished = fedkern.simulate(
        method, data=sets, test=TensorDataset(*sets[0].tensors), model=nn.Linear(DIMENSION, 1, bias=False),
        loss_fn=nn.MSELoss(), rounds=rounds, local_epochs=STEPS, batch_size=max(QUADRATIC_SIZES), lr=RATE, momentum=0.0,
        weight_decay=0.0, eval_every=rounds, checkpoint_every=rounds, seed=1, out=out,
        progress=False, pictures=False, **options,
    )  # fmt: skip
    return next(finished.model().parameters()).detach().double().numpy()[0]


TOLERANCE = 2e-6
"""Of parameters around 2 in a run, whose vectors are fp32."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedavg_stops_where_its_formula_says(weighting, clients, tmp_path):
    expected = fixed_point(clients, weighting)
    assert (
        np.abs(run_quadratics("fedavg", clients, tmp_path / "run", 30, weighting=weighting) - expected).max()
        < TOLERANCE
    )
    assert np.abs(expected - optimum(clients, weighting)).max() > 0.1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_fedprox_stops_where_its_formula_says(mu, clients, tmp_path):
    expected = fixed_point(clients, "samples", mu)
    assert np.abs(run_quadratics("fedprox", clients, tmp_path / "run", 40, mu=mu) - expected).max() < TOLERANCE
    plain, best = fixed_point(clients, "samples"), optimum(clients, "samples")
    assert 0.1 < np.abs(expected - best).max() < np.abs(plain - best).max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "rounds", "options"), [
    ("scaffold", 40, {"control": "I"}),
    ("scaffold", 40, {"control": "II"}),
    ("feddyn", 150, {"alpha": 0.5}),
    ("scaffold", 200, {"control": "II", "sample_fraction": 0.5}),
    ("feddyn", 300, {"alpha": 0.5, "sample_fraction": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_optimum_that_fedavg_misses_is_reached(weighting, method, rounds, options, clients, tmp_path):
    best = optimum(clients, weighting)
    theta = run_quadratics(method, clients, tmp_path / "run", rounds, weighting=weighting, **options)
    assert np.abs(theta - best).max() < TOLERANCE
    assert np.abs(fixed_point(clients, weighting) - best).max() > 0.1


# -- server rules ------------------------------------------------------------------------------------------------------


RULE_SIZES = (20, 13, 9)
ONCE = [name for name, kind in sorted(METHODS.items()) if kind(kind.Options()).allows_server_rule]


def weights_of(out):
    return torch.cat([value.flatten().double() for value in read_model(out)[0].state_dict().values()])


@pytest.mark.parametrize("rule", ["momentum", "adam", "yogi", "adagrad"])
def test_a_rule_is_the_operator_over_rounds(rule):
    given, state = ServerRule(rule, 0.5), {"parameters": torch.randn(9)}
    expected, moments = state["parameters"].clone(), [torch.zeros(9), torch.zeros(9)]
    names = ("first",) if rule == "momentum" else ("first", "second")
    for _ in range(3):
        average = torch.randn(9)
        expected = ops.server_step(
            expected, [average], [1.0], rule, learning_rate=0.5, **dict(zip(names, moments, strict=False)),
            **given.options,
        ).model  # fmt: skip
        before = state.get("server_first")
        kept = None if before is None else before.clone()
        state["parameters"] = given.step(state, average)
        assert torch.equal(state["parameters"], expected)
        if before is not None:
            assert torch.equal(before, kept)  # a checkpoint may still be written from it
    assert sorted(state) == ["parameters", *(f"server_{name}" for name in names)]


def test_the_text_of_a_rule():
    assert ServerRule("adam").text == "adam:beta1=0.9,beta2=0.99,tau=0.001"
    assert RunConfig.make("fedavg", server_rule="yogi:tau=0.01").server_rule == "yogi:beta1=0.9,beta2=0.99,tau=0.01"
    assert ServerRule("adam:beta2=0.9999999").text == "adam:beta1=0.9,beta2=0.9999999,tau=0.001"
    assert ServerRule("mean", 1.0).plain
    assert not ServerRule("mean", 0.5).plain


@pytest.mark.parametrize(("settings", "message"), [
    ({"server_rule": "adm"}, '--server-rule must be one of mean, .*, not "adm".*Did you mean "adam"'),
    ({"server_rule": "adam:beta=1"}, 'has no option "beta=1".*It has beta1, beta2, tau'),
    ({"server_rule": "adam:beta1=2"}, r'"beta1" of --server-rule adam must be in \[0, 1\], not 2'),
    ({"server_rule": "adam:tau=0"}, '"tau" of --server-rule adam must be above 0, not 0'),
    ({"server_lr": 0.0}, "--server-lr must be above 0"),
])  # fmt: skip
def test_what_is_no_rule(settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig.make("fedavg", **settings)


@pytest.mark.parametrize("settings", [{"server_rule": "adam"}, {"server_lr": 0.5}])
@pytest.mark.parametrize("method", ["feddf", "oneshot-fedavg", "fediod", "local", "feddyn"])
def test_methods_whose_server_does_not_average_once_a_round_refuse_it(method, settings):
    with pytest.raises(UserError, match=f"averages the clients' parameters once a round, which {method}"):
        RunConfig.make(method, **settings)


@pytest.mark.parametrize("schedule", ["per_round", "sequential"])
def test_stages_that_average_a_part_refuse_it(schedule):
    with pytest.raises(UserError, match="once a round, which feddra"):
        RunConfig.make("feddra", server_rule="adam", options={"stages": "two", "stage_schedule": schedule})


def test_the_servers_rate_is_a_step_towards_the_average(make_data, make_config, tmp_path):
    data = make_data(RULE_SIZES)
    runs = {lr: make_config("fedavg", rounds=1, server_lr=lr, buffers="drop") for lr in (1e-9, 0.5, 1.0)}
    for lr, config in runs.items():
        run(config, out=tmp_path / str(lr), data=data)
    start, half, full = (weights_of(tmp_path / str(lr)) for lr in runs)
    assert float((full - start).abs().max()) > 1e-3
    torch.testing.assert_close(half, (start + full) / 2, rtol=0, atol=1e-6)
    run(make_config("fedavg", rounds=1, buffers="drop"), out=tmp_path / "usual", data=data)
    assert torch.equal(weights_of(tmp_path / "usual"), full)


def test_moments_survive_an_interruption(make_data, make_config, tmp_path):
    config = make_config("fedavg", rounds=3, server_rule="adam:tau=0.1")
    check_interruption(config, tmp_path, data=make_data(RULE_SIZES), at=KillAt("round", 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ONCE)
def test_every_method_that_averages_once_a_round_takes_a_rule(method, make_small, tmp_path):
    config, data = make_small(method, 2, server_rule="adagrad:tau=0.1", **AVERAGED.get(method, {}))
    run(config, out=tmp_path / "run", data=data)


# -- rest of one -------------------------------------------------------------------------------------------------------


TINY = {"ngf": 2, "ndf": 2, "batch": 4, "student_steps": 2, "iterations": 2, "disc_weight": True}
PUBLIC = {"mode": "public", "batch": 4, "student_steps": 2, "iterations": 2}


@pytest.mark.parametrize(
    ("method", "settings"), [("scaffold", {"options": {"control": "I"}}), ("fedproto", {"buffers": "drop"})]
)
def test_a_client_looks_at_all_its_samples(method, settings, make_data, make_config, tmp_path):
    """501 samples are evaluated in train mode, in batches of 500."""
    config = make_config(method, model="mlp", batch_size=64, rounds=1, grad_cam=0, **settings)
    summary = run(config, out=tmp_path, data=make_data((501, 13, 9), two_tests=False))
    assert 0 <= summary["metrics"]["accuracy"] <= 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("count", [2, 5, 7])
def test_a_student_learns_on_as_many_public_images_as_there_are(count, make_data, make_public, make_config, tmp_path):
    config = make_config("fediod", model="mlp", rounds=1, grad_cam=0, options=PUBLIC)
    told = run(config, out=tmp_path, data=make_public(make_data(), samples=count))["metrics"]
    assert 0 <= told["id_accuracy"] <= 1
    assert told["student_loss"] > 0


@pytest.mark.parametrize(("method", "options"), [("feddf", {}), ("fediod", PUBLIC)])
def test_one_public_image_is_too_few(method, options, make_data, make_public, make_config, refuses, tmp_path):
    rounds = {"rounds": None} if method == "feddf" else {}
    config = make_config(method, model="mlp", options=options, **rounds)
    with refuses("at least 2 public images and this run sets 1 aside: give --public-samples N"):
        run(config, out=tmp_path / "run", data=make_public(make_data(), samples=1))


@pytest.fixture
def critics(make_data, make_config):
    def make(**options):
        given = {**TINY, "critic_layers": 3, **options}  # 8 pixels a side: a last map of one position
        context = RunContext(make_config("fediod", options=given), make_data())
        return Discriminators([Client(context, k, {}) for k in range(3)], FedIOD.Options.parse(given))

    return make


def images(count):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("batch", "count", "parts"),
    [(2, 2, 2), (2, 6, 2), (4, 4, 4), (4, 12, 4), (4, 2, 2), (4, 5, 5), (4, 6, [4, 2]), (4, 9, [4, 5]), (2, 3, 3)],
)
def test_batches_are_judged_by_their_own_statistics_without_a_rest_of_one(batch, count, parts, critics):
    made, x = critics(batch=batch), images(count)
    assert torch.equal(made.judge(x), torch.cat([made.look(part)[1] for part in x.split(parts)], 1))


def test_a_single_image_is_judged_where_it_has_several_positions(critics):
    assert critics().judge(images(1)) is None
    assert critics(critic_layers=2).judge(images(1)).shape == (3, 1)


@pytest.mark.parametrize("count", [1, 5])
def test_teachers_are_compared_on_any_number_of_images(count, make_data, make_config, tmp_path):
    data = make_data(two_tests=False)
    test = data.tests[""]
    data = dataclasses.replace(data, tests={"": Split(test.images[:count], test.labels[:count])})
    config = make_config(
        "fediod", model="cnn", rounds=1, grad_cam=0, options={**TINY, "iterations": 1, "critic_layers": 3}
    )
    assert 0 <= run(config, out=tmp_path, data=data)["metrics"]["ensemble_weighted"] <= 1
