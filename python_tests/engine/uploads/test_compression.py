"""Compressed updates with error feedback: messages, residuals, and the bits of complete runs."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.engine.uploads.compression import CHUNK, Compression, Int8, TopK
from fedkern.engine.uploads.encoders import STATES, Departure
from fedkern.engine.uploads.filters import Arrival
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.methods import METHODS, FedAvg
from fedkern.methods.base import Round
from fedkern.methods.uploads import why_refused
from python_tests.engine.uploads.test_filters import request
from python_tests.interrupted import KillAt, kill_often, outcome, without

HOW = ("topk:share=0.05", "int8")
AVERAGING = [name for name, kind in sorted(METHODS.items()) if kind(kind.Options()).averages]


def draw_half(size):
    return torch.full((size,), 0.5)


# -- compressors -------------------------------------------------------------------------------------------------------


def test_the_largest_coordinates_travel_and_of_equal_ones_the_first():
    vector = torch.tensor([1.0, -3.0, 0.5, 3.0, -1.0, 1.0, 0.0, -0.0, 2.0, 1.0])
    sent = TopK(0.5).compress(vector, draw_half)
    assert sent["indices"].tolist() == [0, 1, 3, 4, 8]
    assert sent["indices"].dtype == torch.int32
    assert sent["values"].tolist() == [1.0, -3.0, 3.0, -1.0, 2.0]
    assert TopK(0.5).restore(sent, 10).tolist() == [1.0, -3.0, 0.0, 3.0, -1.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    assert TopK(1e-3).compress(torch.zeros(7), draw_half)["indices"].tolist() == [0]  # at least one


@pytest.mark.parametrize("size", [1, 5, 1000, 4099])
def test_top_k_is_what_sorting_gives(size):
    vector = torch.randint(-9, 10, (size,)).float()
    sent = TopK(0.1).compress(vector, draw_half)
    count = max(1, round(0.1 * size))
    order = sorted(range(size), key=lambda i: (-abs(float(vector[i])), i))[:count]
    assert sent["indices"].tolist() == sorted(order)
    assert torch.equal(sent["values"], vector[sorted(order)])


@pytest.mark.parametrize("size", [1, CHUNK, 2 * CHUNK + 5])
def test_levels_are_rounded_to_one_of_two_neighbours(size):
    vector = torch.randn(size)
    vector[: CHUNK // 2] *= 1e-3
    low, high = (Int8().compress(vector, lambda n, r=r: torch.full((n,), r)) for r in (0.0, 1 - 2**-24))
    scale = low["scales"].repeat_interleave(CHUNK)[:size]
    assert (low["levels"].dtype, low["levels"].shape) == (torch.int8, (size,))
    assert torch.equal(low["scales"], torch.stack([part.abs().max() for part in vector.split(CHUNK)]) / 127)
    for sent in (low, high):
        assert bool(((Int8().restore(sent, size) - vector).abs() <= scale * (1 + 1e-5)).all())
    assert bool((Int8().restore(low, size) <= vector + 1e-5 * scale).all())
    assert bool((Int8().restore(high, size) >= vector - 1e-5 * scale).all())


def test_rounding_is_right_on_average():
    vector = torch.randn(300)
    draws = [Int8().restore(Int8().compress(vector, torch.rand), 300) for _ in range(2000)]
    error = torch.stack(draws).mean(0) - vector
    scale = float(vector.abs().max()) / 127
    assert float(error.abs().max()) < 6 * 0.5 * scale / 2000**0.5  # of 300 means six deviations, at most


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 3e38])
def test_levels_of_extreme_values_are_finite(value):
    vector = torch.tensor([value, -value, value / 2])
    sent = Int8().compress(vector, draw_half)
    assert why_refused(sent, Int8().declare(3)) == ""
    assert bool((Int8().restore(sent, 3) - vector).abs().max() <= value * (1 if value < 1e-39 else 0.01))


# -- error feedback ----------------------------------------------------------------------------------------------------


def encode(text, updates, start=None, seed=0):
    """Return a client's compressed updates of several rounds, as the server decodes them, and its last residual."""
    start = torch.randn(updates.shape[1]) if start is None else start
    compression, state, found = Compression(text, seed), {}, []
    for update in updates:
        exchange = request(sent={0: {"parameters": start}})
        encoder = compression.encoders(exchange)[0]
        message, checked = encoder.encode(Departure(0, {}, {"parameters": start + update, "loss": 1.0}, state=state))
        assert checked is None
        arrival = Arrival(exchange, 0, message)
        assert compression.decode(arrival) == ""
        assert arrival.message["loss"] == 1.0
        found.append(arrival.message["parameters"] - start)
    return torch.stack(found), state["update"]


