"""Strategies against Flower's own, through a grid whose replies arrive in any order."""

import inspect
import itertools
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.serverapp import strategy as theirs
from flwr.serverapp.strategy.multikrum import select_multikrum

from fedkern import ops
from fedkern.errors import RunFailed, UserError
from fedkern.flower import adapter, strategies
from fedkern.flower.array_bytes import FLAT
from fedkern.flower.strategies.averaging import pack, unpack
from python_tests.flower.fake_grid import FakeGrid, arrays_of, client, content, numbers

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("audible")]

SHAPES = {"w": (90, 110), "b": (7,), "scale": (), "deep": (3, 4, 5)}
EVERYBODY = {"fraction_evaluate": 0.0, "min_available_nodes": 2}


def model(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {key: (scale * rng.standard_normal(shape)).astype(np.float32) for key, shape in SHAPES.items()}


def move(start, seed, scale=0.1):
    step = model(seed, scale)
    return {key: (value + step[key]).astype(value.dtype) for key, value in start.items()}


START = model(0)
WEIGHTS = [3, 10, 1, 7, 22, 5]


def learners(count=6):
    """Return nodes that move each received model by their own step."""

    def learner(i):
        return lambda message: content(
            move(numbers(message.content["arrays"]), 100 + i), WEIGHTS[i], loss=float(i), each=[1.0, float(i * i)]
        )

    return {1000 + 7 * i: learner(i) for i in range(count)}


def run(strategy, clients=None, order=None, rounds=3, start=START, **named):
    grid = FakeGrid(learners() if clients is None else clients, order)
    arrays = arrays_of(start) if isinstance(start, dict) else start
    return strategy.start(grid, arrays, rounds, timeout=5, **named), grid


def close(left, right, rtol=1e-5, atol=1e-6):
    left, right = numbers(left), numbers(right)
    assert list(left) == list(right)
    for key, value in left.items():
        np.testing.assert_allclose(value, right[key], rtol=rtol, atol=atol, err_msg=key)
        assert value.shape == right[key].shape


def same(left, right):
    assert list(left) == list(right)
    assert all(left[key].data == right[key].data for key in left)


# -- the same as Flower's ----------------------------------------------------------------------------------------------

PAIRS = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdam": {},
    "FedYogi": {"eta": 0.05},
    "FedAdagrad": {},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.34},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
}


@pytest.mark.parametrize("name", PAIRS)
def test_arrays_and_metrics_are_those_of_flower(name):
    settings = {**EVERYBODY, "min_train_nodes": 6, **PAIRS[name]}
    ours, _ = run(getattr(strategies, name)(**settings))
    own, _ = run(getattr(theirs, name)(**settings))
    close(ours.arrays, own.arrays, rtol=1e-4, atol=1e-5)
    assert all(value.dtype == np.float32 for value in numbers(ours.arrays).values())
    for key, record in own.train_metrics_clientapp.items():
        found = ours.train_metrics_clientapp[key]
        assert list(found) == list(record)
        for metric, value in record.items():
            assert found[metric] == pytest.approx(value)


def test_fedavgm_without_momentum_is_the_mean():
    own, _ = run(strategies.FedAvgM(**EVERYBODY, min_train_nodes=6))
    same(own.arrays, run(strategies.FedAvg(**EVERYBODY, min_train_nodes=6))[0].arrays)


@pytest.mark.parametrize("name", [*PAIRS, "GeometricMedian", "DPFedAvg"])
def test_the_constructor_takes_what_flowers_takes(name):
    found = inspect.signature(getattr(strategies, name)).parameters
    wanted = inspect.signature(getattr(theirs, name, theirs.FedAvg)).parameters
    assert list(found)[: len(wanted)] == list(wanted)
    assert [found[key].default for key in wanted] == [parameter.default for parameter in wanted.values()]
    assert set(found) - set(wanted) >= {"seed", "max_update_norm", "low_memory"}


def test_positional_arguments_are_flowers():
    made = strategies.MultiKrum(0.5, 0.25, 3, 4, 5, 1, 2, "n", seed=3, max_update_norm=2)
    assert (made.fraction_train, made.min_available_nodes, made.num_malicious_nodes) == (0.5, 5, 1)
    assert (made.num_nodes_to_select, made.weighted_by_key, made.seed, made.max_update_norm) == (2, "n", 3, 2.0)
    assert isinstance(made, theirs.MultiKrum)
    assert isinstance(strategies.Krum(), strategies.FedAvg)


def test_fedprox_sends_mu():
    seen = []

    def note(message):
        seen.append((message.content["config"]["proximal-mu"], message.content["config"]["server-round"]))
        return content(START)

    run(strategies.FedProx(**EVERYBODY, proximal_mu=0.3), {1: note, 2: note}, rounds=1)
    assert seen == [(0.3, 1), (0.3, 1)]


