"""Single replies cannot end an app: hostile arrays, lists and metrics, in training and in evaluation."""

import json
import logging
import math

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app.error import Error

from fedkern.errors import RunFailed
from fedkern.flower import strategies
from fedkern.flower.array_bytes import FLAT, LISTING, NUMPY
from fedkern.flower.strategies.averaging import pack
from python_tests.flower.fake_grid import FakeGrid, arrays_of, client, content

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("audible")]

START = {"w": np.zeros((20, 30), np.float32), "n": np.array(0)}
AVERAGES = {"FedAvg": {}, "FedAvg, low memory": {"low_memory": True}, "FedAdam": {}}
RULES = {**AVERAGES, "FedMedian": {}, "FedTrimmedAvg": {}, "Krum": {}, "MultiKrum": {}, "GeometricMedian": {}}


def model(seed, scale=0.1):
    return {
        "w": (scale * np.random.default_rng(seed).standard_normal((20, 30))).astype(np.float32),
        "n": np.array(seed),
    }


def strategy_of(name, **named):
    kind = getattr(strategies, name.partition(",")[0])
    return kind(min_available_nodes=2, **RULES[name], **{"fraction_evaluate": 0.0, **named})


def run(strategy, clients, rounds=1):
    return strategy.start(FakeGrid(clients), arrays_of(START), rounds, timeout=5)


