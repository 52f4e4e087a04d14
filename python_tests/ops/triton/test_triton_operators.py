"""Tests of every public operator through the Triton backend: in the interpreter, and on a GPU.

``python -m pytest -m gpu python_tests/ops/triton`` runs the compiled kernels; ``TRITON_INTERPRET`` must not be set.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fedkern import ops
from fedkern.ops._core import backend, loading
from fedkern.ops._distill.ensemble_reference import ensemble_reference
from fedkern.ops._distill.reference import kl_div_reference
from fedkern.ops._distill.rows import BATCHMEAN, PROBS
from python_tests.ops import differential, operator_runs
from python_tests.ops.every_operator import Operator, each_gpu_operator
from python_tests.ops.operator_cases import BACKENDS, using

SERVED = ("kl_div", "dual_kl", "ensemble_kl", "js_div", "consensus", "entropy", "blend", "fuse_concat", "fuse_mean")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Yield a GPU, with the Triton backend forced."""
    if not torch.cuda.is_available() or loading.is_interpreted():
        pytest.skip("no CUDA device" if not torch.cuda.is_available() else "TRITON_INTERPRET is set")
    with ops.use_backend("triton"):
        yield torch.device("cuda")


@pytest.mark.sampled(5)
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
@each_gpu_operator
def test_each_operator_gives_the_reference_result(operator: Operator) -> None:
    with using("triton"):
        operator_runs.compare(operator, torch.device("cpu"))


@pytest.mark.exhaustive
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
@pytest.mark.parametrize("operator", SERVED)
def test_some_random_calls_agree_with_the_reference(operator: str) -> None:
    with using("triton"):
        differential.agree(operator, 4)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
def test_compiled_graphs_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkern.ops._blend.triton import blend
    from fedkern.ops._distill.triton import distill

    launched: list[str] = []
    for module in (blend, distill):
        before = module.launch

        def launch(kernel: Any, *arguments: Any, before: Callable[..., None] = before, **meta: Any) -> None:
            launched.append(kernel.fn.__name__)
            before(kernel, *arguments, **meta)

        monkeypatch.setattr(module, "launch", launch)
    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    torch._dynamo.reset()
    with using("triton"):
        compiled = torch.compile(lambda a, b: ops.kl_div(ops.blend(a, b, 0.3), b), fullgraph=True, backend="aot_eager")
        loss = compiled(x, y)
        loss.backward()
        torch.testing.assert_close(loss, ops.kl_div(ops.blend(x, y, 0.3), y))
    assert {"forward_kernel", "backward_kernel", "divergence_kernel"} <= set(launched)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
@pytest.mark.parametrize("number", [0, 1, -1, 15, 16, -16, 2**31, -(2**31) - 1, 2**46, -(2**46)])
def test_places_keep_all_bits(number: int) -> None:
    from fedkern.ops._core.triton.numbers import MARK, encode_number

    code = encode_number(number)
    assert code % 2
    assert not -(1 << 31) <= code < 1 << 31
    assert -(1 << 63) <= code < 1 << 63
    assert (code ^ MARK.value) >> 1 == number


@pytest.mark.gpu
@each_gpu_operator
def test_each_operator_gives_the_reference_result_on_a_gpu(gpu: torch.device, operator: Operator) -> None:
    operator_runs.compare(operator, gpu)
    operator_runs.check_same_bits(operator, gpu, large=True)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", [name for name in differential.OPERATORS if not name.startswith("conv")])
def test_random_calls_agree_with_the_reference(gpu: torch.device, operator: str) -> None:
    differential.agree(operator, 100, gpu)


def _skip_waiting(operator: Operator) -> None:
    if operator.name in ("clip_and_noise", "geometric_median"):
        pytest.skip(
            "the reference serves, and the host looks at what it has: at words to refine, at an iteration's step"
        )


@pytest.mark.gpu
@each_gpu_operator
def test_operator_in_a_graph(gpu: torch.device, operator: Operator) -> None:
    _skip_waiting(operator)
    operator_runs.check_graph(operator, gpu, (1,))


@pytest.mark.gpu
@each_gpu_operator
def test_no_operator_waits_for_the_device(gpu: torch.device, operator: Operator) -> None:
    _skip_waiting(operator)
    operator_runs.check_nothing_waits(operator, gpu)


@pytest.mark.gpu
@each_gpu_operator
def test_operator_on_another_device(gpu: torch.device, operator: Operator) -> None:
    operator_runs.check_another_device(operator, gpu)


@pytest.mark.gpu
def test_an_index_out_of_range_is_a_device_assertion(gpu: torch.device) -> None:
    code = (
        "import torch; from fedkern.ops import blend, use_backend\n"
        "x = torch.ones(4, 8, device='cuda')\n"
        "with use_backend('triton'): blend(x, x, index=torch.tensor([0, 1, 2, 4], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode
    assert "index out of range" in found.stderr + found.stdout


# -- triton backend ----------------------------------------------------------------------------------------------------


WITHOUT_TRITON = {"aggregate", "boxes", "contrastive", "optimise"}
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
