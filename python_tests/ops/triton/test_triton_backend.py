"""Triton among the backends: who is chosen, and what is said where it cannot serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import BACKENDS

from fedkern.ops._core import backend, crossovers, dispatch

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FEDKERN_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False
    )


CALL = "import torch; from fedkern.ops import blend; x = torch.ones(2, 3); print(blend(x, x).sum().item())"


@pytest.mark.exhaustive
@needs_triton
def test_forced_on_cpu_tensors() -> None:
    told = python(CALL, FEDKERN_BACKEND="triton")
    assert told.returncode
    assert "does not serve tensors on cpu (with TRITON_INTERPRET=1 in the environment" in told.stderr
    assert python(CALL, FEDKERN_BACKEND="triton", TRITON_INTERPRET="1").stdout.strip() == "6.0"


@pytest.mark.exhaustive
@needs_triton
def test_asked_for_after_triton_was_imported() -> None:
    code = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n" + CALL
    told = python(code, FEDKERN_BACKEND="triton")
    assert told.returncode
    assert "triton was imported before TRITON_INTERPRET=1 was set" in told.stderr


@pytest.mark.exhaustive
def test_missing_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\n" + CALL
    told = python(code, FEDKERN_BACKEND="triton", TRITON_INTERPRET="1")
    assert "it cannot be used because triton is not installed (pip install triton)" in told.stderr
    assert python(code).stdout.strip() == "6.0"


@needs_triton
def test_the_interpreter_is_only_for_those_who_ask() -> None:
    assert backend.select("blend", torch.ones(2, 3)) is not backend._load("blend", "triton")
    row = next(row for row in backend.status() if (row.operator, row.backend) == ("blend", "triton"))
    assert row.serves
    assert "interpreted" in row.reason


def test_estimated_sizes_choose_between_cuda_and_triton() -> None:
    sizes = dispatch.LAUNCH_HIDDEN
    assert dispatch.estimate("kl_div", (9, 0)) == sizes[9]
    assert dispatch.estimate("kl_div", (8, 6)) == sizes[8]
    assert dispatch.estimate("kl_div", (12, 0)) == sizes[10]
    assert dispatch.estimate("kl_div", (7, 5)) == sizes[8]
    assert dispatch.estimate("blend", (9, 0)) is None
    assert dispatch.estimate("unheard of", (9, 0)) is None
    assert set(dispatch.CROSSOVER) == {name for name, kernels in backend._kernels.items() if "cuda" in kernels}


def test_a_large_call_goes_to_the_other_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With two stand-ins for what only a GPU can load; Triton's is loaded when a call is large enough."""
    small, large = object(), object()
    loaded: list[str] = []

    def load(operator: str, name: str) -> object:
        loaded.append(name)
        return small if name == "cuda" else large

    monkeypatch.setattr(backend, "_load", load)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(crossovers, "FILE", tmp_path / "none.json")
    crossovers.write_entries([], crossovers.FILE)
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_large", {})
    monkeypatch.setattr(backend, "_ordinary", {})
    monkeypatch.setattr(backend, "forced_backend", lambda: None)
    edge = dispatch.LAUNCH_HIDDEN[9] // 4

    class Stand:
        dtype, layout, device = torch.float32, torch.strided, torch.device("cuda")

        def __init__(self, count: int) -> None:
            self.count = count

        def numel(self) -> int:
            return self.count

        def element_size(self) -> int:
            return 4

        def is_neg(self) -> bool:
            return False

    assert backend.select("kl_div", Stand(edge - 1)) is small
    assert loaded == ["cuda"]
    assert backend.select("kl_div", Stand(edge)) is large
    assert backend.select("blend", Stand(10 * edge)) is small
    # The short way knows one kernel.
    assert "kl_div" not in backend._ordinary

    def without_triton(operator: str, name: str) -> object:
        if name == "triton":
            raise backend.Unavailable("triton is not installed")
        return small

    monkeypatch.setattr(backend, "_load", without_triton)
    assert backend.select("kl_div", Stand(edge)) is small
