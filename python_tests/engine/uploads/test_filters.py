"""The filters of uploads, each without a run, and uploads that stay on the GPU."""

import dataclasses
import math
from functools import wraps

import pytest
import torch
from safetensors.torch import load_file

from fedkern.engine.client import Client
from fedkern.engine.local.networks import Networks
from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.engine.store.releases import DIVERGED, Releases
from fedkern.engine.uploads import reduction
from fedkern.engine.uploads.bytes import Bytes
from fedkern.engine.uploads.declared import Declared
from fedkern.engine.uploads.digests import ClientDigests, ServerDigests
from fedkern.engine.uploads.encoders import Departure, Drift, Encoders
from fedkern.engine.uploads.filters import Arrival, ExchangeRequest, Filter
from fedkern.engine.uploads.norm_bounds import NormBounds
from fedkern.engine.uploads.reduction import GpuCheck, GpuUploads, MovingAccumulator
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg
from fedkern.methods.base import Phase, Round, Upload
from fedkern.methods.uploads import Maybe, like
from fedkern.ops import Accumulator

START = torch.tensor([1.0, 2.0, 2.0])


class Hooks:
    """An exchange in which every client returns the parameters of its message."""

    own, callee = True, "method"
    on_gpu = ("parameters",)

    def declare_upload(self, phase, client, message):
        return message


def request(entry=None, sent=None):
    sent = {k: {"parameters": START} for k in (0, 1)} if sent is None else sent
    phase = Phase(3, "train", "update")
    return ExchangeRequest(phase, entry or Round("train"), 3, len(sent), tuple(sent), Hooks(), sent)


def arrive(upload, **given):
    return Arrival(request(**given), 0, upload)


def test_an_update_counts_from_what_its_client_was_sent():
    """The method declares the server's current vectors, but a stale upload began with older ones."""

    class Now(Hooks):
        def declare_upload(self, phase, client, message):
            return {"parameters": START + 1, "buffers": START}

    old = {0: {"parameters": START}, 1: {"parameters": START + 1}}
    exchange = ExchangeRequest(Phase(3, "train", "update"), Round("train"), 3, 2, (0, 1), Now(), old, {0: 1})
    assert [exchange.staleness(k) for k in (0, 1)] == [2, 0]
    assert exchange.declaration_of(0)["parameters"] is START
    assert torch.equal(exchange.declaration_of(1)["parameters"], START + 1)
    assert exchange.declaration_of(0).keys() == {"parameters", "buffers"}


def test_a_filter_that_overrides_nothing_lets_all_pass():
    upload, uploads = arrive({"parameters": START}), iter([Upload(0, 1, {})])
    assert Filter().decode(upload) == ""
    assert upload.message["parameters"] is START
    assert Filter().combine(request(), uploads, None) is uploads
    assert Filter().encoders(request()) == {}


@pytest.mark.parametrize(
    ("upload", "why"),
    [
        ({"parameters": START + 1}, ""),
        ({"parameters": START, "more": 1}, "should not hold more"),
        ({"parameters": START.double()}, "has parameters of shape"),
        ({"parameters": START * math.nan}, "holds NaN or infinite values in parameters"),
        ({}, "is empty"),
        (None, "is NoneType where a dict"),
    ],
)
def test_what_is_not_as_declared_is_refused(upload, why):
    arrival = arrive(upload)
    said = Declared().decode(arrival)
    assert said.startswith(why)
    assert bool(said) == bool(why)
    if not why:
        assert arrival.info == {"drift": pytest.approx(3**0.5)}


def test_what_was_checked_at_the_client_is_not_checked_again():
    arrival = Arrival(request(), 0, {"parameters": "stays there"}, {"drift": 2.0})
    assert Declared().decode(arrival) == ""
    assert arrival.info == {"drift": 2.0}


def test_an_empty_upload_that_is_allowed_has_no_message():
    arrival = arrive({}, sent={0: {"parameters": Maybe(START)}})
    assert Declared().decode(arrival) == ""
    assert arrival.message is None
    nothing = arrive({}, sent={0: {}})
    assert Declared().decode(nothing) == ""
    assert nothing.message == {}  # all that is declared


@pytest.mark.parametrize("length", [0.5, 4.0, 6.0])
def test_long_updates_are_clipped_and_longer_ones_refused(length):
    change = torch.tensor([0.0, 0.6, 0.8]) * length
    arrival = arrive({"parameters": START + change})
    said = NormBounds(largest=5.0, clip=2.0).decode(arrival)
    if length > 5:
        assert said == "has an update of norm 6 where --max-update-norm allows 5"
        return
    assert said == ""
    torch.testing.assert_close(arrival.message["parameters"] - START, change * min(1.0, 2.0 / length))
    assert arrival.info == ({"clipped": pytest.approx(0.5)} if length > 2 else {})


def test_bounds_look_at_parameters_alone():
    arrival = arrive({"histogram": START * 1e9}, sent={0: {"histogram": START}, 1: {}})
    assert NormBounds(largest=1.0, clip=1.0).decode(arrival) == ""
    assert arrival.info == {}