@pytest.mark.parametrize("text", HOW)
def test_what_is_lost_comes_later(text):
    updates = torch.randn(12, 1500)
    found, residual = encode(text, updates)
    torch.testing.assert_close(found.sum(0) + residual, updates.sum(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], updates[0], atol=1e-3)
    assert float(residual.norm()) > 0


def test_an_update_that_is_sent_often_arrives_whole():
    """Without error feedback the small coordinates would never travel."""
    update = torch.linspace(1, 2, 20)
    found, _ = encode("topk:share=0.1", update.repeat(400, 1), torch.zeros(20))
    torch.testing.assert_close(found.mean(0), update, rtol=0.1, atol=0)


def test_draws_are_those_of_the_round_and_the_client():
    start, end = torch.randn(2, 500)

    def send(seed=3, client=0, **phase):
        exchange = request(sent={k: {"parameters": start} for k in (0, 1)})
        encoder = Compression("int8", seed).encoders(replace(exchange, phase=replace(exchange.phase, **phase)))[client]
        return encoder.encode(Departure(client, {}, {"parameters": end}))[0]["parameters"]["levels"]

    once = send()
    assert torch.equal(send(), once)
    assert not any(
        torch.equal(draw, once) for draw in (send(seed=4), send(client=1), send(round=4), send(exchange="joint"))
    )


@pytest.mark.parametrize(
    "upload",
    [None, {}, {"loss": 1.0}, {"parameters": torch.zeros(4)}, {"parameters": torch.zeros(3).double()},
     {"parameters": torch.tensor([0.0, torch.nan, 0.0])}, {"parameters": "much"}],
)  # fmt: skip
def test_an_upload_that_does_not_fit_travels_as_it_is(upload):
    compression, exchange, state = Compression("int8", 0), request(sent={0: {"parameters": torch.zeros(3)}}), {}
    message, _ = compression.encoders(exchange)[0].encode(Departure(0, {}, upload, state=state))
    assert message is upload
    assert state == {}
    arrival = Arrival(exchange, 0, upload)
    assert compression.decode(arrival) == ""
    assert arrival.message is upload


@pytest.mark.parametrize("declared", [{"logits": torch.zeros(3)}, {"parameters": torch.zeros(3, 2)}, {}])
def test_other_uploads_have_no_encoder(declared):
    assert Compression("int8", 0).encoders(request(sent={0: declared})) == {}


def test_clients_that_work_together_are_refused():
    exchange = request(Round("train", cohort=True), {0: {"parameters": torch.zeros(3)}})
    with pytest.raises(UserError, match=r'int8 is for clients that work on their own, .* "train" work together'):
        Compression("int8", 0).encoders(exchange)


FORGED = {
    "topk": [
        ({"indices": torch.tensor([1, 1], dtype=torch.int32)}, "has indices of parameters that do not rise"),
        ({"indices": torch.tensor([0, 40], dtype=torch.int32)}, "has parameters.indices with 40 where 39 is the"),
        ({"indices": torch.tensor([-1, 4], dtype=torch.int32)}, "has parameters.indices with -1 where 0 is the least"),
        ({"indices": torch.tensor([1], dtype=torch.int32)}, "has parameters.indices of shape [1]"),
        ({"values": torch.tensor([1.0, torch.inf])}, "holds NaN or infinite values in parameters.values"),
        ({"more": 1}, "should not hold parameters.more"),
    ],
    "int8": [
        ({"levels": torch.full((40,), -128, dtype=torch.int8)}, "has parameters.levels with -128 where -127 is"),
        ({"levels": torch.zeros(41, dtype=torch.int8)}, "has parameters.levels of shape [41]"),
        ({"scales": torch.tensor([-1.0])}, "has parameters.scales with -1 where 0 is the least"),
    ],
}


