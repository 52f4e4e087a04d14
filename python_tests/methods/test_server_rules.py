"""--server-rule and --server-lr: server optimisers of the methods that average."""

import pytest
import torch

from fedkern import ops
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.methods.server_rules import ServerRule
from fedkern.settings.config import RunConfig
from python_tests.interrupted import KillAt, check_interruption

SIZES = (20, 13, 9)
AVERAGED = {"fedproto": {"options": {"networks": "averaged"}}}
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
    data = make_data(SIZES)
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
    check_interruption(config, tmp_path, data=make_data(SIZES), at=KillAt("round", 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ONCE)
def test_every_method_that_averages_once_a_round_takes_a_rule(method, make_small, tmp_path):
    config, data = make_small(method, 2, server_rule="adagrad:tau=0.1", **AVERAGED.get(method, {}))
    run(config, out=tmp_path / "run", data=data)
