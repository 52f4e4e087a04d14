"""A run from its settings to its folder, and training steps that never make the host wait for the GPU."""

import dataclasses
import json
from contextlib import suppress

import numpy as np
import pytest
import torch

from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, Phase
from fedkern.ops import FlatParameters
from fedkern.process.device_copies import send
from fedkern.settings.config import RunConfig, load_settings
from fedkern.settings.run_data import load_data
from python_tests.engine.test_resume import WithSetUp
from python_tests.hearing import Hearing
from python_tests.pretended_gpu import META, pretend
from python_tests.smallest import SETTINGS


def test_folder_holds_what_the_interface_promises(make_data, make_config, tmp_path):
    heard = Hearing()
    config = make_config("fedgid", grad_cam=4)
    summary = run(config, out=tmp_path / "run", listener=heard, data=make_data())
    out = tmp_path / "run"
    stored = load_settings(out)
    assert {"images", "labels", "version"} <= stored.identity.keys()
    assert stored.replace(identity={}) == config.replace(augment="none").with_client_threads()
    records = read_metrics(out)
    assert [r["round"] for r in records] == [1, 2]
    for record in records:
        assert {"round", "seconds", "bytes_up", "bytes_down", "id_accuracy", "ood_accuracy", "id_loss"} <= set(record)
        assert set(record["clients"]) == {"0", "1", "2"}
        for client in record["clients"].values():
            assert client["drift"] > 0
            assert np.isfinite(client["loss"])
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"method", "data", "seed", "rounds", "metrics", "bytes", "seconds", "versions"} <= set(summary)
    for name in ("id_accuracy", "ood_accuracy", "id_confidence", "id_gradcam_in_object"):
        assert 0 <= summary["metrics"][name] <= 1
    assert heard.info.out == out
    assert heard.drawn == [[0, 1, 2]] * 2
    assert [r["round"] for r in heard.records] == [1, 2]
    assert heard.summary == summary
    assert not list(out.rglob("*.part"))


