"""Tests of Triton among the backends: the choice, and the message where it cannot serve."""

import math
import os
import subprocess
import sys

import pytest
import torch

from fedkern import ops
from fedkern.ops._core import backend
from fedkern.ops._distill.ensemble_reference import ensemble_reference
from fedkern.ops._distill.reference import kl_div_reference
from fedkern.ops._distill.rows import BATCHMEAN, PROBS
from python_tests.ops.operator_cases import BACKENDS, using

WITHOUT_TRITON = {"aggregate", "boxes", "optimise"}
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


@needs_triton
def test_what_triton_has_no_kernels_for_is_the_reference_and_told() -> None:
    with using("triton"):
        assert {backend.select(name, torch.randn(7, 50)) for name in WITHOUT_TRITON} == {None}
        x, y, logits = torch.randn(3, 7, 5), torch.randn(7, 5), torch.randn(7, 5, requires_grad=True)
        limit = ensemble_reference(logits, x, None, None, math.inf, PROBS, False, BATCHMEAN)
        for loss, reference in (
            (ops.dual_kl(logits, y, x[0], math.inf), kl_div_reference(logits, x[0], math.inf, peer=y)),
            (ops.ensemble_kl(logits, x, None, math.inf), limit),
        ):
            assert torch.equal(loss, reference)
            assert all(map(torch.equal, torch.autograd.grad(loss, logits), torch.autograd.grad(reference, logits)))
    leaves = {row.operator: row.leaves for row in backend.status() if row.backend == "triton"}
    assert leaves["kl_div"] == leaves["ensemble_kl"] == "infinite temperatures"
    assert not leaves["blend"]


def test_cuda_serves_where_both_can_and_triton_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins replace what only a GPU can load.

    Triton takes a third of a second to import, and is imported only where it serves.
    """
    built, loaded = [True], []

    def load(operator: str, name: str) -> str:
        loaded.append(name)
        if name == "cuda" and not built[0]:
            raise backend.Unavailable("fedkern._cuda was not built")
        return name

    monkeypatch.setattr(backend, "_load", load)
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(backend, "forced_backend", lambda: None)
    monkeypatch.setattr(backend, "_ordinary", {})
    for built[0], serving in ((True, "cuda"), (False, "triton")):
        monkeypatch.setattr(backend, "_chosen", {})
        loaded.clear()
        kernels = {name for name, kernels in backend._kernels.items() if "cuda" in kernels}
        assert {backend._choose(name, "cuda")[0] for name in kernels - WITHOUT_TRITON} == {serving}
        assert {backend._choose(name, "cuda")[0] for name in WITHOUT_TRITON} == {"cuda" if built[0] else None}
        assert ("triton" in loaded) == (serving == "triton")
