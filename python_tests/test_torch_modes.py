"""Settings of PyTorch that a caller has made for its own work change no bit of a run, and are back afterwards."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

import fedkern
from fedkern import torch_modes
from fedkern.downstream import Finished, decode, probe, retrieve, zero_shot
from fedkern.downstream.evaluation import evaluate_run
from fedkern.downstream.export import export
from fedkern.downstream.membership_attack import attack
from fedkern.downstream.prediction import Predictor
from fedkern.downstream.saved_network import read_model
from fedkern.settings.run_data import load_data

TINY = {"data": "digits", "clients": 3, "train_samples": 120, "local_steps": 2, "rounds": 2, "threads": 1,
        "grad_cam": 0, "progress": False, "pictures": False}  # fmt: skip


@contextmanager
def dtype(value):
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
        assert torch.get_default_dtype() == value
    finally:
        torch.set_default_dtype(before)


@contextmanager
def device(value):
    torch.set_default_device(value)
    try:
        yield
        assert torch.get_default_device() == torch.device(value)
    finally:
        torch.set_default_device(None)


@contextmanager
def matmul(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
        assert torch.get_float32_matmul_precision() == value
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def no_gradients():
    with torch.set_grad_enabled(False):
        yield
        assert not torch.is_grad_enabled()


@contextmanager
def inference():
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


MODES = {
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "default device meta": lambda: device("meta"),
    "block on device meta": lambda: torch.device("meta"),
    "no gradients": no_gradients,
    "inference mode": inference,
    "matrix products in bf16": lambda: matmul("medium"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def weights(out):
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    found = {}

    def of(method, model):
        if (method, model) not in found:
            out = tmp_path_factory.mktemp("plain") / "run"
            found[method, model] = fedkern.simulate(method, model=model, out=out, workers=1, **TINY)
        return found[method, model]

    return of


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("mode", "method", "model", "workers"),
    [
        (mode, ("fedavg", "scaffold")[number % 2], ("mlp", "cnn")[number // 2 % 2], 1)
        for number, mode in enumerate(MODES)
    ]
    + [("float64", "scaffold", "mlp", 2), ("matrix products in bf16", "fedavg", "mlp", 2)],
)
def test_the_bits_of_a_plain_run(mode, method, model, workers, plain, tmp_path):
    with MODES[mode]():
        run = fedkern.simulate(method, model=model, out=tmp_path / "run", workers=workers, **TINY)
    before, now = weights(plain(method, model).out), weights(run.out)
    assert {name: value.dtype for name, value in now.items()} == {name: value.dtype for name, value in before.items()}
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert run.summary["bytes"] == plain(method, model).summary["bytes"]


def exported(run, folder, kind):
    export(Predictor.open(run.out), folder / "network", kind)
    if kind == "state-dict":
        return torch.load(folder / "network")
    with dtype(torch.float32), torch.device("cpu"), torch.inference_mode(False):
        return torch.export.load(folder / "network").state_dict


def played_on(run, folder):
    """A copy of the run that goes on for a round, with its pictures."""
    shutil.copytree(run.out, folder / "copy")
    found = fedkern.load(folder / "copy").extend(3, progress=False, workers=1)
    return weights(found.out)


PICTURES = torch.arange(2 * 1024).remainder(256).to(torch.uint8).reshape(2, 1, 32, 32)
USES = {
    "model": lambda run, _: run.model().state_dict(),
    "predict": lambda run, _: run.predict(PICTURES.clone()),
    "evaluate": lambda run, _: run.evaluate(),
    "extend": played_on,
    "plot": lambda run, _: {path.name: path.read_bytes() for path in run.plot()},
    "report": lambda run, _: run.report().read_bytes(),
    "attack": lambda run, _: attack(run.out, keep=False),
    "load_data": lambda run, _: [split.labels for split in load_data(run.config).clients],
    "read_model": lambda run, _: read_model(run.out)[0].state_dict(),
    "evaluate_run": lambda run, _: evaluate_run(run.out),
    "Predictor": lambda run, _: Predictor.open(run.out).probabilities(PICTURES.clone()),
    "state-dict": lambda run, folder: exported(run, folder, "state-dict"),
    "torch-export": lambda run, folder: exported(run, folder, "torch-export"),
    "zero_shot": lambda pair, _: zero_shot(Finished.open(pair.out)),
    "retrieve": lambda pair, _: retrieve(Finished.open(pair.out)),
    "probe": lambda pair, _: probe(Finished.open(pair.out), [1], draws=1),
    "decode": lambda pair, _: decode(Finished.open(pair.out), epochs=1, samples=8),
}
"""Whatever runs the network of a finished run, or reads its data."""
OF_PAIRS = {"zero_shot", "retrieve", "probe", "decode"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "run"
    settings = {
        **TINY,
        "data": "captions",
        "clients": 2,
        "train_samples": 40,
        "partition": "iid",
        "rounds": 1,
        "local_steps": 1,
    }
    sizes = {"test_samples": 12, "validation_samples": 6}
    return fedkern.simulate("fedavg", out=out, workers=1, width=16, data_options=sizes, **settings)


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and found.device == expected.device and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


SAMPLE = {use: ("float64", "default device meta")[i % 2] for i, use in enumerate(USES) if use != "torch-export"}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("use", "mode"),
    [
        pytest.param(use, mode, marks=() if mode == SAMPLE.get(use) else pytest.mark.exhaustive)
        for use in USES
        for mode in MODES
        if mode != "autocast"
    ],
)
def test_a_finished_run_is_used_as_ever(use, mode, plain, tmp_path, request):
    run = request.getfixturevalue("pair") if use in OF_PAIRS else plain("fedavg", "mlp")
    folders = tmp_path / "before", tmp_path / "now"
    for folder in folders:
        folder.mkdir()
    expected = USES[use](run, folders[0])
    with MODES[mode]():
        found = USES[use](run, folders[1])
    assert same(found, expected)


def test_a_failed_run_puts_the_settings_back(tmp_path):
    with dtype(torch.float64), device("meta"), pytest.raises(fedkern.UserError):
        fedkern.simulate("fedavg", out=tmp_path / "run", **{**TINY, "train_samples": 10_000_000})


def test_what_a_worker_takes_over_is_set_where_it_changes(monkeypatch):
    calls = []

    def use(mode, *, warn_only):  # torch's own also imports its compiler, which takes a second
        calls.append((mode, warn_only))
        torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)

    monkeypatch.setattr(torch, "use_deterministic_algorithms", use)
    before = torch_modes.modes()
    try:
        for change in ({"mkldnn": False}, {"deterministic": True}, {"deterministic": True, "warn_only": True}):
            torch_modes.set_modes({**before, **change})
            assert torch_modes.modes() == {**before, **change}
    finally:
        torch_modes.set_modes(before)
    assert torch_modes.modes() == before
    assert calls == [(True, False), (True, True), (False, False)]