@pytest.mark.parametrize("hidden", [False, True])
def test_bytes_are_booked_and_a_missing_upload_where_nobody_may_know(hidden):
    ledger = Ledger(2)
    booking = Bytes(ledger, hidden)
    booking.on_sent(request(), 0, {"parameters": START})
    assert (ledger.total_down, ledger.total_up) == (12, 0)
    booking.decode(arrive({"parameters": START, "samples": 3}))
    assert ledger.total_up == 12 + 8
    booking.on_missing(arrive(None), failed=True)
    assert ledger.total_up == 12 + 8 + 12 * hidden
    assert ledger.rounds == {"train": {"up": ledger.total_up, "down": 12}}


def test_set_up_rounds_are_booked_apart_and_others_not_at_all():
    ledger = Ledger(2)
    booking = Bytes(ledger, hidden=False)
    booking.on_sent(request(Round("setup", one_off=True)), 1, {"parameters": START})
    assert (ledger.total_down, ledger.one_off_down) == (0, [0, 12])
    booking.on_sent(request(Round("audit", counted=False)), 1, {"parameters": START})
    assert ledger.summary()["total"] == 12


def test_a_round_is_booked_exchange_by_exchange():
    """A client's figures of a network are bookkeeping, and the update beside them is communication."""
    ledger, entry = Ledger(2), Round(exchanges=("update", "figures"), counted=("update",))
    booking = Bytes(ledger, hidden=True)
    for name in entry.exchanges:
        exchange = dataclasses.replace(request(entry), phase=Phase(0, "train", name))
        booking.on_sent(exchange, 1, {"parameters": START})
        booking.decode(Arrival(exchange, 1, {"accuracy": 0.5}))
    assert ledger.exchanges == {"update": {"up": 8, "down": 12}}


def test_a_client_that_released_something_else_before_ends_the_run(tmp_path):
    released = Releases(tmp_path)
    released.open(0)
    ClientDigests(released).decode(arrive({"parameters": START}))
    ClientDigests(released).on_missing(Arrival(request(), 1), failed=True)
    ClientDigests(released).on_missing(Arrival(request(), 0), failed=False)  # nothing was released
    again = Releases(tmp_path)
    again.open(0)
    ClientDigests(again).decode(arrive({"parameters": START.clone()}))
    with pytest.raises(UserError, match="after client 1 had released its answer"):
        ClientDigests(again).decode(Arrival(request(), 1, {"parameters": START}))
    assert len((tmp_path / "releases.jsonl").read_text().splitlines()) == 2
    assert DIVERGED not in (tmp_path / "releases.jsonl").read_text()  # a digest


def test_where_the_server_releases_every_upload_is_noted_before_it_goes_on(tmp_path):
    releases = Releases(tmp_path)
    releases.open(0)
    handed = ServerDigests(releases).combine(request(), iter([Upload(-1, 1, {"parameters": START})]), None)
    assert not (tmp_path / "releases.jsonl").exists()
    assert next(handed).message["parameters"] is START
    assert len((tmp_path / "releases.jsonl").read_text().splitlines()) == 1


class Marking:
    """An encoder that adds its mark to a text, and counts its calls in its state."""

    def __init__(self, mark, on_gpu=(), checked=None):
        self.mark, self.on_gpu, self.checked = mark, on_gpu, checked

    def encode(self, leaving):
        if self.mark:
            leaving.state["marks"] = leaving.state.get("marks", 0) + 1
        return leaving.message + self.mark, self.checked


def test_encoders_change_an_upload_one_after_another_each_with_a_state_of_its_own():
    marking_a, marking_b = Marking("a", ("parameters", "buffers"), {"drift": 1.0}), Marking("b", ("parameters",))
    encoders = Encoders((("first", marking_a), ("second", marking_b)))
    state = {"second": {"marks": 4}}
    assert encoders.encode(Departure(0, {}, "", state=state)) == ("ab", None)  # what b has made nobody has checked
    assert state == {"first": {"marks": 1}, "second": {"marks": 5}}
    assert encoders.on_gpu == ("parameters",)
    assert Encoders((("", marking_a),)).on_gpu == marking_a.on_gpu
    state = {}
    assert Encoders((("", marking_a), ("silent", Marking("")))).encode(Departure(0, {}, "", state=state)) == ("a", None)
    assert state == {}  # neither an encoder without a name nor one that keeps nothing has any


def test_vectors_that_are_only_added_up_stay_on_the_gpu():
    encoders = GpuUploads().encoders(request())
    assert [encoders[k] for k in (0, 1)] == 2 * [GpuCheck(("parameters",), {"parameters": like(START)})]
    upload, checked = encoders[1].encode(Departure(1, {"parameters": START}, made := {"parameters": START + 1}))
    assert upload is made
    assert checked == {"drift": pytest.approx(3**0.5)}


@pytest.mark.parametrize("upload", [{"parameters": START * math.inf}, {}])
def test_an_upload_that_does_not_fit_comes_to_the_host_unchecked(upload):
    found, checked = GpuUploads().encoders(request())[0].encode(Departure(0, {"parameters": START}, upload))
    assert found.keys() == upload.keys()
    assert all(torch.equal(found[name], upload[name]) for name in upload)
    assert checked is None


