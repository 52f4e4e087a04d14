"""--aggregator: robust rules instead of the mean."""

import pytest
import torch

from fedkern import ops
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import AGGREGATORS, METHODS, FedAvg, register_aggregator
from fedkern.methods.aggregators import Gathered, Rule
from fedkern.settings.config import RunConfig

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