def test_saved_model_is_the_evaluated_one(make_data, make_config, tmp_path):
    data = make_data()
    summary = run(make_config(), out=tmp_path / "run", data=data)
    model, about = read_model(tmp_path / "run")
    assert not model.training
    assert about["classes"] == ["a", "b", "c"]
    for name, test in data.tests.items():
        mean, std = (torch.tensor(about[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            predicted = model((test.images / 255 - mean) / std).argmax(1)
        accuracy = float((predicted == test.labels).double().mean())
        assert accuracy == pytest.approx(summary["metrics"][f"{name}_accuracy"])


def test_two_runs_are_bitwise_equal_and_the_seed_matters(make_data, make_config, tmp_path):
    data = make_data()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(make_config("fedgid", seed=seed), out=tmp_path / name, data=data)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_ledger_counts_what_travels(make_data, make_config, tmp_path):
    summary = run(make_config(rounds=3), out=tmp_path / "run", data=make_data())
    model = models.build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2)
    flat = FlatParameters(model)
    size = 4 * (len(flat.parameters) + len(flat.buffers)) + 8 * len(flat.integers)
    traffic = {"up": 3 * size, "down": 3 * size, "one_off_up": 0, "one_off_down": 0}
    assert summary["bytes"]["clients"] == {str(k): traffic for k in range(3)}
    assert summary["bytes"]["up"] == summary["bytes"]["down"] == 9 * size
    assert summary["bytes"]["total"] == 18 * size


def test_a_set_up_round_is_counted_as_one_off(make_data, make_config, tmp_path, monkeypatch):
    data = make_data()
    plain = run(make_config("fedgid"), out=tmp_path / "plain", data=data)["bytes"]
    monkeypatch.setitem(METHODS, "fedgid", WithSetUp)
    summary = run(make_config("fedgid"), out=tmp_path / "run", data=data)
    assert summary["bytes"]["up"] == plain["up"]
    assert summary["bytes"]["one_off_up"] == summary["bytes"]["one_off_down"] == 3 * 4  # a number of each client
    assert summary["rounds"] == 2


@pytest.mark.parametrize("name", ["validation", "test", "balanced", "worst_client"])
def test_a_set_whose_name_means_something_begins_no_run(name, make_data, make_config, refuses, tmp_path):
    data = make_data(two_tests=False)
    with refuses(f'The test set "{name}" cannot have this name'):
        run(
            make_config("fedavg"),
            out=tmp_path / "run",
            data=dataclasses.replace(data, tests={**data.tests, name: data.tests[""]}),
        )


def test_adding_a_client_changes_no_other_clients_draws(make_data, make_config, tmp_path, monkeypatch):
    seen = {}

    class Spy(METHODS["fedgid"]):
        """A method that notes every client's draws."""

        def draw(self, client, batch, rng):
            drawn = super().draw(client, batch, rng)
            entry = (batch.indices.tolist(), drawn["index"].tolist())
            seen.setdefault((client.id, batch.phase.round), []).append(entry)
            return drawn

    monkeypatch.setitem(METHODS, "fedgid", Spy)
    run(make_config("fedgid"), out=tmp_path / "three", data=make_data())
    three, seen = dict(seen), {}
    run(make_config("fedgid", clients=4), out=tmp_path / "four", data=make_data(sizes=(20, 13, 9, 11)))
    assert {key for key in seen if key[0] < 3} == set(three)
    for key, draws in three.items():
        assert seen[key] == draws
    assert seen[0, 0] != seen[0, 1]
    context = RunContext(make_config(), make_data())
    phase = Phase(0, "train", "update")
    draws = [Client(context, k, {}).rng(p, phase).random() for k in (0, 1) for p in ("batches", "background")]
    assert len(set(draws)) == 4


def test_the_server_holds_one_upload_at_a_time(make_data, make_config, tmp_path, monkeypatch):
    import weakref

    alive, held = [], []

    class Spy(FedAvg):
        """A method that counts the living uploads when a client has finished."""

        def client_update(self, client, phase, message):
            held.append(sum(ref() is not None for ref in alive))
            answer = super().client_update(client, phase, message)
            alive.append(weakref.ref(answer["parameters"]))
            return answer

    monkeypatch.setitem(METHODS, "fedavg", Spy)
    run(make_config(), out=tmp_path / "run", data=make_data())
    assert held == [0] * 6  # nothing is left of an upload when the next client starts


def test_a_server_that_reads_nothing_still_lets_clients_work(make_data, make_config, tmp_path, monkeypatch):
    worked = []

    class Deaf(FedAvg):
        """FedAvg whose server keeps the initial network."""

        def client_update(self, client, phase, message):
            worked.append(client.id)
            return message

        def server_update(self, server, phase, uploads):
            pass

    monkeypatch.setitem(METHODS, "fedavg", Deaf)
    run(make_config(rounds=1), out=tmp_path, data=make_data())
    assert worked == [0, 1, 2]


def test_weighting_and_lr_decay_reach_the_run(make_data, make_config, tmp_path):
    data = make_data()
    base = {"out": tmp_path / "a", "data": data}
    models_ = [(tmp_path / "a" / "model.safetensors", run(make_config(), **base))[0].read_bytes()]
    for i, change in enumerate([{"options": {"weighting": "uniform"}}, {"lr_decay": 0.5}, {"clip_norm": 0.1}]):
        out = tmp_path / f"b{i}"
        run(make_config(**change), out=out, data=data)
        models_.append((out / "model.safetensors").read_bytes())
    assert len(set(models_)) == 4


def test_a_detector_runs_on_the_device_of_the_run(make_config, monkeypatch):
    given = {}

    def detector(model, box_threshold, text_threshold, device):
        given.update(model=model, thresholds=(box_threshold, text_threshold), device=device)
        raise UserError("made")

    monkeypatch.setattr("fedkern.models.pretrained.detector.GroundingDino", detector)
    config = make_config(data="digits", partition="iid", data_options={"detector": "tiny", "text_threshold": 0.4})
    with pytest.raises(UserError, match="made"):
        load_data(config)
    assert given == {"model": "tiny", "thresholds": (0.35, 0.4), "device": "cpu"}
    assert load_data(config, masks=False).clients[0].masks is None


def test_empty_client_is_named(make_data, make_config, refuses, tmp_path):
    with refuses("Client 1 has no training samples"):
        run(make_config(), out=tmp_path / "run", data=make_data(sizes=(5, 0, 5)))


def test_no_masks_is_said_in_one_sentence(make_data, make_config, refuses, tmp_path):
    with refuses("has no masks"):
        run(make_config("fedgid"), out=tmp_path / "run", data=make_data(masked=False))
    run(make_config("fedgid", options={"intervention": False}), out=tmp_path / "gd", data=make_data(masked=False))


@pytest.mark.parametrize(("data", "model"), [("colordigits", "resnet8"), ("digits", "cnn")])
def test_embedded_data_end_to_end(data, model, tmp_path):
    config = RunConfig.make(
        "fedgid" if data == "colordigits" else "fedprox", data=data, model=model, width=4, rounds=1, local_epochs=1,
        train_samples=120, data_options={"test_samples": 40}, threads=1, grad_cam=8,
    )  # fmt: skip
    summary = run(config, out=tmp_path)
    prefix = "ood_" if data == "colordigits" else ""
    assert 0 <= summary["metrics"][prefix + "accuracy"] <= 1
    assert run(load_settings(tmp_path), out=tmp_path, resume=True)["metrics"] == summary["metrics"]


def test_a_missing_or_damaged_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="elsewhere does not exist"):
        read_model(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.toml"):
        read_model(tmp_path)
    (tmp_path / "config.toml").write_text(RunConfig.make("fedavg").to_toml())
    with pytest.raises(UserError, match="its run is not finished"):
        read_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        read_model(tmp_path)


# -- no waiting --------------------------------------------------------------------------------------------------------


STEADY = {"rounds": 2, "local_epochs": 2, "batch_size": 8, "clients": 3, "augment": "crop-flip", "workers": "1"}
NETWORK = {"data": "digits", "model": "resnet8", "width": 2}
OWN = {
    "fedgid image": {"model": "cnn", "options": {"intervene": "image"}},
    "ensemble": {"options": {"models": "cnn:2,resnet8:2", "calibrate": False}},
    "fusefl": {"local_epochs": 4, "augment": "none", "options": {"blocks": 2, "calibrate": False}},
    "fedlpfm": {"train_samples": 60, "public_samples": 20, "partition": "iid"},
    "feddra": {"data": "captions", "partition": "iid", "local_steps": 4, "train_samples": 200, "model": None},
}
ONE_SHOT = {"fusefl", "oneshot-fedavg", "ensemble"}
QUICK = ("fedgid image",)
LOCAL_ONLY = {"fediod", "local", "centralised", "ccvr", "dense", "fedcgs", "feddf"}
"""Methods whose own step is not a client's, or that train as FedAvg does and answer with tensors of the device."""
LATER = tuple(sorted(set(METHODS) - set(QUICK) - LOCAL_ONLY))


def settings(name):
    given = {**NETWORK, **STEADY, **SETTINGS.get(name, {}), **OWN.get(name, {})}
    if name in ONE_SHOT:
        del given["rounds"]
    return {key: value for key, value in given.items() if value is not None}


# What is kept of the run cannot be written into a network that has no values: torch says so.
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LATER)])
def test_no_step_waits_for_the_device(name, make_data, monkeypatch, tmp_path):
    given = settings(name)
    waits = pretend(monkeypatch)
    config = RunConfig.make(name.partition(" ")[0], device="cpu", grad_cam=0, **given)
    made = make_data()
    form = dataclasses.replace(made.form, augment=given["augment"])
    data = None if "train_samples" in given else dataclasses.replace(made, form=form)
    with waits:
        run(config, data=data, out=tmp_path / "run")
    assert waits.steps > 3
    assert not waits.found