def test_the_geometric_median_ignores_weights_and_one_far_reply():
    clients = {i: client(move(START, i, 0.01), weight=1) for i in range(5)}
    clients[9] = client(move(START, 9, 1e3), weight=10**9)
    found, _ = run(strategies.GeometricMedian(**EVERYBODY, min_train_nodes=6), clients, rounds=1)
    close(found.arrays, arrays_of(START), atol=0.1)


def test_krum_ranks_updates_that_are_small_beside_the_weights():
    rng = np.random.default_rng(3)
    start = {"w": (0.05 * rng.standard_normal(20_000)).astype(np.float32)}
    replies = [{"w": start["w"] + (1e-5 * rng.standard_normal(20_000)).astype(np.float32)} for _ in range(8)]
    wide = np.stack([reply["w"].astype(np.float64) for reply in replies])
    squares = ((wide[:, None] - wide[None]) ** 2).sum(-1)
    scores = [np.sort(row)[1:6].sum() for row in squares]  # 8 - 1 - 2 others
    clients = {i: client(reply) for i, reply in enumerate(replies)}
    settings = {**EVERYBODY, "min_train_nodes": 8, "num_malicious_nodes": 1}
    found, _ = run(strategies.Krum(**settings), clients, rounds=1, start=start)
    same(found.arrays, arrays_of(replies[int(np.argmin(scores))]))


# -- any order of arrival, one reply at a time -------------------------------------------------------------------------


LOW_MEMORY = ("FedAvg", "FedAdam", "FedAvgM")