def npy(shape, data=b"", descr="<f4"):
    """Return the bytes of a .npy file with a header of any kind."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def with_array(key, array):
    """Return a reply with one array replaced."""

    def reply(message):
        made = content(model(9), loss=1.0)
        made["arrays"][key] = array
        return made

    return reply


def with_listing(text):
    """Return a flat reply with a changed list of its entries."""

    def reply(message):
        flat = pack({key: torch.from_numpy(np.array(value)) for key, value in model(9).items()})
        data = text.encode() if isinstance(text, str) else json.dumps(text).encode()
        flat[LISTING] = Array("uint8", (len(data),), LISTING, data)
        return content(flat, loss=1.0)

    return reply


def with_metrics(**metrics):
    """Return a reply with metrics that Flower has not checked."""

    def reply(message):
        made = content(model(9), loss=1.0)
        for name, value in metrics.items():
            made["metrics"].__dict__["_data"][name] = value
        return made

    return reply


def unreadable(message):
    made = content(model(9), loss=1.0)
    made["arrays"]["w"].__dict__["data"] = 5
    return made


HUGE = "1" + "0" * 4000
ARRAYS = {
    "a shape of 4,000 digits": with_array("w", Array("float32", (1,), NUMPY, npy(f"({HUGE},)"))),
    "two sizes that overflow": with_array("w", Array("float32", (1,), NUMPY, npy(f"({2**40}, {2**40})"))),
    "an empty array that overflows": with_array("w", Array("float32", (1,), NUMPY, npy(f"(0, {2**60}, {2**60})"))),
    "a negative size": with_array("w", Array("float32", (1,), NUMPY, npy("(-1, -600)", bytes(2400)))),
    "a size that is true": with_array("n", Array("int64", (1,), NUMPY, npy("(True,)", bytes(8), "<i8"))),
    "objects": with_array("w", Array("object", (1,), NUMPY, npy("(1,)", bytes(8), "|O"))),
    "no bytes": with_array("w", Array("float32", (20, 30), NUMPY, b"")),
    "an encoding of many requests": with_array("w", Array("float32", (20, 30), "x" * 10_000, b"")),
    "a flat vector of a huge size": lambda message: content(
        ArrayRecord({FLAT: Array("float32", (10**4000,), FLAT, b""), LISTING: Array("uint8", (2,), LISTING, b"[]")})
    ),
    "infinity in the list": with_listing('[["w", [Infinity, 30], "float32"], ["n", [], "int64"]]'),
    "1e400 in the list": with_listing('[["w", [1e400, 30], "float32"], ["n", [], "int64"]]'),
    "NaN in the list": with_listing('[["w", [NaN, 30], "float32"], ["n", [], "int64"]]'),
    "4,000 digits in the list": with_listing(f'[["w", [{HUGE}], "float32"], ["n", [], "int64"]]'),
    "nested lists": with_listing([["w", [[20, 30]], "float32"], ["n", [], "int64"]]),
    "a text for a shape": with_listing([["w", "600", "float32"], ["n", [], "int64"]]),
    "fractions": with_listing([["w", [20.5, 30], "float32"], ["n", [], "int64"]]),
    "a number for a list": with_listing("5"),
    "a dict for a list": with_listing('{"w": [20, 30]}'),
    "a deep list": with_listing("[" * 200_000),
    "no text": with_listing("\x00\xff"),
    "a number for bytes": unreadable,
}
METRICS = {
    "a huge weight": with_metrics(**{"num-examples": 10**5000}),
    "a negative weight": with_metrics(**{"num-examples": -3}),
    "NaN as weight": with_metrics(**{"num-examples": math.nan}),
    "a weight of infinity": with_metrics(**{"num-examples": math.inf}),
    "a text as weight": with_metrics(**{"num-examples": "5"}),
    "a list as weight": with_metrics(**{"num-examples": [1, 2]}),
    "a truth value as weight": with_metrics(**{"num-examples": True}),
    "none as weight": with_metrics(**{"num-examples": None}),
    "a huge metric": with_metrics(loss=10**400),
    "a huge metric in a list": with_metrics(each=[1, 10**5000]),
    "a text as metric": with_metrics(loss="much"),
    "nested metrics": with_metrics(loss=[[1.0], [2.0]]),
    "no weight": lambda message: RecordDict({"arrays": arrays_of(model(9)), "metrics": MetricRecord({"loss": 1.0})}),
    "no metrics": lambda message: RecordDict({"arrays": arrays_of(model(9))}),
    "two records": lambda message: RecordDict(
        {"arrays": arrays_of(model(9)), "m": MetricRecord({"num-examples": 1}), "o": MetricRecord({"num-examples": 1})}
    ),
    "no records": lambda message: RecordDict(),
    "an error": lambda message: Error(code=0, reason="x" * 100_000),
}


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian"])
@pytest.mark.parametrize("attack", [*ARRAYS, *METRICS])
def test_a_hostile_reply_to_training_is_left_out_by_name(attack, name):
    good = {i: client(model(i), i, loss=0.5) for i in (1, 2, 4)}
    wanted = run(strategy_of(name, min_train_nodes=3), good)
    strategy = strategy_of(name, min_train_nodes=4)
    found = run(strategy, {**good, 3: {**ARRAYS, **METRICS}[attack]})
    assert [(left.round, left.node) for left in strategy.left_out] == [(1, 3)]
    assert len(strategy.left_out[0].text) < 4100
    assert found.train_metrics_clientapp[1][f"left-out/{strategy.left_out[0].reason}"] == [3]
    assert all(found.arrays[key].data == wanted.arrays[key].data for key in START)


def trainer(evaluated):
    """Return a node that trains well, and answers evaluations by a function."""
    return lambda message: content(START, 5) if message.metadata.message_type == "train" else evaluated(message)


def score(accuracy, weight=1):
    return trainer(lambda message: RecordDict({"m": MetricRecord({"num-examples": weight, "accuracy": accuracy})}))


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian"])
@pytest.mark.parametrize("attack", METRICS)
def test_a_hostile_reply_to_evaluation_is_left_out_by_name(attack, name, caplog):
    strategy = strategy_of(name, fraction_evaluate=1.0, min_evaluate_nodes=3)
    with caplog.at_level(logging.WARNING):
        found = run(strategy, {1: score(0.25), 3: trainer(METRICS[attack]), 4: score(0.75, 3)})
    (left,) = strategy.left_out
    assert (left.round, left.node) == (1, 3)
    metrics = dict(found.evaluate_metrics_clientapp[1])
    assert metrics == {"accuracy": (0.25 + 3 * 0.75) / 4, f"left-out/{left.reason}": [3]}
    assert "Round 1: the reply of node 3" in caplog.text


def test_an_evaluation_of_other_names_leaves_the_rarer_out(caplog):
    foreign = trainer(lambda message: RecordDict({"m": MetricRecord({"num-examples": 1, "f1": 0.1})}))
    with caplog.at_level(logging.WARNING):
        found = run(strategy_of("FedAvg", fraction_evaluate=1.0), {1: score(0.25), 3: foreign, 4: score(0.75)})
    assert dict(found.evaluate_metrics_clientapp[1]) == {"accuracy": 0.5}
    assert "those of nodes 3" in caplog.text


def test_an_evaluation_without_weights_or_replies_has_no_metrics():
    strategy = strategy_of("FedAvg", fraction_evaluate=1.0)
    assert not run(strategy, {1: score(0.25, 0), 3: score(0.5, 0)}).evaluate_metrics_clientapp
    silent = trainer(lambda message: None)
    found = strategy.start(FakeGrid({1: silent, 3: score(0.5)}), arrays_of(START), 1, timeout=0.2)
    assert dict(found.evaluate_metrics_clientapp[1]) == {"accuracy": 0.5, "left-out/absent": [1]}


@pytest.mark.parametrize(
    "values", [[1.7e308] * 3, [1.7e308, -1.7e308, 1.7e308], [1e300, 1.0, 2.0], [math.inf, 1.0, -math.inf]]
)
@pytest.mark.parametrize("weights", [[1, 1, 1], [2**53, 3, 1]])
def test_metrics_near_the_largest_number_have_a_mean(values, weights):
    clients = {i: client(model(i), weights[i], loss=values[i], each=[values[i]]) for i in range(3)}
    found = run(strategy_of("FedAvg", min_train_nodes=3), clients).train_metrics_clientapp[1]
    wanted = sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True))
    assert found["loss"] == pytest.approx(wanted, nan_ok=True)
    assert found["each"] == pytest.approx([wanted], nan_ok=True)


# -- replies that count, but should be looked at -----------------------------------------------------------------------


def far(message):
    return content({"w": np.full((20, 30), 3e38, np.float32), "n": np.array(1)})


def spike(message):
    made = model(5)
    made["w"][3, 7] = 1e5
    return content(made)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("update", [far, spike])
def test_an_update_far_from_the_others_is_warned_of(name, update, caplog):
    clients = {**{i: client(model(i)) for i in (1, 2, 4, 5)}, 3: update}
    with caplog.at_level(logging.WARNING):
        run(strategy_of(name, min_train_nodes=5), clients)
    assert [line for line in caplog.messages if "max_update_norm" in line] == [
        line for line in caplog.messages if "the update of node 3 has a norm" in line
    ]
    assert "the update of node 3 has a norm" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(
            strategy_of(name, min_train_nodes=4),
            {**{i: client(model(i)) for i in (1, 2, 4)}, 3: client(model(3, 20.0))},
        )
    assert "has a norm" not in caplog.text


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("where", ["all", "one"])
def test_large_models_are_measured_too(low_memory, where, caplog):
    start = {"w": np.ones(400_000, np.float32), "b": np.zeros(3, np.float32)}
    outlier = {"w": start["w"].copy(), "b": start["b"]}
    outlier["w"][slice(None) if where == "all" else slice(5, 6)] += 1e6
    near = {"w": start["w"] + np.float32(1e-3), "b": start["b"]}
    clients = {1: client(near), 2: client(near), 7: client(outlier)}
    strategy = strategies.FedAvg(fraction_evaluate=0.0, min_train_nodes=3, low_memory=low_memory)
    with caplog.at_level(logging.WARNING):
        strategy.start(FakeGrid(clients), arrays_of(start), 1, timeout=5)
    assert "the update of node 7 has a norm" in caplog.text


def fails_from(start_node):
    """Return a node whose replies hold NaN from a round on."""

    def reply(message):
        number = message.content["config"]["server-round"]
        return content(
            model(number) if number < start_node else {"w": np.full((20, 30), np.nan, np.float32), "n": START["n"]}
        )

    return reply


@pytest.mark.parametrize("name", RULES)
def test_a_run_whose_last_rounds_had_no_reply_fails(name, caplog):
    strategy = strategy_of(name)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RunFailed, match=r"no reply of the last 2 rounds .* round 2 the"),
    ):
        run(strategy, {1: fails_from(2), 2: fails_from(2)}, rounds=3)
    assert "Round 2: no reply counts, the model stays as it was." in caplog.text


def test_rounds_without_a_reply_in_between_do_not_end_a_run():
    def one_round(message):
        return fails_from(9 if message.content["config"]["server-round"] == 4 else 2)(message)

    assert run(strategy_of("FedAvg"), {1: one_round, 2: one_round}, rounds=4).arrays


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("FedAvg", 2**40),
        ("FedMedian", 20),
        ("GeometricMedian", 20),
        ("FedTrimmedAvg", 30),
        ("Krum", 20),
        ("MultiKrum", 30),
    ],
)
def test_whole_numbers_are_the_rules_own_choice(name, wanted):
    weights = {10: -0.01, 20: 0.0, 30: 0.01, 2**40: 50.0}
    clients = {
        i: client({"w": np.full((20, 30), weights[n], np.float32), "n": np.array(n)}) for i, n in enumerate(weights, 1)
    }
    settings = {"MultiKrum": {"num_nodes_to_select": 3}, "FedTrimmedAvg": {"beta": 0.25}}.get(name, {})
    found = run(strategy_of(name, min_train_nodes=4, **settings), clients)
    assert int(found.arrays["n"].numpy()) == wanted