@pytest.mark.parametrize("text", FORGED)
def test_what_no_client_of_fedkern_sends_is_refused(text):
    start = torch.zeros(40)
    compression, exchange = Compression(text, 0), request(sent={0: {"parameters": start}})
    encoder = compression.encoders(exchange)[0]
    honest, _ = encoder.encode(Departure(0, {}, {"parameters": torch.arange(40.0)}))
    assert compression.decode(Arrival(exchange, 0, honest)) == ""
    for change, why in FORGED[text]:
        forged = {"parameters": {**honest["parameters"], **change}}
        assert compression.decode(Arrival(exchange, 0, forged)).startswith(why)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def settle(make_small):
    """Return the settings and data of a short run of a method that compresses."""

    def make(method, rounds=2, **more):
        averaged = {"options": {}} if method == "fedproto" else {}
        return make_small(method, rounds, **{"workers": "1", **averaged, **more})

    return make


def bytes_up(out):
    return json.loads((out / "summary.json").read_text())["bytes"]["up"]


def read_states(out):
    """Return the stored client states."""
    checkpoints = Checkpoints(out)
    checkpoints.open()
    return {k: checkpoints.client_state(k) for k in checkpoints.clients}


def residuals(out):
    return {k: state[STATES]["compress"] for k, state in read_states(out).items() if STATES in state}


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].keys() == right[k].keys() and all(torch.equal(left[k][name], right[k][name]) for name in left[k])
        for k in left
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", AVERAGING)
@pytest.mark.parametrize("text", ["topk:share=0.02", "int8"])
def test_every_method_that_averages_compresses(text, method, settle, tmp_path):
    config, data = settle(method, compress=text)
    run(config, out=tmp_path / "compressed", data=data)
    run(config.replace(compress=None), out=tmp_path / "whole", data=data)
    assert bytes_up(tmp_path / "compressed") < bytes_up(tmp_path / "whole")
    kept = residuals(tmp_path / "compressed")
    assert len(kept) == 3
    assert all(float(vector.norm()) > 0 for own in kept.values() for vector in own.values())
    assert not residuals(tmp_path / "whole")


def test_bytes_are_those_that_travel(make_data, make_config, tmp_path):
    config = make_config(rounds=2, buffers="drop", workers="1")
    sizes = {}
    for name, text in (("whole", None), ("topk", "topk:share=0.05"), ("int8", "int8")):
        run(config.replace(compress=text), out=tmp_path / name, data=make_data())
        sizes[name] = bytes_up(tmp_path / name)
    parameters = sizes["whole"] // (2 * 3 * 4)
    assert sizes["whole"] == 2 * 3 * 4 * parameters
    assert sizes["topk"] == 2 * 3 * 8 * round(0.05 * parameters)
    assert sizes["int8"] == 2 * 3 * (parameters + 4 * -(-parameters // CHUNK))


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    "method", ["fedavg", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("scaffold", "feddra"))]
)
def test_workers_and_interruptions_change_no_bit(method, settle, tmp_path):
    """FedDRA has two exchanges with parameters in a round, each with its own residuals."""
    config, data = settle(method, rounds=3, compress="int8")
    run(config, out=tmp_path / "whole", data=data)
    run(config.replace(workers="2"), out=tmp_path / "two", data=data)
    assert kill_often(config, out=tmp_path / "cut", data=data, at=lambda attempt: KillAt("client", 1 + 2 * attempt))
    expected = residuals(tmp_path / "whole")
    assert len(expected[0]) == (2 if method == "feddra" else 1)
    for name in ("two", "cut"):
        assert outcome(tmp_path / name) == outcome(tmp_path / "whole")
        assert same(residuals(tmp_path / name), expected)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forked_workers")
def test_a_lost_worker_compresses_again_what_its_clients_had_sent(settle, tmp_path, processes):
    """FedDRA's clients keep their worker within a round: another one plays the first exchange again."""

    class Killing(Listener):
        left = 4  # in the second exchange of the first round

        def on_client(self, *_):
            if self.left == 0:
                os.kill(processes[0], signal.SIGKILL)
            self.left -= 1

    config, data = settle("feddra", compress="int8")
    run(config, out=tmp_path / "one", data=data)
    run(config.replace(workers="2"), out=tmp_path / "two", data=data, listener=Killing())
    assert len(processes) == 3
    assert without(outcome(tmp_path / "two"), "lost-worker") == outcome(tmp_path / "one")
    assert same(residuals(tmp_path / "two"), residuals(tmp_path / "one"))


