"""Asynchronous rounds: clients at work, weights of stale uploads, and equal bits on every machine."""

from types import SimpleNamespace

import pytest
import torch

from fedkern.engine.participation import local_steps, speed
from fedkern.engine.run import run
from fedkern.engine.setup import run_objects
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.engine.uploads import asynchronous
from fedkern.engine.uploads.asynchronous import Asynchronous, StaleUploads
from fedkern.engine.uploads.filters import ExchangeRequest
from fedkern.errors import UserError
from fedkern.messages import states
from fedkern.methods import METHODS, FedAvg, Phase, Round
from fedkern.methods.base import Federation, Upload
from fedkern.run import main
from fedkern.settings.config import RunConfig
from python_tests.hearing import Hearing
from python_tests.interrupted import KillAt, forge_state, kill_and_resume, killed_at_rename, outcome, play_killed

SIZES = (20, 13, 9, 15)
TEN = Federation(rounds=30, samples=tuple(range(10, 110, 10)), classes=2)


def policy(text="fedbuff:buffer=3", **settings):
    settings = {"clients": 10, "batch_size": 10, "local_epochs": 2, "straggler_rate": 0.4, **settings}
    return Asynchronous(RunConfig.make("fedavg", asynchronous=text, **settings), TEN)


def send(number):
    """Return one message for all clients, as a server sends in a round."""
    message = {"parameters": torch.full((2,), float(number))}
    return lambda clients: dict.fromkeys(clients, message)


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("text", ["fedbuff:buffer=3", "fedasync"])
def test_who_is_at_work(text, fraction):
    """The earliest finished clients are at work next, none twice at once.

    Each answers the message of the time when it began.
    """
    asked, buffer, count = policy(text, sample_fraction=fraction), 3 if "buffer" in text else 1, round(10 * fraction)
    at_work, seen = {}, []
    for number in range(300):
        before = asked.clock
        given = asked.assign(Round(), number)
        answered = asked.messages(given.clients, send(number))
        began = {k: given.began.get(k, number) for k in given.clients}
        assert (given.absent, len(given.clients)) == ({}, buffer)
        assert list(given.clients) == sorted(set(given.clients))
        for k in given.clients:
            assert float(answered[k]["parameters"][0]) == began[k]  # what was sent when the client began
        assert all(at_work[k] == began[k] for k in given.clients if k in at_work)
        at_work = {k: at for k, (at, _) in asked._at_work.items()}
        assert not {*at_work} & {*given.clients}
        assert len(at_work) in range(min(count, 10 - buffer + 1) - 1, count)  # the last place is taken in the next step
        assert asked.clock >= before
        assert all(done >= asked.clock for _, done in asked._at_work.values())
        assert asked.figures() == {
            "clock": asked.clock,
            "staleness": sum(number - at for at in began.values()) / buffer,
        }
        seen += given.clients
    assert {*seen} == {*range(10)}


def test_a_client_takes_its_steps_at_its_speed():
    asked, clock = policy("fedasync", sample_fraction=0.1), 0.0
    for number in range(9):
        (k,) = asked.assign(Round(), number).clients
        assert local_steps(asked._config, TEN.samples[k]) == 2 * (k + 1)  # two epochs of batches of ten
        clock += 2 * (k + 1) / speed(asked._config, number, k)
        assert asked.clock == pytest.approx(clock)


def test_fast_clients_upload_more_often_than_slow_ones():
    asked = policy("fedasync", straggler_rate=0.0)
    uploads = [k for number in range(60) for k in asked.assign(Round(), number).clients]
    counts = [uploads.count(k) for k in range(10)]
    assert counts[0] > 3 * counts[9] > 0  # client 9 has ten times the steps of client 0
    assert asked.clock == max(2 * (k + 1) * counts[k] for k in range(10))


@pytest.mark.parametrize("text", ["fedbuff:buffer=3", "fedasync"])
def test_a_policy_goes_on_from_what_it_keeps(text, tmp_path):
    def play(asked, rounds):
        found = []
        for number in rounds:
            given = asked.assign(Round(), number)
            answered = asked.messages(given.clients, send(number))
            found.append((given, asked.clock, {k: message["parameters"].tolist() for k, message in answered.items()}))
        return found

    uncut, begun = play(policy(text), range(12)), policy(text)
    cut = play(begun, range(5))
    states.save(tmp_path / "kept", {"state": begun.state(), "messages": begun.in_flight()})
    kept, messages = states.load(tmp_path / "kept").values()
    assert sum(map(len, messages.values())) < len(kept["at_work"])  # clients that began together share one
    assert kept["messages"] == sorted(messages)
    again = policy(text)
    again.restore(kept, messages, 5)
    assert cut + play(again, range(5, 12)) == uncut
    assert begun.state().keys() == kept.keys()
    fresh = policy(text)
    assert fresh.assign(Round(one_off=True, participants="all"), -1).clients == range(10)
    assert fresh.messages([0, 1], send(7)).keys() == {0, 1}
    assert play(fresh, range(12)) == uncut  # a set-up round has no part in it


