"""Clients that drop out of a round or are slow."""

from __future__ import annotations

import json

import pytest
import torch
from interrupted import Kill, KillAt, outcome

from fedkern.engine.participants import DROPPED_OUT, LATE, absent_clients, share_of_work
from fedkern.engine.run import run
from fedkern.engine.store.records import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg
from fedkern.settings.config import RunConfig

SIZES = (20, 13, 9, 15)


def many(**settings):
    return RunConfig.make("fedavg", clients=200, **settings)


def test_about_the_given_share_is_missing():
    config, everyone = many(dropout_rate=0.3), range(200)
    found = [absent_clients(config, round, everyone) for round in range(20)]
    assert 0.27 < sum(map(len, found)) / 4000 < 0.33
    assert found[0] != found[1]
    assert set(found[0].values()) == {DROPPED_OUT}
    assert absent_clients(config, 0, range(50)) == {k: why for k, why in found[0].items() if k < 50}
    assert absent_clients(many(), 0, everyone) == {}


def test_one_client_stays():
    config = many(dropout_rate=1.0)
    stayed = {k for round in range(30) for k in {3, 5, 8} - set(absent_clients(config, round, [3, 5, 8]))}
    assert stayed == {3, 5, 8}
    assert len(absent_clients(config, 0, [3, 5, 8])) == 2


def test_slow_clients_do_a_share_that_the_deadline_bounds():
    config = many(straggler_rate=0.4)
    shares = torch.tensor([share_of_work(config, round, k) for round in range(20) for k in range(200)])
    slow = shares[shares < 1]
    assert 0.37 < len(slow) / len(shares) < 0.43
    assert 0.45 < float(slow.mean()) < 0.55
    assert float(shares.min()) > 0
    later = many(straggler_rate=0.4, deadline=2.0)
    assert all(
        share_of_work(later, 3, k) == pytest.approx(min(1.0, 2 * share_of_work(config, 3, k))) for k in range(200)
    )
    dropped = absent_clients(many(straggler_rate=0.4, late_work="drop"), 3, range(200))
    assert dropped == {k: LATE for k in range(200) if share_of_work(config, 3, k) < 1}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fediod", {"dropout_rate": 0.1}, "--dropout-rate is for methods that average .* fediod"),
        ("oneshot-fedavg", {"straggler_rate": 0.1}, "--straggler-rate is for methods .* oneshot-fedavg"),
        ("fedavg", {"deadline": 2.0}, "--deadline is about slow clients: give --straggler-rate too"),
        ("fedavg", {"late_work": "drop"}, "--late-work is about slow clients"),
        ("fedavg", {"straggler_rate": 0.1, "deadline": 0.5}, "--deadline must be at least 1"),
        ("fedavg", {"dropout_rate": 1.5}, r"--dropout-rate must be in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig.make(method, **settings)


def test_who_is_missing_is_sent_to_and_recorded_but_not_averaged(make_data, make_config, tmp_path, monkeypatch):
    averaged = []

    class Seeing(FedAvg):
        """FedAvg that notes its uploads."""

        def weight(self, server, upload):
            averaged.append(upload.client_id)
            return super().weight(server, upload)

    monkeypatch.setitem(METHODS, "fedavg", Seeing)
    config = make_config("fedavg", rounds=4, dropout_rate=0.5, clients=4)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    missing = [absent_clients(config, round, range(4)) for round in range(4)]
    assert sum(map(len, missing)) > 2
    assert averaged == [k for found in missing for k in range(4) if k not in found]
    records = read_metrics(tmp_path / "run")
    told = [[(each["client"], each["reason"]) for each in record.get("dropped", [])] for record in records]
    assert told == [sorted(found.items()) for found in missing]
    one = records[0]["round_bytes_down"] / 4
    assert all(record["round_bytes_down"] == 4 * one for record in records)
    assert [record["round_bytes_up"] for record in records] == [one * (4 - len(found)) for found in missing]


def steps_of(config, data, out, monkeypatch):
    """The numbers of batches that every client trained on, by round."""
    found = {}

    class Counting(FedAvg):
        """FedAvg that counts batches."""

        def loss(self, model, batch, received):
            key = (received.phase.round, received.samples)
            found[key] = found.get(key, 0) + 1
            return super().loss(model, batch, received)

    monkeypatch.setitem(METHODS, "fedavg", Counting)
    run(config, out=out, data=data)
    return found


@pytest.mark.parametrize("limits", [{"local_epochs": 3}, {"local_steps": 11}])
def test_a_slow_client_does_a_part_of_its_steps(make_data, make_config, tmp_path, monkeypatch, limits):
    data = make_data(SIZES)
    whole = steps_of(make_config("fedavg", clients=4, rounds=3, **limits), data, tmp_path / "a", monkeypatch)
    config = make_config("fedavg", clients=4, rounds=3, straggler_rate=0.6, **limits)
    part = steps_of(config, data, tmp_path / "b", monkeypatch)
    shares = {(round, n): share_of_work(config, round, k) for round in range(3) for k, n in enumerate(SIZES)}
    assert part == {key: max(1, int(count * shares[key])) for key, count in whole.items()}
    assert any(share < 1 for share in shares.values())
    record = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    told = {int(k): info.get("work_done", 1.0) for k, info in record["clients"].items()}
    assert told == {k: shares[0, n] for k, n in enumerate(SIZES)}


def test_the_same_clients_are_missing_after_an_interruption_and_on_workers(make_data, make_config, tmp_path):
    settings = {"rounds": 3, "clients": 4, "dropout_rate": 0.3, "straggler_rate": 0.5}
    run(make_config("scaffold", **settings), out=tmp_path / "whole", data=make_data(SIZES))
    config = make_config("scaffold", workers="2", **settings)
    with pytest.raises(Kill):
        run(config, out=tmp_path / "parts", data=make_data(SIZES), listener=KillAt("round", 2))
    run(config, out=tmp_path / "parts", data=make_data(SIZES), resume=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_slow_client_of_fml_does_a_part_of_its_steps(make_data, make_config, tmp_path):
    config = make_config("fml", clients=4, rounds=1, local_epochs=2, straggler_rate=1.0)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    told = read_metrics(tmp_path / "run")[0]["clients"]
    assert {int(k): info["work_done"] for k, info in told.items()} == {k: share_of_work(config, 0, k) for k in range(4)}


def test_a_rule_that_a_thinned_round_is_too_small_for_is_refused_at_once(make_data, make_config, tmp_path):
    config = make_config("fedavg", clients=4, rounds=9, dropout_rate=0.5, aggregator="krum:byzantine=1,keep=1")
    with pytest.raises(UserError, match=r"cannot combine [12] uploads"):
        run(config, out=tmp_path / "run", data=make_data(SIZES))
    assert not (tmp_path / "run").exists()


def test_slow_clients_with_an_epsilon_are_refused(monkeypatch):
    monkeypatch.setattr(METHODS["fedavg"], "promises", classmethod(lambda cls, options: True))
    with pytest.raises(UserError, match="--straggler-rate is not for fedavg with differential privacy"):
        RunConfig.make("fedavg", straggler_rate=0.1)
