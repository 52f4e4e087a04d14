"""Participation: sampled clients, dropouts, stragglers, and the state of a policy."""

import json
from dataclasses import replace

import pytest
import torch

from fedkern.engine import participation
from fedkern.engine.run import run
from fedkern.engine.setup import run_objects
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Round
from fedkern.methods.base import Federation
from fedkern.settings.config import RunConfig
from python_tests.interrupted import KillAt, check_interruption, kill_and_resume, outcome, play_killed

pytestmark = pytest.mark.usefixtures("forked_workers")

SIZES = (20, 13, 9, 15)
PHONES = json.dumps([{"name": "phone", "step_seconds": 2.0, "up": 1.0, "down": 1.0}])


def many(**settings):
    return RunConfig.make("fedavg", clients=200, **settings)


def test_about_the_given_share_is_missing():
    config, everyone = many(dropout_rate=0.3), range(200)
    found = [participation.absent_clients(config, round, everyone) for round in range(20)]
    assert 0.27 < sum(map(len, found)) / 4000 < 0.33
    assert found[0] != found[1]
    assert set(found[0].values()) == {participation.DROPPED_OUT}
    assert participation.absent_clients(config, 0, range(50)) == {k: why for k, why in found[0].items() if k < 50}
    assert participation.absent_clients(many(), 0, everyone) == {}


def test_one_client_stays():
    config = many(dropout_rate=1.0)
    stayed = {k for round in range(30) for k in {3, 5, 8} - set(participation.absent_clients(config, round, [3, 5, 8]))}
    assert stayed == {3, 5, 8}
    assert len(participation.absent_clients(config, 0, [3, 5, 8])) == 2


def test_slow_clients_do_a_share_that_the_deadline_bounds():
    config = many(straggler_rate=0.4)
    shares = torch.tensor([participation.share_of_work(config, round, k) for round in range(20) for k in range(200)])
    slow = shares[shares < 1]
    assert 0.37 < len(slow) / len(shares) < 0.43
    assert 0.45 < float(slow.mean()) < 0.55
    assert float(shares.min()) > 0
    later = many(straggler_rate=0.4, deadline=2.0)
    assert all(
        participation.share_of_work(later, 3, k)
        == pytest.approx(min(1.0, 2 * participation.share_of_work(config, 3, k)))
        for k in range(200)
    )
    dropped = participation.absent_clients(many(straggler_rate=0.4, stragglers="drop"), 3, range(200))
    assert dropped == {k: participation.LATE for k in range(200) if participation.share_of_work(config, 3, k) < 1}


FIVE = Federation(rounds=3, samples=(10, 20, 30, 40, 50), classes=2)


def policy(**settings):
    settings = {"clients": 5, "batch_size": 10, "local_epochs": 2, **settings}
    return participation.Participation(RunConfig.make("fedavg", **settings), FIVE)


def test_who_is_asked_in_a_round():
    asked = policy(sample_fraction=0.4)
    assert asked.assign(Round(participants=(3, 4)), 0) == participation.Assignment((3, 4))
    assert list(asked.assign(Round(participants="all"), 1).clients) == [0, 1, 2, 3, 4]
    drawn = asked.assign(Round(), 2).clients
    assert drawn == participation.sample_clients(asked._config, 2) != participation.sample_clients(asked._config, 3)
    assert len(drawn) == len({*drawn}) == 2
    asked.secret = "5a" * 16
    assert asked.assign(Round(), 2).clients == participation.sample_clients(asked._config, 2, "5a" * 16) != drawn


def test_who_is_missing_or_slow_in_an_assignment():
    settings = {"dropout_rate": 0.4, "straggler_rate": 0.6, "deadline": 1.2}
    for late in ("keep", "drop"):
        asked = policy(**settings, stragglers=late)
        for number in range(6):
            given = asked.assign(Round(participants="all"), number)
            assert given.absent == participation.absent_clients(asked._config, number, range(5))
            assert given.began == {}
    assert asked.assign(Round(participants="all", one_off=True), -1) == participation.Assignment(range(5))