# -- how an upload counts ----------------------------------------------------------------------------------------------

NOW, SENT, OWN = (torch.tensor(values) for values in ([1.0, 2.0], [0.5, 2.5], [0.75, 3.0]))
VARIANCES = {"now": torch.tensor([0.5]), "own": torch.tensor([2.0])}


class Hooks:
    own, callee = True, "method"

    def declare_upload(self, phase, client, message):
        return {"parameters": NOW, "buffers": VARIANCES["now"]}


def combine(text, stale, entry=None):
    """Return the parameters and buffers of an upload as the server gets them."""
    asked = ExchangeRequest(
        Phase(5, "train", "update"), entry or Round(), 5, 1, (0,), Hooks(), {0: {"parameters": SENT}}, {0: 5 - stale}
    )
    message, noted = {"parameters": OWN, "buffers": VARIANCES["own"], "integers": torch.tensor([3])}, []
    uploads = iter([Upload(0, 1, message, staleness=stale)])
    (upload,) = StaleUploads(policy(text)).combine(asked, uploads, lambda *given: noted.append(given))
    assert noted == ([(0, {"staleness": stale})] if entry is None else [])
    assert upload.staleness == stale
    assert upload.message["integers"].tolist() == [3]
    return upload.message["parameters"], upload.message["buffers"]


@pytest.mark.parametrize(("stale", "weight"), [(3, 0.5), (8, 1 / 3)])
def test_fedbuff_adds_the_change_of_what_was_sent_weighed_by_its_age(stale, weight):
    parameters, buffers = combine("fedbuff", stale)
    torch.testing.assert_close(parameters, NOW + weight * (OWN - SENT))
    assert buffers is VARIANCES["own"]  # no change is added to a variance
    flat = combine("fedbuff:staleness=0", stale)[0]
    torch.testing.assert_close(flat, NOW + OWN - SENT)


def test_an_upload_that_is_not_stale_is_as_in_a_synchronous_round():
    parameters, buffers = combine("fedbuff", 0)
    assert parameters is OWN
    assert buffers is VARIANCES["own"]
    for text in ("fedbuff", "fedasync"):
        assert combine(text, 0, Round(one_off=True)) == (OWN, VARIANCES["own"])


@pytest.mark.parametrize(("stale", "weight"), [(0, 0.6), (3, 0.3)])
def test_fedasync_goes_a_part_of_the_way_to_the_upload(stale, weight):
    parameters, buffers = combine("fedasync", stale)
    torch.testing.assert_close(parameters, (1 - weight) * NOW + weight * OWN)
    torch.testing.assert_close(buffers, (1 - weight) * VARIANCES["now"] + weight * VARIANCES["own"])


# -- runs --------------------------------------------------------------------------------------------------------------


def test_fedbuff_that_waits_for_all_is_fedavg(make_data, make_config, tmp_path):
    settings = {"clients": 4, "rounds": 3, "batch_size": 4}
    for name, options in (("avg", {}), ("buff", {"asynchronous": "fedbuff:buffer=4"})):
        run(make_config("fedavg", **settings, **options), out=tmp_path / name, data=make_data(SIZES))
    assert outcome(tmp_path / "buff")[0] == outcome(tmp_path / "avg")[0]
    records = read_metrics(tmp_path / "buff")
    assert [(record["clock"], record["staleness"]) for record in records] == [(5.0, 0), (10.0, 0), (15.0, 0)]