# -- reduction ---------------------------------------------------------------------------------------------------------


SMALL = {"width": 2, "rounds": 2, "local_epochs": 1, "batch_size": 4, "clients": 3, "grad_cam": 0, "workers": "1"}
STAYING = ("fedavg", "scaffold", "moon", "feddyn", "fedgid")
"""Methods whose clients' vectors may stay; MOON, FedDyn and SCAFFOLD compute with what training returned."""


def play(name, stays, data, make_config, out, monkeypatch, **changes):
    """Return the vectors that stayed on the device in a run, the final model and the clients' figures."""
    seen, train = [], Client.train
    with monkeypatch.context() as patch:
        patch.setattr(reduction, "has_room", lambda *_: stays)
        patch.setattr(Client, "train", lambda self, *a, **k: seen.append(self.on_gpu) or train(self, *a, **k))
        run(make_config(name, **SMALL, **changes), data=data, out=out)
    return set(seen), load_file(out / "model.safetensors"), [record["clients"] for record in read_metrics(out)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", STAYING)
def test_a_run_is_the_same_where_uploads_stay(name, device, make_data, make_config, tmp_path, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (left, model, figures), (host_left, host_model, host_figures) = (
        play(name, stays, make_data((12, 9, 7)), make_config, tmp_path / str(stays), monkeypatch, device=device)
        for stays in (True, False)
    )
    assert left == {("parameters", "buffers", *(["control"] if name == "scaffold" else []))}
    assert host_left == {()}
    assert model.keys() == host_model.keys()
    assert all(torch.equal(model[key], host_model[key]) for key in model)
    for own, their in zip(figures, host_figures, strict=True):
        assert own.keys() == their.keys()
        for k in own:
            assert own[k]["loss"] == their[k]["loss"]
            assert own[k]["drift"] == pytest.approx(their[k]["drift"], rel=0 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("options", [{"aggregator": "median"}, {"max_update_norm": 9.0}, {"buffers": "local"}])
def test_what_somebody_else_looks_at_comes_to_the_host(options, make_data, make_config, tmp_path, monkeypatch):
    left, *_ = play("fedavg", True, make_data((8, 8, 8)), make_config, tmp_path, monkeypatch, **options)
    assert left == {("parameters", "buffers") if "buffers" in options else ()}


def test_what_was_trained_elsewhere_is_compared_there(make_data, make_config, tmp_path, monkeypatch):
    """FML trains two networks and uploads from the host."""
    monkeypatch.setattr(Networks, "send", lambda self, vector: vector.to("meta"))
    _, _, figures = play("fml", True, make_data((8, 8, 8)), make_config, tmp_path, monkeypatch)
    assert all(record[k]["drift"] > 0 for record in figures for k in "012")


class Changing(FedAvg):
    def client_update(self, client, phase, message):
        return super().client_update(client, phase, message)


class Wrapping(FedAvg):
    @wraps(FedAvg.client_update)
    def client_update(self, client, phase, message):
        return super().client_update(client, phase, message)


@pytest.mark.parametrize("kind", [Changing, Wrapping])
def test_a_client_update_of_another_gets_vectors_of_the_host(kind, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fedavg", kind)
    assert play("fedavg", True, make_data((8, 8, 8)), make_config, tmp_path, monkeypatch)[0] == {()}


def test_uploads_that_fit_are_not_checked_again_and_others_are_handed_on_unchecked():
    start = torch.tensor([1.0, 2.0, 2.0])
    encoder = GpuCheck(("parameters",), {"parameters": like(start)})
    upload = {"parameters": start + 1}
    sent = {"parameters": start}
    assert encoder.encode(Departure(0, sent, upload)) == (upload, {"drift": pytest.approx(3**0.5)})
    for wrong in ({"parameters": start * math.inf}, {"parameters": start, "more": 1}, 5):
        assert encoder.encode(Departure(0, sent, wrong)) == (wrong, None)


def test_a_measured_norm_is_that_of_the_vector_that_was_measured():
    start = torch.tensor([1.0, 2.0, 2.0])
    encoder = GpuCheck(("parameters",), {"parameters": like(start)})
    left = start + 1
    drift = Drift(left, left._version, torch.tensor(7.0))

    def drift_of(vector):
        return encoder.encode(Departure(0, {"parameters": start}, {"parameters": vector}, drift=drift))[1]["drift"]

    assert drift_of(left) == 7
    assert drift_of(left.clone()) == pytest.approx(3**0.5)
    left += 1
    assert drift_of(left) == pytest.approx(12**0.5)


def test_an_accumulator_follows_its_first_vector():
    vector, added = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0])
    for exact in (False, True):
        total = MovingAccumulator(Accumulator(2, exact))
        total.add(vector)
        total.add(added, 3.0)
        assert total.mean().tolist() == [2.5, 6.5]
        assert (total.count, total.weight, total.size, total.exact) == (2, 4.0, 2, exact)
    total = MovingAccumulator(Accumulator(2))
    total.add(vector.to("meta"))
    assert total._own.device.type == "meta"
