"""Networks that clients bring (``--teachers``): errors are found before anything is written."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from fedkern import models
from fedkern.data.identity import data_fingerprint
from fedkern.downstream.saved_network import read_model
from fedkern.engine import clients
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.networks import ClientTeachers
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.messages import states
from fedkern.methods import METHODS
from fedkern.settings.config import RunConfig

GENERATED = {"nz": 4, "ngf": 2, "generator_steps": 1, "synthesis_batch": 4, "distill_batch": 4, "distill_epochs": 1}
OPTIONS = {
    "ccvr": {"virtual_features": 20, "calibration_epochs": 1},
    "dense": GENERATED,
    "feddf": {"distill_batch": 4, "distill_epochs": 2},
    "fediod": {"ngf": 2, "ndf": 2, "batch": 4, "student_steps": 1, "iterations": 1},
}
ABLE = sorted(name for name, kind in METHODS.items() if kind.takes_teachers)


@pytest.fixture
def data(make_data, make_public):
    return make_public(make_data(), samples=8)


@pytest.fixture
def attempt(data, make_config, tmp_path):
    """Return a function that runs a method with the folder ``tmp_path / "given"``."""

    def go(method="ensemble", *, out="out", teachers="given", data=data, model="cnn", options=None, **settings):
        config = make_config(
            method, model=model, grad_cam=0, rounds=1 if method == "fediod" else None,
            teachers=None if teachers is None else str(tmp_path / teachers),
            options={**OPTIONS.get(method, {}), **(options or {})}, **settings,
        )  # fmt: skip
        return run(config, out=tmp_path / out, data=data)

    return go


def network(model="cnn", width=2, seed=0):
    return models.build(model, classes=3, channels=3, image_size=8, seed=seed, width=width)


@pytest.fixture
def teacher_files(tmp_path):
    """Write three sound networks as files."""
    folder = tmp_path / "given"
    folder.mkdir()
    for k in range(3):
        save_file(network(seed=k).state_dict(), folder / f"client-{k}.safetensors")
    return folder


def infinite():
    tensors = network().state_dict()
    next(iter(tensors.values()))[0] = float("inf")
    return tensors


def no_statistics():
    tensors = network().state_dict()
    tensors[next(name for name in tensors if name.endswith("running_var"))][0] = float("nan")
    return tensors


WRONG = {
    "missing": (lambda path: None, r"has neither client-2\.safetensors .* run of fediod or ensemble"),
    "not safetensors": (lambda path: path.write_bytes(b"no"), "client-2.safetensors is damaged: "),
    "a folder": (lambda path: path.with_suffix(".pt").mkdir(), r"client-2\.pt cannot be read: Is a directory"),
    "empty": (lambda path: path.with_suffix(".pt").touch(), r"client-2\.pt is damaged: "),
    "no pickle": (lambda path: path.with_suffix(".pth").write_bytes(b"hello " * 9), "not hold a state dict"),
    "another pickle": (lambda path: path.with_suffix(".pt").write_bytes(bytes(range(256))), "not hold a state dict"),
    "a module": (lambda path: torch.save(network(), path.with_suffix(".pt")), "not hold a state dict"),
    "a list": (lambda path: torch.save([torch.zeros(1)], path.with_suffix(".pt")), "not hold a state dict"),
    "another": (lambda path: save_file(network("resnet18").state_dict(), path), "is not a CNN as client 2 has it"),
    "wider": (lambda path: save_file(network(width=3).state_dict(), path), "is not a CNN as client 2 has it"),
    "infinite": (lambda path: save_file(infinite(), path), "its parameters are not finite"),
    "nan": (lambda path: save_file(no_statistics(), path), "its buffers are not finite"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_named_before_anything_is_written(wrong, teacher_files, attempt, tmp_path):
    make, words = WRONG[wrong]
    path = teacher_files / "client-2.safetensors"  # the last one: all of them are looked at
    path.unlink()
    make(path)
    with pytest.raises(UserError, match=words) as caught:
        attempt()
    said = str(caught.value)
    assert said.startswith("--teachers: ")
    assert "\n" not in said
    assert "weights_only" not in said
    assert len(said.replace(str(teacher_files), "")) < 350
    assert not (tmp_path / "out").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ABLE)
def test_every_method_looks_at_them_before_anything_is_written(method, teacher_files, attempt, tmp_path):
    (teacher_files / "client-2.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"client-2\.safetensors is damaged"):
        attempt(method)
    with pytest.raises(UserError, match=r"there is no folder .*elsewhere"):
        attempt(method, teachers="elsewhere")
    assert not (tmp_path / "out").exists()
    save_file(network(seed=2).state_dict(), teacher_files / "client-2.safetensors")
    attempt(method)  # the same folder serves once it is right, and so does --out


def test_each_client_is_looked_at_with_its_own_architecture(teacher_files, attempt, tmp_path):
    options = {"models": "cnn:2,cnn:2,mlp:4"}
    for method in ("dense", "fediod", "ensemble"):
        with pytest.raises(UserError, match="is not a MLP as client 2 has it"):
            attempt(method, options=options)
    assert not (tmp_path / "out").exists()
    save_file(network("mlp", 4).state_dict(), teacher_files / "client-2.safetensors")
    attempt("dense", options=options)


def test_many_clients_do_not_stay_in_memory(teacher_files, data, make_config, monkeypatch):
    """All are loaded into one network, and a file with all members is read one member at a time."""
    made = []
    monkeypatch.setattr(Client, "network", lambda self, **own: made.append(network()) or made[-1])
    config = make_config("ensemble", model="cnn", rounds=None, teachers=str(teacher_files))
    clients.check_teachers(METHODS["ensemble"](), RunContext(config, data))
    assert len(made) == 1
    assert torch.equal(next(made[0].parameters()), next(network(seed=2).parameters()))


# -- run folders -------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_is_damaged_or_of_another_network(attempt, tmp_path):
    attempt(out="given", teachers=None)
    with pytest.raises(UserError, match=r"of another architecture \(.* parameters instead of .*\): give the --model"):
        attempt(model="resnet8")
    path = tmp_path / "given" / "checkpoints" / Checkpoints(tmp_path / "given").peek()["server"]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # within a tensor: the file can be read
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--teachers: {path} is missing or damaged: bring the networks of another run"):
        attempt()
    path.unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        attempt()
    (path.parent / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"--teachers: .*manifest\.json is damaged"):
        attempt()
    assert not (tmp_path / "out").exists()


def test_files_of_ones_own_do_not_depend_on_a_run_beside_them(teacher_files, attempt):
    (teacher_files / "checkpoints").mkdir()
    (teacher_files / "checkpoints" / "manifest.json").write_text("{")
    assert "teachers-of-other-data" not in attempt()["diagnostics"]


def test_a_run_without_networks_of_its_clients(make_config, data, attempt, tmp_path):
    run(make_config("fedavg", model="cnn", rounds=1, grad_cam=0), out=tmp_path / "given", data=data)
    with pytest.raises(UserError, match="nor a run's network of client 0"):
        attempt()
    assert not (tmp_path / "out").exists()


def test_networks_of_a_run_that_diverged(attempt, tmp_path):
    attempt(out="given", teachers=None)
    checkpoints = Checkpoints(tmp_path / "given")
    checkpoints.open()
    server = checkpoints.server_state()
    server["members"][1]["parameters"][3] = float("nan")
    entry = checkpoints.entries[-1]
    checkpoints.commit(round=entry["round"], plan=9, server=server, info=entry["info"])
    with pytest.raises(UserError, match=r"the network of client 1 in .* its parameters are not finite"):
        attempt()


def test_a_run_on_other_data_is_named(attempt, data, make_data, make_public, tmp_path):
    foreign = make_public(make_data(seed=4), samples=8)
    attempt(out="given", teachers=None, data=foreign, seed=4)
    said = attempt(seed=0)["diagnostics"]["teachers-of-other-data"]
    assert str(tmp_path / "given") in said
    for seed, used in ((4, foreign), (0, data)):
        assert f"seed {seed}; fingerprint {data_fingerprint(used):08x}" in said
    assert "partition" not in said  # only what differs
    assert "teachers-of-other-data" not in attempt(out="same", data=foreign, seed=4)["diagnostics"]
    with_masks = dataclasses.replace(data, validation=foreign.validation)  # settings that say nothing of it
    assert "fingerprint" in attempt(out="files", data=with_masks)["diagnostics"]["teachers-of-other-data"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["diagnostics"]["teachers-of-other-data"] == said


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["ccvr", "dense", "ensemble", "feddf"])
def test_networks_of_a_run_are_as_good_as_those_trained_in_it(method, attempt, tmp_path):
    """The runs are equal bit for bit, with everything after the training. CCVR keeps the statistics of training."""
    attempt("ensemble", out="given", teachers=None, options={"fresh_statistics": method != "ccvr"})
    summaries = [attempt(method, out=out, teachers=where) for out, where in (("trained", None), ("brought", "given"))]
    states = [read_model(tmp_path / out)[0].state_dict() for out in ("trained", "brought")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    fresh = network().state_dict()
    assert method == "ensemble" or not all(torch.equal(value, states[0][name]) for name, value in fresh.items())


@pytest.mark.usefixtures("teacher_files")
def test_a_network_is_loaded_for_the_check_and_for_its_use(attempt, monkeypatch):
    real, loaded = ClientTeachers.load, []
    monkeypatch.setattr(ClientTeachers, "load", lambda self, k, module: loaded.append(k) or real(self, k, module))
    attempt(workers="1")
    assert sorted(loaded) == [0, 0, 1, 1, 2, 2]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("buffers", ["drop", "local"])
def test_statistics_of_networks_that_are_brought_travel_as_those_of_trained_ones(buffers, attempt, tmp_path):
    attempt("ensemble", out="given", teachers=None)
    sent = [
        attempt("oneshot-fedavg", out=out, teachers=where, buffers=buffers)["bytes"]["up"]
        for out, where in (("trained", None), ("brought", "given"))
    ]
    assert sent[0] == sent[1]


def test_a_part_of_a_state(tmp_path, monkeypatch):
    """Values under some keys are read without the rest of the file."""
    members = {k: {"parameters": torch.full((4,), float(k)), "samples": k} for k in range(3)}
    states.save(tmp_path / "x", {"members": members, "1": "text"})
    found = states.part(tmp_path / "x", "members", 1)
    assert found["samples"] == 1
    assert torch.equal(found["parameters"], members[1]["parameters"])
    for keys in (("members", 7), ("members", "1"), ("none",), ("1", "deeper"), ("members", 1, "samples", "deeper")):
        assert states.part(tmp_path / "x", *keys) is None
    read = []
    real = states.safe_open

    class Watched:
        def __init__(self, *teacher_files, **named):
            self.file = real(*teacher_files, **named)

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *teacher_files):
            return self.file.__exit__(*teacher_files)

        def metadata(self):
            return self.inner.metadata()

        def get_tensor(self, name):
            read.append(name)
            return self.inner.get_tensor(name)

    monkeypatch.setattr(states, "safe_open", Watched)
    states.part(tmp_path / "x", "members", 2)
    assert len(read) == 1


def test_a_relative_folder_is_stored_as_an_absolute_one(tmp_path, monkeypatch):
    """A run may be resumed from anywhere."""
    monkeypatch.chdir(tmp_path)
    assert RunConfig.make("ccvr", teachers="own").teachers == str(tmp_path / "own")