class Own(FedAvg):
    """A user-defined method that accepts stale uploads."""

    asynchronous = True


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedavg", {}),
        ("moon", {}),
        ("fedavg", {"compress": "topk:share=0.3"}),
        *(pytest.param(name, {}, marks=pytest.mark.exhaustive) for name in ("fedprox", "fedntd", "fedgid", "fedlpfm")),
        pytest.param("fedavg", {"compress": "int8"}, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("text", ["fedbuff:buffer=2", "fedasync:mixing=0.8"])
def test_the_bits_are_equal_on_workers_and_after_an_interruption(
    text, method, options, make_data, make_public, make_config, tmp_path, monkeypatch
):
    if method == "fedavg":
        monkeypatch.setitem(METHODS, "fedavg", Own)
    data = make_public(make_data(SIZES))
    settings = {"clients": 4, "rounds": 7, "asynchronous": text, "straggler_rate": 0.5, **options}
    run(make_config(method, workers="1", **settings), out=tmp_path / "whole", data=data)
    records = read_metrics(tmp_path / "whole")
    assert max(record["staleness"] for record in records) > 0
    assert [record["clock"] for record in records] == sorted(record["clock"] for record in records)
    ages = [[info["staleness"] for info in record["clients"].values()] for record in records]
    assert [sum(stalenesses) / len(stalenesses) for stalenesses in ages] == [record["staleness"] for record in records]
    config = make_config(method, workers="2", **settings)
    again = kill_and_resume(config, out=tmp_path / "cut", data=data, at=KillAt("client", 5))
    assert again == outcome(tmp_path / "whole")
    assert "participation" in Checkpoints(tmp_path / "whole").peek()


KILLED = {"clients": 4, "rounds": 5, "asynchronous": "fedbuff:buffer=1", "straggler_rate": 0.7, "workers": "1"}


def test_each_message_is_written_once(make_data, make_config, tmp_path, monkeypatch):
    written, listings = [], []

    def of_messages():
        return {path.name for path in (tmp_path / "run" / "checkpoints").glob("messages-*")}

    real = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda self, name, *how: written.append(name) or real(self, name, *how))
    config = make_config("fedavg", **{**KILLED, "rounds": 12})
    run(
        config,
        out=tmp_path / "run",
        data=make_data(SIZES),
        listener=Hearing(on_round=lambda record: listings.append(of_messages())),
    )
    files = [name for name in written if name.startswith("messages-")]
    assert len(files) == len(set(files)) > 4
    entries = Checkpoints(tmp_path / "run")._read_manifest()
    last = of_messages()
    assert last == {name for entry in entries for name in entry["files"] if name.startswith("messages-")}
    assert any(set(a) & set(b) for a, b in zip(listings, listings[2:], strict=False))  # referred to later
    assert len(last) < len(files)  # those that nobody refers to go


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.sampled(1)
def test_a_kill_between_any_two_writes_loses_nothing(when, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_objects, "BackgroundWriter", lambda: None)  # each write in its turn
    config, data = make_config("fedavg", **KILLED), make_data(SIZES)
    run(config, out=tmp_path / "whole", data=data)
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    for count in range(3, 18, 2):
        out = tmp_path / f"cut{count}"
        with killed_at_rename(count, when):
            run(config, out=out, data=data)
        run(config, out=out, data=data, resume=True)
        assert outcome(out) == outcome(tmp_path / "whole")
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names


def drop(state):
    del state["messages"]


def with_row(index, value):
    return lambda state: next(iter(state["at_work"].values())).__setitem__(index, value)


@pytest.mark.parametrize("change", [
    drop, lambda state: state["messages"].clear(), lambda state: state.pop("clock"), lambda state: state.update(more=1),
    lambda state: state.update(clock="x"), lambda state: state.update(clock=float("nan")),
    lambda state: state.update(at_work=[1]), lambda state: state["at_work"].update({99: [0, 0.0, 0]}),
    lambda state: state["at_work"].update({"1": state["at_work"].popitem()[1]}),
    lambda state: state.update(begun=state["begun"] + 1),
    with_row(0, 99), with_row(0, -1), with_row(0, True), with_row(1, "x"), with_row(1, -1.0), with_row(1, float("inf")),
    with_row(2, 7), with_row(2, None),
])  # fmt: skip
def test_forged_states_are_refused_in_one_sentence(change, make_data, make_config, cut_run):
    forge_state(cut_run, Checkpoints(cut_run).peek()["participation"], change)
    with pytest.raises(UserError, match=r"^The checkpoint is damaged: what it says of the clients at work"):
        run(make_config("fedavg", **KILLED), out=cut_run, data=make_data(SIZES), resume=True)


@pytest.mark.parametrize("change", [
    lambda message: message.pop("parameters"), lambda message: message.update(parameters=1),
    lambda message: message.update(parameters=message["parameters"][:-1]),
    lambda message: message.update(parameters=message["parameters"].double()),
    lambda message: message.update(buffers=torch.zeros(0)),
])  # fmt: skip
def test_forged_messages_are_refused_in_one_sentence(change, make_data, make_config, cut_run):
    names = [name for name in Checkpoints(cut_run).peek()["files"] if name.startswith("messages-")]
    forge_state(cut_run, names[-1], lambda content: [change(message) for message in content.values()])
    with pytest.raises(UserError, match=r"^The checkpoint is damaged: what it says of the clients at work"):
        run(make_config("fedavg", **KILLED), out=cut_run, data=make_data(SIZES), resume=True)
    for damage in (lambda path: path.write_bytes(b"x"), lambda path: path.unlink()):
        damage(cut_run / "checkpoints" / names[-1])
        with pytest.raises(UserError, match=r"All checkpoints in .* are damaged|messages-0"):
            run(make_config("fedavg", **KILLED), out=cut_run, data=make_data(SIZES), resume=True)


