"""Tests of a caller's PyTorch modes: they change no bit of a run, and are restored afterwards."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fedkern
from fedkern.data.sources.data_function import DataFunction
from fedkern.data.types import DataRequest
from fedkern.downstream import Finished, decode, probe, retrieve, zero_shot
from fedkern.downstream.membership_attack import attack
from fedkern.downstream.model_export import export, exportable
from fedkern.downstream.prediction import Predictor
from fedkern.downstream.run_evaluation import evaluate_run
from fedkern.downstream.saved_network import read_model
from fedkern.models.users.user_models import Own
from fedkern.process import torch_modes
from fedkern.settings.run_data import load_data
from fedkern.tasks.figure_names import METRICS
from fedkern.usercode import named_code, plugins
from fedkern.usercode.named_code import host_code

TINY = {"data": "digits", "clients": 3, "train_samples": 120, "local_steps": 2, "rounds": 2, "threads": 1,
        "grad_cam": 0, "progress": False, "pictures": False}  # fmt: skip


@contextmanager
def holding(name, value):
    """Set a mode of torch in the block, and check that the code inside leaves the mode unchanged."""
    get, put = getattr(torch, f"get_{name}"), getattr(torch, f"set_{name}")
    before = None if name == "default_device" else get()
    put(value)
    try:
        yield
        assert get() == value
    finally:
        put(before)


dtype, META = partial(holding, "default_dtype"), torch.device("meta")


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
    "default device meta": lambda: holding("default_device", META),
    "block on device meta": lambda: META,
    "no gradients": no_gradients,
    "inference mode": inference,
    "matrix products in bf16": lambda: holding("float32_matmul_precision", "medium"),
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("mode", "method", "model", "workers"),
    [(mode, ("fedavg", "scaffold")[i % 2], ("mlp", "cnn")[i // 2 % 2], 1) for i, mode in enumerate(MODES)]
    + [("float64", "scaffold", "mlp", 2), ("matrix products in bf16", "fedavg", "mlp", 2)],
)
def test_the_bits_of_a_plain_run(mode, method, model, workers, plain, tmp_path):
    with MODES[mode]():
        run = fedkern.simulate(method, model=model, out=tmp_path / "run", workers=workers, **TINY)
    before, after = weights(plain(method, model).out), weights(run.out)
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert run.summary["bytes"] == plain(method, model).summary["bytes"]


def export_run(run, folder, kind):
    export(exportable(run.out), folder / "network", kind)
    if kind == "state-dict":
        return torch.load(folder / "network")
    with dtype(torch.float32), torch.device("cpu"), torch.inference_mode(False):
        return torch.export.load(folder / "network").state_dict


def played_on(run, folder):
    """Return a copy of the run that goes on for a round."""
    shutil.copytree(run.out, folder / "copy")
    found = fedkern.load(folder / "copy").extend(3, progress=False, pictures=False, workers=1)
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
    "evaluate_run": lambda run, _: evaluate_run(run.out)[0],
    "Predictor": lambda run, _: Predictor.open(run.out).probabilities(PICTURES.clone()),
    "state-dict": lambda run, folder: export_run(run, folder, "state-dict"),
    "torch-export": lambda run, folder: export_run(run, folder, "torch-export"),
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
        **TINY, "data": "captions", "clients": 2, "train_samples": 40, "partition": "iid", "rounds": 1,
        "local_steps": 1,
    }  # fmt: skip
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


@pytest.mark.sampled(2)
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
    with dtype(torch.float64), holding("default_device", META), pytest.raises(fedkern.UserError):
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


SETTINGS = {
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default tensor": "torch.set_default_tensor_type(torch.DoubleTensor)",
    "default device": "torch.set_default_device('meta')",
    "gradients": "torch.set_grad_enabled(False)",
    "anomalies": "torch.autograd.set_detect_anomaly(True)",
    "threads": "torch.set_num_threads(3)",
    "denormal numbers": "torch.set_flush_denormal(True)",
    "oneDNN": "torch.backends.mkldnn.enabled = False",
    "matrix products": "torch.set_float32_matmul_precision('medium')",
    "matrix products of the CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "convolutions": "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "every precision": "torch.backends.fp32_precision = 'tf32'",
    "cuDNN": "torch.backends.cudnn.benchmark = True; torch.backends.cudnn.enabled = False",
    "attention": "torch.backends.cuda.enable_flash_sdp(False)",
    "floating errors": "numpy.seterr(all='raise')",
    "working folder": "os.chdir('/')",
}
"""What a file may do when it is imported, which changes bits of, or ends, what runs afterwards."""


def attention():
    """Return attention's enabled kernels, a GPU's preferred one first."""
    return _cur_sdpa_kernel_backends(with_priority=True)


def state():
    """Return the modes as other code meets them."""
    backends = torch.backends
    parts = (backends, backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    return {
        "new tensor": (
            torch.ones(1).dtype,
            torch.ones(1).device,
            torch.ones(1, requires_grad=True).mul(2).requires_grad,
        ),
        "anomalies": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "denormal": float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1) == 0,
        "kernels": (backends.mkldnn.enabled, backends.cudnn.benchmark, backends.cudnn.enabled),
        "precision": (torch_modes._read(torch.get_float32_matmul_precision), [part.fp32_precision for part in parts]),
        "attention": attention(),
        "errors": np.geterr(),
        "folder": Path.cwd(),
    }


def put_into_data(code, _):
    def function():
        exec(f"import os, numpy, torch\n{code}", {})
        raise LookupError("no files")

    DataFunction("mine", function, "classification", 2, "iid").make(DataRequest())


def put_into_network(code, _):
    def network(classes):
        exec(f"import os, numpy, torch\n{code}", {})
        return nn.Linear(4, classes, device="cpu", dtype=torch.float32)

    made = Own(network, "mine")(classes=2, channels=1, sides=(2, 2), seed=0, word=1, width=None)
    assert made.module.bias.shape == (2,)


SOURCES = {
    "plugin, a file": lambda _, path: plugins.load(str(path)),
    "plugin, a module": lambda _, path: plugins.load(path.stem),
    "network in a file": lambda _, path: named_code.load(named_code.parse(f"{path}:Net"), "the model"),
    "teacher in a module": lambda _, path: named_code.load(named_code.parse(f"{path.stem}:Net"), "the teacher"),
    "function of data": put_into_data,
    "network's constructor": put_into_network,
}
CASES = [(source, setting, fails) for source in SOURCES for setting in SETTINGS for fails in (False, True)]


@pytest.mark.parametrize(
    ("source", "setting", "fails"),
    [  # every seventh case: each source, setting and outcome is among them
        pytest.param(*case, marks=() if i % 7 == 0 else pytest.mark.exhaustive) for i, case in enumerate(CASES)
    ],
)
def test_what_users_code_sets_is_put_back(source, setting, fails, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins.metadata, "packages_distributions", dict)  # takes half a second
    name = f"mine_{list(SOURCES).index(source)}_{list(SETTINGS).index(setting)}_{fails}"
    path, before = tmp_path / f"{name}.py", state()
    path.write_text(
        f"import os, numpy, torch, fedkern\n{SETTINGS[setting]}\n{'1 / 0' * fails}\n"
        f"@fedkern.register_metric({name!r})\ndef Net(logits, labels):\n    'A share.'\n    return 0.5\n"
    )
    with suppress(fedkern.UserError):
        SOURCES[source](SETTINGS[setting], path)
    found = state()
    plugins.unload(str(path) if "file" in source else name)
    METRICS.pop(name, None)
    with torch_modes.keep_modes():  # the check itself: the setting does change what is compared
        exec(f"import os, numpy, torch\n{SETTINGS[setting]}", {})
        assert state() != before
    os.chdir(before["folder"])
    assert found == before


def test_what_a_caller_has_set_stays_where_users_code_sets_nothing():
    with torch_modes.keep_modes():
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        before = state()
        with host_code():
            pass
        assert state() == before
        with torch_modes.reproducible():
            assert torch.ones(1).dtype == torch.float32
        assert state() == before


def attend():
    """Return attention and its gradients on the CPU, and the name of the kernel that computes them."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, 65, 16, generator=generator, requires_grad=True) for _ in range(3)]
    found = scaled_dot_product_attention(*given)
    return [found, *torch.autograd.grad(found.square().sum(), given)], found.grad_fn.name()


def test_a_gpu_computes_attention_by_matrix_products():
    before = attention()
    assert before[0] != SDPBackend.MATH
    with torch_modes.reproducible():
        assert attention()[0] == SDPBackend.MATH
        with torch_modes.reproducible():
            assert attention()[0] == SDPBackend.MATH
        with ThreadPoolExecutor(1) as pool:  # sets are evaluated in threads
            assert pool.submit(attention).result()[0] == SDPBackend.MATH
        assert set(attention()) == set(before)
    assert attention() == before


@pytest.mark.parametrize("enabled", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_attention_on_the_cpu_has_the_bits_of_its_own_kernel(enabled):
    plain, name = attend()
    with sdpa_kernel(SDPBackend.MATH):
        products, math_name = attend()
    assert (name != math_name, any(map(torch.equal, plain, products))) == (True, False)
    with sdpa_kernel(enabled):  # a caller's, for work of its own
        with torch_modes.reproducible():
            found, name_after = attend()
            assert attention()[0] == SDPBackend.MATH
        assert attention() == [enabled]
    assert name_after == name
    assert all(map(torch.equal, found, plain))