@pytest.mark.parametrize(
    ("name", "low_memory"), [*((name, False) for name in (*PAIRS, "GeometricMedian")), *((n, True) for n in LOW_MEMORY)]
)
def test_the_order_of_arrival_does_not_change_a_bit(name, low_memory):
    settings = {**EVERYBODY, "min_train_nodes": 4, "low_memory": low_memory, **PAIRS.get(name, {})}
    orders = list(itertools.permutations(range(4)))[::5]
    results = [run(getattr(strategies, name)(**settings), learners(4), order, rounds=2)[0] for order in orders]
    for result in results[1:]:
        same(results[0].arrays, result.arrays)
        assert results[0].train_metrics_clientapp == result.train_metrics_clientapp
    if low_memory:
        kept, _ = run(getattr(strategies, name)(**{**settings, "low_memory": False}), learners(4), rounds=2)
        close(results[0].arrays, kept.arrays, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_the_mean_is_that_of_the_operator_in_the_order_of_nodes(kind):
    rng = np.random.default_rng(1)
    start = {"w": np.zeros(20_000, kind), "b": np.zeros(3, kind)}
    models = [{key: rng.standard_normal(value.shape).astype(kind) for key, value in start.items()} for _ in range(4)]
    clients = {9 - i: client(own, WEIGHTS[i]) for i, own in enumerate(models)}
    found, _ = run(strategies.FedAvg(**EVERYBODY, min_train_nodes=4), clients, (2, 0, 3, 1), rounds=1, start=start)
    for key in start:
        rows = [torch.from_numpy(own[key]) for own in models[::-1]]
        assert np.array_equal(numbers(found.arrays)[key], ops.weighted_mean(rows, WEIGHTS[3::-1]).numpy())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", [strategies.FedAvg, strategies.FedAdam])
def test_replies_that_show_in_the_mean_are_left_out(low_memory, kind):
    good = {i: client(move(START, i), i, loss=0.5) for i in (1, 2, 4, 8)}
    wanted, _ = run(kind(**EVERYBODY, min_train_nodes=4, low_memory=low_memory), good, rounds=2)
    bad = {
        3: client(spoil("b", np.full(7, np.inf, np.float32))),
        9: client(spoil("w", np.full((90, 110), np.nan, np.float32))),
    }
    strategy = kind(**EVERYBODY, min_train_nodes=6, low_memory=low_memory)
    found, _ = run(strategy, {**good, **bad}, rounds=2)
    same(found.arrays, wanted.arrays)
    assert [(left.round, left.node, left.reason) for left in strategy.left_out] == [
        (1, 3, "finite"), (1, 9, "finite"), (2, 3, "finite"), (2, 9, "finite"),
    ]  # fmt: skip
    assert found.train_metrics_clientapp[2]["left-out/finite"] == [3, 9]
    assert found.train_metrics_clientapp[2]["loss"] == 0.5
    averaging = kind(**EVERYBODY, min_train_nodes=2, low_memory=low_memory)
    with pytest.raises(RunFailed, match="holds NaN"):
        run(averaging, bad, rounds=1)
    assert [left.node for left in averaging.left_out] == [3, 9]


class Noted(strategies.FedAvg):
    """A strategy with an override as in apps: it looks at all replies, and calls the original."""

    def aggregate_train(self, server_round, replies):
        self.nodes = [reply.metadata.src_node_id for reply in replies]
        self.nodes += [reply.metadata.src_node_id for reply in replies]
        return super().aggregate_train(server_round, replies)


class Streamed(strategies.FedAvg):
    """A strategy whose override only passes the replies on, and declares it."""

    @strategies.streaming
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        metrics["own"] = server_round
        return arrays, metrics


def test_an_override_gets_the_replies_as_a_list():
    strategy = Noted(**EVERYBODY, min_train_nodes=6)
    found, _ = run(strategy)
    assert strategy.nodes == 2 * list(learners())
    same(found.arrays, run(strategies.FedAvg(**EVERYBODY, min_train_nodes=6))[0].arrays)


@pytest.mark.parametrize("kind", [strategies.FedAvg, Streamed])
def test_one_reply_is_held_at_a_time(kind):
    start = {"w": np.zeros(2_000_000, np.float32)}  # more than is asked for at once
    clients = {i: client({"w": np.full(2_000_000, i, np.float32)}) for i in range(8)}
    found, grid = run(kind(**EVERYBODY, min_train_nodes=8, low_memory=True), clients, rounds=1, start=start)
    assert np.all(numbers(found.arrays)["w"] == 3.5)
    assert found.train_metrics_clientapp[1].get("own", 0) == (kind is Streamed)
    assert grid.most_alive == 1


def test_other_overrides_are_called():
    class Own(strategies.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            config["rate"] = 0.5
            assert grid.run == "the run"
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_evaluate(self, server_round, replies):
            self.evaluated = [reply.metadata.src_node_id for reply in replies]
            return super().aggregate_evaluate(server_round, replies)

    def both(message):
        assert message.metadata.message_type == "evaluate" or message.content["config"]["rate"] == 0.5
        return content(START, 2, accuracy=0.5)

    strategy = Own(min_available_nodes=2)
    found, _ = run(strategy, {5: both, 3: both}, rounds=1)
    assert sorted(strategy.evaluated) == [3, 5]
    assert found.evaluate_metrics_clientapp[1]["accuracy"] == 0.5


def test_messages_of_ones_own_are_taken_as_they_are():
    class Own(strategies.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            record = RecordDict({"arrays": arrays, "config": ConfigRecord({"mine": 1})})
            return self._construct_messages(record, sorted(grid.get_node_ids()), "train.mine")

    found, grid = run(Own(**EVERYBODY))
    assert [kind for kind, _ in grid.sent] == ["train.mine"] * 3
    close(found.arrays, run(theirs.FedAvg(**EVERYBODY, min_train_nodes=6))[0].arrays)


def test_aggregate_train_takes_replies_without_a_run():
    grid = FakeGrid({i: client(move(START, i), i + 1) for i in range(3)})
    messages = theirs.FedAvg(min_train_nodes=3).configure_train(1, arrays_of(START), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    found, _ = strategies.FedAvg().aggregate_train(1, replies)
    close(found, theirs.FedAvg().aggregate_train(1, replies)[0])
    assert strategies.FedAvg().aggregate_train(1, []) == (None, None)


def test_metric_functions_of_ones_own_get_the_metrics():
    def count(contents, key):
        assert all(not content.array_records for content in contents)
        return MetricRecord({"total": sum(next(iter(c.metric_records.values()))[key] for c in contents)})

    found, _ = run(strategies.FedAvg(**EVERYBODY, min_train_nodes=6, train_metrics_aggr_fn=count), rounds=1)
    assert found.train_metrics_clientapp[1]["total"] == sum(WEIGHTS)


def test_krums_metrics_are_those_of_the_chosen():
    settings = {**EVERYBODY, "min_train_nodes": 6, "num_malicious_nodes": 1}
    grid = FakeGrid(learners())
    messages = theirs.Krum(**settings).configure_train(1, arrays_of(START), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    (chosen,) = select_multikrum([reply.content for reply in replies], 1, 1)
    _, metrics = strategies.Krum(**settings).aggregate_train(1, replies)
    assert metrics["loss"] == chosen["metrics"]["loss"]


@pytest.mark.parametrize("weights", [(0, 2, 2, 5), (2, 0, 0.0, 1), (-0.0, 1, 0, 3), (0, 0, 0, 0)])
@pytest.mark.parametrize("name", ["Krum", "MultiKrum", "FedMedian", "FedTrimmedAvg", "GeometricMedian", "FedAvg"])
def test_replies_of_no_examples_are_no_part_of_a_choice(name, weights, caplog):
    settings = {**EVERYBODY, "min_train_nodes": 1}
    models = {100 + i: move(START, 0, 0.1 * i) for i in range(4)}
    everybody = FakeGrid({node: client(own, w) for (node, own), w in zip(models.items(), weights, strict=True)})
    voters = FakeGrid({node: reply for node, reply in everybody.clients.items() if weights[node - 100]})
    ours, wanted = (getattr(strategies, name)(**settings) for _ in range(2))
    replies = everybody.send_and_receive(ours.configure_train(1, arrays_of(START), ConfigRecord(), everybody))
    found, metrics = ours.aggregate_train(1, replies)
    if not voters.clients:
        assert found is None
        assert "stays as it was" in caplog.text or "weights of all replies are 0" in caplog.text
        return
    replies = voters.send_and_receive(wanted.configure_train(1, arrays_of(START), ConfigRecord(), voters))
    same(found, wanted.aggregate_train(1, replies)[0])
    nodes = [node for node, weight in zip(models, weights, strict=True) if not weight]
    assert metrics.get("left-out/empty", nodes) == nodes
    assert all(f"node {node} has" in caplog.text for node in nodes) or name == "FedAvg"


# -- replies that do not count -----------------------------------------------------------------------------------------


def spoil(key, value):
    return {**START, key: value}


BAD = {
    "keys": client({key: value for key, value in START.items() if key != "b"}),
    "shapes": client(spoil("b", np.zeros(8, np.float32))),
    "dtypes": client(spoil("b", np.zeros(7, np.int64))),
    "finite": client(spoil("w", np.full(SHAPES["w"], np.nan, np.float32))),
    "norm": client(move(START, 5, 100.0)),
    "weight": lambda message: RecordDict({"arrays": arrays_of(START), "metrics": MetricRecord({"loss": 1.0})}),
    "records": lambda message: RecordDict({"metrics": MetricRecord({"num-examples": 1})}),
    "error": lambda message: Error(code=0, reason="out of memory"),
}


def size(message):
    made = content(START)
    made["arrays"]["w"].data = made["arrays"]["w"].data[:-4]
    return made


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "MultiKrum"])
@pytest.mark.parametrize("reason", [*BAD, "size"])
def test_a_bad_reply_is_left_out_and_named(reason, name, caplog):
    settings = {**EVERYBODY, "min_train_nodes": 2, "max_update_norm": 50.0}
    good = {i: client(move(START, i), 1, loss=0.5) for i in (1, 2, 4)}
    wanted, _ = run(getattr(strategies, name)(**{**settings, "min_train_nodes": 3}), good, rounds=1)
    strategy = getattr(strategies, name)(**{**settings, "min_train_nodes": 4})
    with caplog.at_level(logging.WARNING):
        found, _ = run(strategy, {**good, 3: BAD.get(reason, size)}, rounds=1)
    same(found.arrays, wanted.arrays)
    (left,) = strategy.left_out
    assert (left.round, left.node, left.reason) == (1, 3, reason)
    assert f"Round 1: the reply of node 3 {left.text}: left out." in caplog.text
    metrics = found.train_metrics_clientapp[1]
    assert metrics[f"left-out/{reason}"] == [3]
    assert metrics["loss"] == 0.5
    assert not any(metric.startswith("left-out") for metric in wanted.train_metrics_clientapp[1])


def test_a_run_whose_replies_never_fit_ends_in_one_sentence():
    clients = {i: client({"0": START["w"]}) for i in range(3)}
    with pytest.raises(UserError, match=r"no reply of round 1 counts; that of node 0 lacks 'b': let the ClientApp"):
        run(strategies.FedAvg(**EVERYBODY, min_train_nodes=3), clients)


def test_replies_that_fitted_once_do_not_end_the_run():
    def later(message):
        return content(START if message.content["config"]["server-round"] == 1 else {"0": START["w"]})

    strategy = strategies.FedAvg(**EVERYBODY)
    found, _ = run(strategy, {1: later, 2: later}, rounds=2)
    same(found.arrays, arrays_of(START))
    assert len(strategy.left_out) == 2


def test_a_round_of_failures_keeps_the_model():
    strategy = strategies.FedAvg(**EVERYBODY)

    def late(reply):
        return lambda message: BAD["error"](message) if message.content["config"]["server-round"] == 1 else reply

    made = move(START, 1)
    found, _ = run(strategy, {1: late(content(made)), 2: late(content(made))}, rounds=2)
    close(found.arrays, arrays_of(made))
    assert found.train_metrics_clientapp[1]["left-out/error"] == [1, 2]
    assert "left-out/error" not in found.train_metrics_clientapp[2]


def test_a_run_of_failures_fails_and_names_the_first():
    strategy = strategies.FedAvg(**EVERYBODY)
    with pytest.raises(RunFailed, match=r"FedAvg: no reply of this run has counted, .* in round 1 the reply of node 1"):
        run(strategy, {1: BAD["error"], 2: BAD["error"]}, rounds=2)


def test_weights_of_nought_keep_the_model():
    for name, low_memory in (("FedAvg", False), ("FedAvg", True), ("MultiKrum", False), ("FedAdam", True)):
        strategy = getattr(strategies, name)(**EVERYBODY, low_memory=low_memory)
        assert not run(strategy, {1: client(START, 0), 2: client(START, 0)}, rounds=1)[0].arrays


def test_a_node_that_never_answers_does_not_hold_the_round():
    strategy = strategies.FedAvg(**EVERYBODY, min_train_nodes=2)
    grid = FakeGrid({1: client(move(START, 1)), 2: lambda message: None})
    found = strategy.start(grid, arrays_of(START), 1, timeout=0.2)
    close(found.arrays, arrays_of(move(START, 1)))
    assert found.train_metrics_clientapp[1]["left-out/absent"] == [2]
    assert strategy.left_out == [(1, 2, "absent", "has not come in time")]


def test_an_error_of_the_superlink_has_the_number_of_the_node_it_is_about():
    def unreachable(message):
        return Error(5, "Node unavailable")

    class Unreachable(FakeGrid):
        def pull_messages(self, message_ids):
            for reply in super().pull_messages(message_ids):
                if reply.has_error():
                    reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink, which answers in the node's place
                yield reply

    strategy = strategies.FedAvg(**EVERYBODY)
    strategy.start(Unreachable({4: client(move(START, 1)), 9: unreachable}), arrays_of(START), 1, timeout=5)
    assert [(fault.node, fault.reason) for fault in strategy.left_out] == [(9, "error")]


def test_metrics_of_other_names_are_left_out_of_the_metrics():
    clients = {1: client(START, loss=1.0), 2: client(START, loss=3.0), 3: client(START, accuracy=1.0)}
    found, _ = run(strategies.FedAvg(**EVERYBODY, min_train_nodes=3), clients, rounds=1)
    assert dict(found.train_metrics_clientapp[1]) == {"loss": 2.0}


def test_arguments_out_of_range_are_named():
    for name, value in (("seed", 1.5), ("max_update_norm", -1), ("max_update_norm", float("nan")), ("low_memory", 1)):
        with pytest.raises(UserError, match=f"FedAvg: {name} must be"):
            strategies.FedAvg(**{name: value})
    made = strategies.FedAvg(seed=np.int64(3), max_update_norm=np.float32(0.5))
    assert [(type(value), value) for value in (made.seed, made.max_update_norm)] == [(int, 3), (float, 0.5)]
    with pytest.raises(TypeError, match="fraction_fit"):
        strategies.FedAvg(fraction_fit=0.5)
    arrays = arrays_of(START)
    arrays["w"].stype = "own"
    with pytest.raises(UserError, match=r"'w' in the encoding 'own'"):
        run(strategies.FedAvg(**EVERYBODY), start=arrays)


@pytest.mark.parametrize("version", ["0.9", "1.25.0"])
def test_an_old_flower_is_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: version)
    with pytest.raises(UserError, match=rf"works with flwr 1.26 and later, but flwr {version} is installed: pip"):
        adapter._check_version()


@pytest.mark.parametrize("version", ["1.26.1", "1.40.0", "1.41.0", "1.42.3", "1.43.0.dev20261101", "2.0"])
def test_whole_runs_warn_once_of_a_version_they_are_not_tested_on(version, monkeypatch, caplog):
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: version)
    adapter._check_version()
    with caplog.at_level(logging.WARNING):
        adapter.warn_of_version()
    warned = f"not on flwr {version}, which is installed" in caplog.text
    assert warned == (version[:4] not in ("1.41", "1.42"))


def test_arguments_of_later_flowers_are_passed_on(monkeypatch):
    seen = []
    original = theirs.FedAvg.start

    def start(self, *args, should_stop=None, **named):
        seen.append(should_stop)
        return original(self, *args, **named)

    monkeypatch.setattr(theirs.FedAvg, "start", start)
    run(strategies.FedAvg(**EVERYBODY), learners(2), rounds=1, should_stop=len)
    assert seen == [len]
    monkeypatch.undo()
    with pytest.raises(TypeError, match="should_stop"):
        run(strategies.FedAvg(**EVERYBODY), learners(2), rounds=1, should_stop=len)


# -- buffers -----------------------------------------------------------------------------------------------------------


def with_norms(seed, batches=3):
    rng = np.random.default_rng(seed)
    return {
        "bn.weight": rng.standard_normal(6).astype(np.float32),
        "bn.running_mean": rng.standard_normal(6).astype(np.float32),
        "bn.running_var": rng.uniform(1e-3, 1e-2, 6).astype(np.float32),
        "bn.num_batches_tracked": np.array(batches),
        "mask": np.array([seed == 1, False]),
    }


@pytest.mark.parametrize("name", [*PAIRS, "GeometricMedian"])
def test_counters_stay_whole_and_variances_positive(name):
    clients = {i: client(with_norms(i, 10 * i), 1) for i in range(1, 6)}
    settings = {**EVERYBODY, "min_train_nodes": 5, **PAIRS.get(name, {})}
    found, _ = run(getattr(strategies, name)(**settings), clients, start=with_norms(7), rounds=4)
    made = numbers(found.arrays)
    assert made["bn.num_batches_tracked"].dtype == np.int64
    assert made["bn.num_batches_tracked"].shape == ()
    assert int(made["bn.num_batches_tracked"]) in (10, 20, 30, 40, 50)
    assert made["mask"].dtype == bool
    assert (made["bn.running_var"] > 0).all()


def test_an_optimiser_leaves_running_statistics_their_mean():
    clients = {i: client(with_norms(i), 1) for i in (1, 2)}
    mean, _ = run(strategies.FedAvg(**EVERYBODY), clients, start=with_norms(7), rounds=1)
    found, _ = run(strategies.FedAdam(**EVERYBODY), clients, start=with_norms(7), rounds=1)
    mean, found = numbers(mean.arrays), numbers(found.arrays)
    for key in mean:
        assert np.array_equal(mean[key], found[key]) == (key != "bn.weight"), key


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", [*PAIRS, "FedAvg low_memory", "FedAvg max_update_norm", "GeometricMedian", "DPFedAvg"])
def test_a_mask_of_infinities_leaves_no_reply_out(name, flat):
    """A causal mask in the sent model stays, and everything else is as without the mask.

    Replies with other masks are left out.
    """
    mask = {"mask": np.triu(np.full((5, 5), -np.inf, np.float32), 1)}
    needs = {
        "DPFedAvg": {"clipping_norm": 1.0, "noise_multiplier": 0.0},
        "FedAvg low_memory": {"low_memory": True},
        "FedAvg max_update_norm": {"max_update_norm": 1e6},
    }
    settings = {**EVERYBODY, "min_train_nodes": 6, **PAIRS.get(name, {}), **needs.get(name, {})}
    replies = [move(START, 100 + i) for i in range(6)]

    def ran(models, start):
        clients = {i: client(pack(state(own)) if flat else own, WEIGHTS[i]) for i, own in enumerate(models)}
        strategy = getattr(strategies, name.split()[0])(**settings)
        return run(strategy, clients, start=pack(state(start)) if flat else start, rounds=1)[0].arrays, strategy

    plain, _ = ran(replies, START)
    arrays, strategy = ran([{**own, **mask} for own in replies], {**START, **mask})
    made, expected = (unpack(result) if flat else numbers(result) for result in (arrays, plain))
    assert np.array_equal(np.asarray(made.pop("mask")), mask["mask"])
    for key, value in expected.items():
        np.testing.assert_allclose(np.asarray(made[key]), np.asarray(value), rtol=1e-5, atol=1e-6)
    assert not strategy.left_out
    _, strategy = ran([{**own, "mask": mask["mask"].T if i == 2 else mask["mask"]} for i, own in enumerate(replies)],
                      {**START, **mask})  # fmt: skip
    assert [fault.node for fault in strategy.left_out] == [2]


# -- the choice of nodes -----------------------------------------------------------------------------------------------


def choose(seed, nodes, rounds=4):
    clients = {node: client(START) for node in nodes}
    strategy = strategies.FedAvg(0.4, 0.2, 2, 2, 2, seed=seed)
    grid = FakeGrid(clients)
    strategy.start(grid, arrays_of(START), rounds, timeout=5)
    return [nodes for _, nodes in grid.sent]


def test_nodes_are_chosen_by_seed_and_round_alone():
    nodes = list(range(50, 60))
    found = choose(1, nodes)
    assert found == choose(1, nodes[::-1])
    assert found != choose(2, nodes)
    assert [len(set(own)) for own in found] == [4, 2] * 4
    assert len({tuple(own) for own in found}) > 4


def test_nodes_that_register_later_come_last():
    class Node:
        def __init__(self, node_id, registered_at):
            self.node_id, self.registered_at = node_id, registered_at

    class Grid(FakeGrid):
        def get_nodes(self):
            return [Node(5, "2026-01-02"), Node(9, "2026-01-01"), Node(1, "2026-01-03")]

    assert adapter.nodes(Grid({})) == [9, 5, 1]


def test_waits_for_nodes(monkeypatch):
    clients = {1: client(START)}
    monkeypatch.setattr("time.sleep", lambda seconds: clients.setdefault(len(clients) + 1, client(START)))
    strategy = strategies.FedAvg(fraction_train=0.5, fraction_evaluate=0.0, min_available_nodes=6)
    _, grid = run(strategy, clients, rounds=1)
    assert len(grid.sent[0][1]) == 3  # half of the six that it waited for, not of the one that was there


# -- flat messages -----------------------------------------------------------------------------------------------------


def state(model):
    return {key: torch.from_numpy(np.array(value)) for key, value in model.items()}


def test_pack_and_unpack_give_the_state_back():
    own = state(with_norms(1))
    for record in (pack(own), ArrayRecord(own)):
        found = unpack(record)
        assert list(found) == list(own)
        for key, value in own.items():
            assert torch.equal(found[key], value)
            assert found[key].dtype == value.dtype
    found = unpack(pack(own, torch.bfloat16))
    assert torch.equal(found["bn.weight"], own["bn.weight"].bfloat16().float())
    assert len(pack(own, torch.bfloat16)[FLAT].data) == 2 * 18


def test_pack_and_unpack_name_what_is_wrong():
    with pytest.raises(UserError, match=r"pack: 'w' must be a tensor of real numbers, not torch\.complex64"):
        pack({"w": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(UserError, match="pack: dtype must be"):
        pack({"w": torch.zeros(2)}, torch.int8)
    record = pack({"w": torch.zeros(2)})
    record[FLAT].data = b"\0"
    with pytest.raises(UserError, match="unpack: the record has"):
        unpack(record)


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian"])
def test_flat_and_plain_replies_give_the_same_bits(name):
    models = [with_norms(i) for i in range(3)]
    plain = {i: client(own) for i, own in enumerate(models)}
    mixed = {i: client(pack(state(own)) if i else arrays_of(own)) for i, own in enumerate(models)}
    settings = {**EVERYBODY, "min_train_nodes": 3}
    wanted, _ = run(getattr(strategies, name)(**settings), plain, start=with_norms(7), rounds=2)
    found, _ = run(getattr(strategies, name)(**settings), mixed, start=with_norms(7), rounds=2)
    same(found.arrays, wanted.arrays)
    flat, _ = run(getattr(strategies, name)(**settings), mixed, start=pack(state(with_norms(7))), rounds=2)
    assert FLAT in flat.arrays
    for key, value in unpack(flat.arrays).items():
        assert np.array_equal(value.numpy(), numbers(wanted.arrays)[key])


def test_replies_in_bf16_are_averaged_in_fp64():
    models = [state(model(i)) for i in range(5)]
    clients = {i: client(pack(own, torch.bfloat16), i + 1) for i, own in enumerate(models)}
    found, _ = run(strategies.FedAvg(**EVERYBODY, min_train_nodes=5), clients, rounds=1)
    for key, value in numbers(found.arrays).items():
        rounded = [own[key].bfloat16().double() for own in models]
        wanted = sum((i + 1) * values for i, values in enumerate(rounded)) / 15
        assert np.array_equal(value, wanted.float().numpy())


# -- differential privacy ----------------------------------------------------------------------------------------------


def private(**named):
    return strategies.DPFedAvg(**EVERYBODY, **named)


def test_updates_are_clipped_and_weigh_the_same():
    steps = [0.001, 0.5, 3.0]
    clients = {i: client(move(START, i, step), 10**i) for i, step in enumerate(steps)}
    strategy = private(noise_multiplier=0.0, clipping_norm=2.0, min_train_nodes=3)
    found, _ = run(strategy, clients, rounds=1)
    vector = np.concatenate([value.ravel() for value in START.values()]).astype(np.float64)
    total = 0.0
    for i, step in enumerate(steps):
        moved_model = np.concatenate([value.ravel() for value in move(START, i, step).values()])
        update = moved_model - vector
        total = total + update * min(1.0, 2.0 / np.linalg.norm(update))
    made = np.concatenate([value.ravel() for value in numbers(found.arrays).values()])
    np.testing.assert_allclose(made, vector + total / 3, rtol=1e-6, atol=1e-7)
    assert found.train_metrics_clientapp[1]["epsilon-of-arrays"] == float("inf")


def test_noise_has_the_promised_deviation_and_epsilon_is_that_of_the_releases():
    from fedkern.privacy import Accountant

    start = {"w": np.zeros(200_000, np.float32)}
    clients = {i: client(start) for i in range(4)}
    strategy = private(noise_multiplier=3.0, clipping_norm=0.5, min_train_nodes=4, noise_seed=1)
    found, _ = run(strategy, clients, rounds=2, start=start)
    deviation = 3.0 * 0.5 / 4 * np.sqrt(2)  # of two rounds
    assert numbers(found.arrays)["w"].std() == pytest.approx(deviation, rel=0.01)
    accountant = Accountant()
    accountant.gaussian("arrays", 3.0 / 2, steps=2)
    assert found.train_metrics_clientapp[2]["epsilon-of-arrays"] == accountant.epsilon(1e-5) == strategy.epsilon()
    assert found.train_metrics_clientapp[1]["epsilon-of-arrays"] < strategy.epsilon()


def test_noise_without_a_seed_is_new_in_every_run():
    runs = [run(private(noise_multiplier=1.0, clipping_norm=1.0), learners(2), rounds=1)[0] for _ in range(2)]
    assert not np.array_equal(numbers(runs[0].arrays)["w"], numbers(runs[1].arrays)["w"])


def test_a_reply_left_out_counts_as_no_update():
    clients = {1: client(move(START, 1, 0.001)), 2: BAD["finite"]}
    found, _ = run(private(noise_multiplier=0.0, clipping_norm=10.0), clients, rounds=1)
    for key, value in numbers(found.arrays).items():
        np.testing.assert_allclose(value, (START[key].astype(float) + move(START, 1, 0.001)[key]) / 2, atol=1e-6)


def test_private_counters_stay_and_variances_are_positive():
    clients = {i: client(with_norms(i, 50)) for i in range(2)}
    found, _ = run(private(noise_multiplier=5.0, clipping_norm=1.0), clients, start=with_norms(7, 3), rounds=2)
    made = numbers(found.arrays)
    assert made["bn.num_batches_tracked"] == 3
    assert (made["bn.running_var"] >= 0.0099 * with_norms(7)["bn.running_var"]).all()


def test_private_arguments_are_named():
    for name, value in (("noise_multiplier", -1), ("clipping_norm", 0), ("delta", 1)):
        settings = {"noise_multiplier": 1.0, "clipping_norm": 1.0, name: value}
        with pytest.raises(UserError, match=f"DPFedAvg: {name} must be"):
            strategies.DPFedAvg(**settings)
    strategy = private(noise_multiplier=1.0, clipping_norm=1.0)
    replies = FakeGrid({1: client(START), 2: client(START)}).send_and_receive(
        theirs.FedAvg().configure_train(1, arrays_of(START), ConfigRecord(), FakeGrid({1: None, 2: None}))
    )
    with pytest.raises(UserError, match="call configure_train before aggregate_train"):
        strategy.aggregate_train(1, replies)


def test_flowers_wrappers_clip_and_noise_without_an_accountant():
    strategy = theirs.DifferentialPrivacyServerSideFixedClipping(
        strategies.FedAvg(**EVERYBODY, min_train_nodes=3), 0.0, 1e9, 3
    )
    found, _ = run(strategy, learners(3), rounds=1)
    close(found.arrays, run(strategies.FedAvg(**EVERYBODY, min_train_nodes=3), learners(3), rounds=1)[0].arrays, 1e-4)


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variable", "wanted"), [(None, 1), ("OMP_WAIT_POLICY", 3), ("GOMP_SPINCOUNT", 3)])
@pytest.mark.parametrize("name", ["FedAvg", "FedMedian"])
def test_threads_that_would_spin_are_not_used(variable, wanted, name, monkeypatch):
    for setting in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(setting, raising=False)
    if variable:
        monkeypatch.setenv(variable, "0")
    threads = []

    class Watched(getattr(strategies, name)):
        def _combine(self, gathered, server_round):
            threads.append(torch.get_num_threads())
            return super()._combine(gathered, server_round)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(Watched(**EVERYBODY), learners(2), rounds=1)
        assert (threads, torch.get_num_threads()) == ([wanted], 3)
    finally:
        torch.set_num_threads(before)


def test_multikrum_averages_what_it_chose_by_weight():
    models = [move(START, i, 0.01) for i in range(5)] + [move(START, 9, 5.0)]
    clients = {i: client(own, WEIGHTS[i]) for i, own in enumerate(models)}
    settings = {**EVERYBODY, "min_train_nodes": 6, "num_malicious_nodes": 1, "num_nodes_to_select": 5}
    found, _ = run(strategies.MultiKrum(**settings), clients, rounds=1)
    expected = {
        name: np.average([model[name] for model in models[:5]], axis=0, weights=WEIGHTS[:5]).astype(value.dtype)
        for name, value in START.items()
    }
    close(found.arrays, arrays_of(expected), rtol=1e-6)
