"""Uploads that stay on the GPU: runs have the bits of uploads from the host, and only suitable uploads stay."""

import math
from functools import wraps

import pytest
import torch
from safetensors.torch import load_file

from fedkern.engine.client import Client
from fedkern.engine.local.networks import Networks
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.engine.uploads import reduction
from fedkern.engine.uploads.encoders import Departure, Drift
from fedkern.engine.uploads.reduction import GpuCheck, MovingAccumulator
from fedkern.methods import METHODS, FedAvg
from fedkern.methods.uploads import like
from fedkern.ops import Accumulator

SMALL = {"width": 2, "rounds": 2, "local_epochs": 1, "batch_size": 4, "clients": 3, "grad_cam": 0, "workers": "1"}
STAYING = ("fedavg", "scaffold", "moon", "feddyn", "fedgid")
"""Methods whose clients' vectors may stay; MOON, FedDyn and SCAFFOLD compute with what training returned."""


def play(name, stays, data, make_config, out, monkeypatch, **more):
    """Return the vectors that stayed on the device in a run, the final model and the clients' figures."""
    seen, train = [], Client.train
    with monkeypatch.context() as patch:
        patch.setattr(reduction, "has_room", lambda *_: stays)
        patch.setattr(Client, "train", lambda self, *a, **k: seen.append(self.on_gpu) or train(self, *a, **k))
        run(make_config(name, **SMALL, **more), data=data, out=out)
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
def test_a_client_update_of_somebody_elses_gets_vectors_of_the_host(
    kind, make_data, make_config, tmp_path, monkeypatch
):
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
