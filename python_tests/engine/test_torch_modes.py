"""Settings of PyTorch that a caller has made for its own work change no bit of a run, and are back afterwards."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

import fedkern

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


@pytest.mark.parametrize("mode", ["float64", "default device meta", "inference mode"])
def test_a_finished_run_is_used_as_ever(mode, plain):
    run = plain("fedavg", "mlp")
    images = torch.zeros((2, 1, 32, 32), dtype=torch.uint8)
    expected, figures = run.predict(images), run.evaluate()
    with MODES[mode]():
        found, again = run.predict(images), run.evaluate()
    assert torch.equal(found, expected)
    assert again == figures


def test_a_failed_run_puts_the_settings_back(tmp_path):
    with dtype(torch.float64), device("meta"), pytest.raises(fedkern.UserError):
        fedkern.simulate("fedavg", out=tmp_path / "run", **{**TINY, "train_samples": 10_000_000})
