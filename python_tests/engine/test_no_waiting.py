"""Training steps never make the host wait for the GPU, checked on a pretended GPU."""

import dataclasses
from contextlib import suppress

import pytest
import torch

from fedkern.engine.run import run
from fedkern.methods import METHODS, FedAvg
from fedkern.process.device_copies import send
from fedkern.settings.config import RunConfig
from python_tests.pretended_gpu import META, pretend
from python_tests.smallest import SETTINGS

STEADY = {"rounds": 2, "local_epochs": 2, "batch_size": 8, "clients": 3, "augment": "crop-flip", "workers": "1"}
NETWORK = {"data": "digits", "model": "resnet8", "width": 2}
OWN = {
    "ensemble": {"options": {"models": "cnn:2,resnet8:2", "calibrate": False}},
    "fusefl": {"local_epochs": 4, "augment": "none", "options": {"blocks": 2, "calibrate": False}},
    "fedlpfm": {"train_samples": 60, "public_samples": 20, "partition": "iid"},
    "feddra": {"data": "captions", "partition": "iid", "local_steps": 4, "train_samples": 200, "model": None},
}
ONE_SHOT = {"fusefl", "oneshot-fedavg", "ensemble"}
QUICK = ("fedgid",)
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
    config = RunConfig.make(name, device="cpu", grad_cam=0, **given)
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