@pytest.fixture
def cut_run(make_data, make_config, tmp_path):
    play_killed(make_config("fedavg", **KILLED), out=tmp_path / "run", data=make_data(SIZES), at=KillAt("round", 3))
    assert Checkpoints(tmp_path / "run").peek()["round"] >= 2
    return tmp_path / "run"


def test_running_variances_stay_positive_and_figures_finite(make_data, make_config, tmp_path):
    config = make_config("fedavg", clients=4, rounds=12, asynchronous="fedbuff:buffer=2", straggler_rate=0.7, lr=0.3)
    run(config, out=tmp_path / "run", data=make_data(SIZES))
    from fedkern import load

    network = load(tmp_path / "run").model()
    found = {name: value for name, value in network.state_dict().items() if name.endswith("running_var")}
    assert found
    assert all(float(value.min()) >= 0 for value in found.values())


# -- what is refused ---------------------------------------------------------------------------------------------------


class Inheriting(FedAvg):
    """A method with its own server that does not declare how it treats stale uploads."""

    def server_update(self, server, phase, uploads):
        super().server_update(server, phase, uploads)


class Twice(FedAvg):
    """A method with two exchanges in a round."""

    asynchronous = True

    def rounds(self, federation):
        for _ in range(federation.rounds):
            yield Round(exchanges=("update", "more"))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("scaffold", {}, r"class declares that stale uploads do no harm \(.*fedavg.*\), and scaffold counts on whole"),
        ("feddyn", {}, "feddyn counts on whole rounds"),
        ("afl", {}, "afl counts on whole rounds"),
        ("fedproto", {"options": {"networks": "personal"}}, "fedproto counts on whole rounds"),
        ("fedper", {}, "fedper counts on whole rounds"),
        (Inheriting, {}, "fedavg overrides a hook and does not set `asynchronous` again"),
        ("fedavg", {"dropout_rate": 0.1}, "--dropout-rate is about rounds that all their clients begin and end"),
        ("fedavg", {"straggler_rate": 0.1, "deadline": 2.0}, "--deadline is about rounds"),
        ("fedavg", {"straggler_rate": 0.1, "stragglers": "drop"}, "--stragglers is about rounds"),
        ("fedavg", {"dp_clip": 1.0, "dp_noise": 0.0}, "--dp-clip is about rounds"),
        (
            "fedavg",
            {"asynchronous": "fedbuf"},
            '--asynchronous must be one of fedbuff, fedasync, not "fedbuf".*Did you',
        ),
        ("fedavg", {"asynchronous": "fedasync:buffer=2"}, '--asynchronous fedasync has no option "buffer=2"'),
        ("fedavg", {"asynchronous": "fedbuff:buffer=0"}, '"buffer" of --asynchronous fedbuff must be at least 1'),
        ("fedavg", {"asynchronous": "fedbuff:buffer=5"}, "steps after the uploads of 5 clients, and the run has 4"),
        ("fedavg", {"data": "captions"}, "--buffers pool is about rounds"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_data_are_read(method, settings, message, monkeypatch):
    if not isinstance(method, str):
        monkeypatch.setitem(METHODS, "fedavg", method)
        method = "fedavg"
    with pytest.raises(UserError, match=message):
        RunConfig.make(method, **{"clients": 4, "asynchronous": "fedbuff:buffer=2", **settings})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (Twice, {}, "for rounds of one exchange with clients that are drawn, and fedavg"),
        (METHODS["fedavg"], {"aggregator": "krum:byzantine=1"}, "cannot combine 2 uploads"),
        (METHODS["fedavg"], {"clients": None, "asynchronous": "fedbuff:buffer=12"}, "of 12 clients, and the run has 4"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_at_once(
    method, settings, message, make_data, make_config, refuses, tmp_path, monkeypatch
):
    monkeypatch.setitem(METHODS, "fedavg", method)
    config = make_config("fedavg", **{"clients": 4, "asynchronous": "fedbuff:buffer=2", **settings})
    with refuses(message):
        run(config, out=tmp_path / "run", data=make_data(SIZES))


def test_a_comparison_is_refused_before_its_first_run(tmp_path, capsys):
    words = ["compare", "fedavg", "scaffold", "--data", "digits", "--asynchronous", "fedasync"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "scaffold counts on whole rounds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ranks_and_flower_are_refused(make_data, make_config, refuses, tmp_path, monkeypatch, capsys):
    words = ["fedavg", "--asynchronous", "fedasync", "--flower", str(tmp_path / "project")]
    assert main(words) == 2
    assert "leave it out over Flower and on ranks of torchrun" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()
    monkeypatch.setattr(asynchronous.torchrun_group, "find_rank", lambda: SimpleNamespace(job="one"))
    with refuses("leave it out over Flower and on ranks of torchrun"):
        run(make_config("fedavg", asynchronous="fedasync"), out=tmp_path / "run", data=make_data(SIZES))