LOST = {
    "refused": {"max_update_norm": 50.0}, "refused by the server": {}, "not finite": {}, "diverged": {},
    "failed": {"on_error": "skip"}, "dropped out": {"dropout_rate": 0.4},
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", LOST)
def test_a_lost_upload_leaves_the_residual_as_it_was(loss, make_data, make_config, tmp_path, monkeypatch):
    """The residual is exactly what the server has not got: nothing is lost, nothing is counted twice."""

    class Losing(FedAvg):
        averages = True

        def client_update(self, client, phase, message):
            if client.id == 1 and phase.round == 1:
                if loss == "failed":
                    raise ZeroDivisionError
                if loss == "diverged":
                    client.state["x"] = 1
                    message = {**message, "parameters": message["parameters"] * torch.nan}
            answer = super().client_update(client, phase, message)
            factor = {"refused": 1e4, "not finite": torch.nan}.get(loss, 1.0)
            if client.id == 1 and phase.round == 1:
                start = message["parameters"]
                answer = {**answer, "parameters": start + factor * (answer["parameters"] - start)}
            return answer

        def server_update(self, server, phase, uploads):
            super().server_update(server, phase, uploads)
            if loss == "refused by the server" and phase.round == 1:
                server.refuse(1, "Client 1 is not wanted")

    monkeypatch.setitem(METHODS, "fedavg", Losing)
    config = make_config(compress="topk:share=0.02", on_nan="skip", workers="1", **LOST[loss])
    for rounds in (1, 2, 3):
        run(config.replace(rounds=rounds), out=tmp_path / str(rounds), data=make_data())
    lost = [{entry["client"] for entry in record.get("dropped", [])} for record in read_metrics(tmp_path / "3")]
    assert lost[1]
    after = {rounds: residuals(tmp_path / str(rounds)) for rounds in (1, 2, 3)}
    for rounds in (2, 3):
        for k, own in after[rounds - 1].items():
            assert torch.equal(after[rounds][k]["update"], own["update"]) == (k in lost[rounds - 1]), (rounds, k)
    assert "x" not in read_states(tmp_path / "3")[1]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("text", HOW)
def test_bounds_are_those_of_what_the_server_reads(text, make_data, make_config, tmp_path):
    config = make_config(rounds=1, compress=text, workers="1")
    run(config, out=tmp_path / "free", data=make_data())
    (free,) = read_metrics(tmp_path / "free")
    drifts = {k: info["drift"] for k, info in free["clients"].items()}
    bound = sorted(drifts.values())[1] * 1.0001
    run(config.replace(max_update_norm=bound, on_nan="skip"), out=tmp_path / "refused", data=make_data())
    (refused,) = read_metrics(tmp_path / "refused")
    assert [str(entry["client"]) for entry in refused["dropped"]] == [max(drifts, key=drifts.get)]
    run(config.replace(clip_update_norm=bound), out=tmp_path / "clipped", data=make_data())
    (clipped,) = read_metrics(tmp_path / "clipped")
    assert [k for k, info in clipped["clients"].items() if "clipped" in info] == [max(drifts, key=drifts.get)]


def test_sums_on_the_gpu_are_of_what_the_server_reads(make_data, make_config, tmp_path, monkeypatch):
    config = make_config(rounds=2, compress="int8", workers="1")
    for name, stays in (("gpu", True), ("host", False)):
        monkeypatch.setattr("fedkern.engine.uploads.reduction.has_room", lambda *_, stays=stays: stays)
        run(config, out=tmp_path / name, data=make_data())
    assert bytes_up(tmp_path / "gpu") == bytes_up(tmp_path / "host")
    gpu, host = (read_metrics(tmp_path / name)[0]["clients"] for name in ("gpu", "host"))
    assert gpu == host


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stored"),
    [("topk", "topk:share=0.05"), ("topk: share = .1", "topk:share=0.1"), ("int8", "int8"), (None, None)],
)
def test_options_are_stored_whole(text, stored, make_config):
    assert make_config(compress=text).compress == stored


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("top", '--compress must be one of topk, int8, not "top".'),
        ("topk:share=0.6", 'Option "share" of --compress topk must be above 0 and at most 0.5, not 0.6'),
        ("topk:share=0", 'Option "share" of --compress topk must be above 0'),
        ("int8:share=0.1", '--compress int8 has no option "share=0.1".'),
    ],
)
def test_a_wrong_compression_is_named(text, why, make_config):
    with pytest.raises(UserError) as caught:
        make_config(compress=text)
    assert str(caught.value).startswith(why)


def test_private_means_refuse(make_config):
    with pytest.raises(UserError, match=r"^--compress int8 keeps what .* --dp-noise counts on clients that keep noth"):
        make_config(compress="int8", dp_clip=1.0, dp_noise=1.0)