class Reading(FedAvg):
    def loss(self, model, batch, received):
        found = super().loss(model, batch, received)
        (found[0] if isinstance(found, tuple) else found).item()
        return found


class Copying(FedAvg):
    def loss(self, model, batch, received):
        torch.ones(3).to(batch.inputs.device)
        return super().loss(model, batch, received)


class Choosing(FedAvg):
    def loss(self, model, batch, received):
        with suppress(NotImplementedError):  # a tensor without values has no answer
            batch.targets[batch.targets > 0]
        return super().loss(model, batch, received)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("kind", "operator"),
    [(Reading, "a value that is read"), (Copying, "a copy of [3] to meta"), (Choosing, "depends on values")],
)
def test_steps_that_wait_are_noticed(kind, operator, make_data, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "fedavg", kind)
    waits = pretend(monkeypatch)
    short = {**settings("fedavg"), "rounds": 1, "local_epochs": 1}
    with waits:
        run(RunConfig.make("fedavg", device="cpu", grad_cam=0, **short), data=make_data(), out=tmp_path)
    assert any(operator in found for found in waits.found)


def test_what_is_sent_is_what_was_given():
    values = torch.arange(6).reshape(2, 3)
    assert send(values, torch.device("cpu")) is values
    sent = send(values, META)
    assert (sent.device, sent.shape, sent.dtype) == (META, values.shape, values.dtype)
    assert send(sent, META) is sent
    wide = send(values[None].expand(4, 2, 3), META)
    assert (wide.shape, wide.is_contiguous()) == ((4, 2, 3), True)
    maps = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert send(maps, META).is_contiguous(memory_format=torch.channels_last)