def test_the_clock_counts_steps_of_clients_of_usual_speed():
    """A round lasts as long as its slowest client, and a client at most its usual time times the deadline."""
    for deadline in (1.0, 1.5, 1e9):
        asked, clock = policy(straggler_rate=0.5, deadline=deadline), 0.0
        for number in range(4):
            before = asked.clock
            asked.assign(Round(participants=(1, 4)), number)
            times = {
                k: steps / participation.speed(asked._config, number, k) for k, steps in ((1, 4), (4, 10))
            }  # two epochs each
            clock += max(min(times[1], 4 * deadline), min(times[4], 10 * deadline))
            assert asked.clock == pytest.approx(clock)
            assert asked.clock > before
        assert asked.figures() == {"clock": asked.clock}
        asked.assign(Round(one_off=True), -5)
        assert asked.clock == pytest.approx(clock)
    steps = policy(straggler_rate=1e-9, local_epochs=1, local_steps=7)
    steps.assign(Round(), 0)
    assert steps.clock == 7
    assert policy().figures() == policy().state() == {}


@pytest.mark.parametrize(
    ("plan", "settings", "fewest"),
    [
        ([Round()], {}, 5),
        ([Round(), Round()], {"sample_fraction": 0.4}, 2),
        ([Round(participants="all"), Round(participants=(2, 3, 4))], {"sample_fraction": 0.2}, 3),
        ([Round(participants=(1,), one_off=True), Round()], {}, 5),
        ([Round()], {"dropout_rate": 1.0}, 1),
        ([Round(participants=(0, 1))], {"straggler_rate": 1.0, "stragglers": "drop"}, 1),
        ([Round(participants=(0, 1))], {"straggler_rate": 1.0}, 2),
    ],
)
def test_the_fewest_uploads_of_a_plan(plan, settings, fewest):
    assert policy(**settings).fewest_uploads(plan) == fewest


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fediod", {"dropout_rate": 0.1}, "--dropout-rate is for methods that average .* fediod"),
        ("oneshot-fedavg", {"straggler_rate": 0.1}, "--straggler-rate is for methods .* oneshot-fedavg"),
        ("fedavg", {"deadline": 2.0}, "--deadline is about slow clients: give --straggler-rate too"),
        ("fedavg", {"stragglers": "drop"}, "--stragglers is about slow clients"),
        ("fedavg", {"stragglers": "drop", "devices": PHONES}, "--stragglers is about slow clients"),
        ("fedavg", {"straggler_rate": 0.1, "devices": PHONES}, "--devices says how fast every client is, and --strag"),
        ("fediod", {"devices": PHONES}, "--devices is for methods that average .* fediod"),
        ("fedavg", {"straggler_rate": 0.1, "deadline": 0.5}, "--deadline must be at least 1"),
        ("fedavg", {"dropout_rate": 1.5}, r"--dropout-rate must be in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig.make(method, **settings)


def steps_of(config, data, out, monkeypatch):
    """Return every client's number of training batches, by round."""
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


@pytest.mark.sampled(1)
@pytest.mark.parametrize("limits", [{"local_epochs": 3}, {"local_steps": 11}])
def test_a_slow_client_does_a_part_of_its_steps(make_data, make_config, tmp_path, monkeypatch, limits):
    data = make_data(SIZES)
    steps = steps_of(make_config("fedavg", clients=4, rounds=3, **limits), data, tmp_path / "a", monkeypatch)
    config = make_config("fedavg", clients=4, rounds=3, straggler_rate=0.6, **limits)
    part = steps_of(config, data, tmp_path / "b", monkeypatch)
    shares = {
        (round, n): participation.share_of_work(config, round, k) for round in range(3) for k, n in enumerate(SIZES)
    }
    assert part == {key: max(1, int(count * shares[key])) for key, count in steps.items()}
    assert any(share < 1 for share in shares.values())
    record = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    told = {int(k): info.get("work_done", 1.0) for k, info in record["clients"].items()}
    assert told == {k: shares[0, n] for k, n in enumerate(SIZES)}


def test_a_rule_that_a_thinned_round_is_too_small_for_is_refused_at_once(make_data, make_config, refuses, tmp_path):
    config = make_config("fedavg", clients=4, rounds=9, dropout_rate=0.5, aggregator="krum:byzantine=1,keep=1")
    with refuses(r"cannot combine [12] uploads"):
        run(config, out=tmp_path / "run", data=make_data(SIZES))


def test_slow_clients_with_an_epsilon_are_refused(monkeypatch):
    monkeypatch.setattr(METHODS["fedavg"], "is_private", classmethod(lambda cls, options: True))
    with pytest.raises(UserError, match="--straggler-rate is not for fedavg with differential privacy"):
        RunConfig.make("fedavg", straggler_rate=0.1)


def test_the_clock_of_a_run_and_the_shares_of_its_clients(make_data, make_config, tmp_path):
    config = make_config("fedavg", clients=4, rounds=4, straggler_rate=0.6, deadline=1.2, workers="2")
    check_interruption(config, tmp_path, data=make_data(SIZES), at=KillAt("round", 2))
    again = participation.Participation(config, Federation(4, SIZES, 3, config.local_epochs))
    for number, record in enumerate(read_metrics(tmp_path / "whole")):
        shares = {k: participation.share_of_work(config, number, k) for k in again.assign(Round(), number).clients}
        assert record["clock"] == again.clock
        told = {int(k): info["work_done"] for k, info in record["clients"].items() if "work_done" in info}
        assert told == {k: share for k, share in shares.items() if share < 1}
    private = make_config("fedavg", clients=4, rounds=1, straggler_rate=0.6, records="private")
    run(private, out=tmp_path / "private", data=make_data(SIZES))
    assert "clock" not in read_metrics(tmp_path / "private")[0]  # it tells of the clients that were drawn


# -- devices -----------------------------------------------------------------------------------------------------------


def test_devices_decide_who_is_late_and_when_a_round_ends():
    """Clients take 2, 4, 6, 8 and 10 s for their steps, and 2 s, client 2 five, for their bytes."""

    def traffic(k):
        return 125_000, 500_000 if k == 2 else 125_000

    def assign(**settings):
        asked = policy(devices=PHONES, local_epochs=1, **settings)
        return asked.assign(Round(participants="all"), 0, traffic), asked.figures()

    everyone = range(5)
    assert assign() == (participation.Assignment(everyone), {"simulated_seconds": 12.0})
    late = participation.LATE
    kept = participation.Assignment(everyone, shares={2: 0.5, 3: 0.75, 4: 0.6})
    assert assign(deadline=8) == (kept, {"simulated_seconds": 8.0})
    dropped = participation.Assignment(everyone, dict.fromkeys((2, 3, 4), late))
    assert assign(deadline=8, stragglers="drop") == (dropped, {"simulated_seconds": 8.0})
    given, figures = assign(deadline=2)  # nobody has time for a step, and one client may take longer
    (stayed,) = {*everyone} - {*given.absent}
    assert (given.shares, figures) == ({}, {"simulated_seconds": [4.0, 6.0, 11.0, 10.0, 12.0][stayed]})
    asked = policy(devices=PHONES.replace("}]", ', "hours": [3]}]'), local_epochs=1)
    for number, seconds in enumerate((10_812, 10_824)):
        asked.assign(Round(participants="all"), number, traffic)
        assert asked.clock == seconds
    assert policy(devices=PHONES, deadline=8).fewest_uploads([Round()]) == 1


@pytest.mark.parametrize("compress", [None, "int8", "topk:share=0.1"])
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_simulated_seconds_are_those_of_the_bytes_booked(method, compress, make_data, make_config, tmp_path):
    config = make_config(method, clients=4, rounds=2, local_epochs=1, devices=PHONES, compress=compress)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    before, training = 0.0, 2.0 * max(participation.local_steps(config, size) for size in SIZES)
    for record in read_metrics(tmp_path / "run"):
        transfer = (record["round_bytes_up"] + record["round_bytes_down"]) / 4 / 125_000
        assert record["simulated_seconds"] - before == pytest.approx(training + transfer)
        before = record["simulated_seconds"]


@pytest.mark.parametrize("settings", [{"deadline": 7.0}, {"asynchronous": "fedbuff:buffer=2"}])
def test_simulated_seconds_survive_an_interruption(settings, make_data, make_config, tmp_path):
    settings = {"clients": 4, "rounds": 4, "batch_size": 5, "compress": "int8", "workers": "2", **settings}
    config = make_config("fedavg", devices=PHONES, **settings)
    check_interruption(config, tmp_path, data=make_data(SIZES), at=KillAt("client", 5))
    records = read_metrics(tmp_path / "whole")
    seconds = [record["simulated_seconds"] for record in records]
    assert seconds == sorted({*seconds})
    assert "clock" not in records[0]
    if config.deadline is not None:
        assert [info.get("work_done", 1) < 1 for info in records[0]["clients"].values()] == [True, False, False, False]


# -- policies that keep tensors ----------------------------------------------------------------------------------------


class Belated(participation.Participation):
    """A policy in which every client answers the message of the round before."""

    def __init__(self, *given):
        super().__init__(*given)
        self._before = {}

    def assign(self, entry, round, traffic):
        given = super().assign(entry, round, traffic)
        return replace(given, began=dict.fromkeys(given.clients, round - 1) if round > 0 else {})

    def messages(self, clients, send):
        fresh = send(clients)
        message = self._before or fresh[clients[0]]
        self._before = dict(fresh[clients[0]])
        return dict.fromkeys(clients, message)

    def state(self):
        return {**super().state(), "before": self._before}

    def restore(self, state, messages, rounds):
        super().restore(state, messages, rounds)
        self._before = state["before"]


def heard_by(monkeypatch, method="fedavg"):
    """Return the server's uploads, as (client, staleness)."""
    heard = []

    class Seeing(METHODS[method]):
        """A method that notes its uploads."""

        def weight(self, server, upload):
            heard.append((upload.client_id, upload.staleness))
            return super().weight(server, upload)

    monkeypatch.setitem(METHODS, method, Seeing)
    return heard


def test_no_upload_of_a_synchronous_round_is_stale(make_data, make_config, tmp_path, monkeypatch):
    heard = heard_by(monkeypatch)
    config = make_config("fedavg", clients=4, rounds=2, straggler_rate=0.5)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    assert heard == [(k, 0) for _ in range(2) for k in range(4)]
    entry = Checkpoints(tmp_path / "run").peek()
    assert entry["participation"] == "participation-000002.safetensors"  # the clock
    run(make_config("fedavg", clients=4, rounds=1), out=tmp_path / "plain", data=make_data(SIZES))
    assert "participation" not in Checkpoints(tmp_path / "plain").peek()


def test_what_a_policy_keeps_survives_an_interruption(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_objects, "Participation", Belated)
    heard = heard_by(monkeypatch)
    settings = {"clients": 4, "rounds": 5, "buffers": "local"}
    run(make_config("fedavg", workers="2", **settings), out=tmp_path / "whole", data=make_data(SIZES))
    assert heard == [(k, int(number > 0)) for number in range(5) for k in range(4)]
    config, out = make_config("fedavg", **settings), tmp_path / "cut"
    again = kill_and_resume(config, out=out, data=make_data(SIZES), at=KillAt("client", 9))
    assert again == outcome(tmp_path / "whole")
    names = {path.name for path in (out / "checkpoints").glob("participation-*")}
    assert names == {f"participation-{plan:06d}.safetensors" for plan in (4, 5)}  # of the checkpoints that are kept
    monkeypatch.setattr(run_objects, "Participation", participation.Participation)
    run(config, out=tmp_path / "now", data=make_data(SIZES))
    assert outcome(tmp_path / "now")[0] != outcome(tmp_path / "whole")[0]


# -- plans that draw ---------------------------------------------------------------------------------------------------


class Walking(FedAvg):
    """FedAvg of a network that walks from client to client."""

    def rounds(self, federation):
        draws = federation.rng("walk")
        for _ in range(federation.rounds):
            yield Round(participants=(int(draws.integers(federation.clients)),))


def test_a_plan_draws_from_the_run(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", Walking)
    settings = {"clients": 4, "rounds": 6}
    run(make_config("fedavg", **settings), out=tmp_path / "whole", data=make_data(SIZES))
    walks = []
    for seed in (0, 0, 1):
        plan = Walking().rounds(Federation(6, SIZES, 3, seed=seed))
        walks.append([entry.participants[0] for entry in plan])
    assert walks[0] == walks[1] != walks[2]
    assert [list(record["clients"]) for record in read_metrics(tmp_path / "whole")] == [[str(k)] for k in walks[0]]
    config = make_config("fedavg", workers="2", **{**settings, "rounds": 4})
    play_killed(config, out=tmp_path / "parts", data=make_data(SIZES), at=KillAt("round", 1))
    run(config, out=tmp_path / "parts", data=make_data(SIZES), resume=True)
    run(config, out=tmp_path / "parts", data=make_data(SIZES), resume=True, rounds=6)
    assert outcome(tmp_path / "parts")[0] == outcome(tmp_path / "whole")[0]
    reseeded = make_config("fedavg", seed=1, **settings)
    run(reseeded, out=tmp_path / "other", data=make_data(SIZES))
    assert [list(record["clients"]) for record in read_metrics(tmp_path / "other")] == [[str(k)] for k in walks[2]]
