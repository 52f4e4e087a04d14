"""Tests of every public operator through the Triton backend: in the interpreter, and on a GPU.

``python -m pytest -m gpu python_tests/ops/triton`` runs the compiled kernels; ``TRITON_INTERPRET`` must not be set.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fedkern import ops
from fedkern.ops._core import loading
from python_tests.ops.every_operator import Operator, each_gpu_operator
from python_tests.ops.operator_cases import BACKENDS, using
from python_tests.ops.operator_runs import (
    check_another_device,
    check_graph,
    check_nothing_waits,
    compare,
    gradients,
    run,
)


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
        compare(operator, torch.device("cpu"))


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
    compare(operator, gpu)
    inputs = [x.to(gpu) for x in operator.inputs(large=True)]
    for gradient in gradients(operator):
        first_run, second_run = run(operator, inputs, gradient), run(operator, inputs, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first_run, second_run, strict=True))


def _skip_waiting(operator: Operator) -> None:
    if operator.name in ("clip_and_noise", "geometric_median"):
        pytest.skip(
            "the reference serves, and the host looks at what it has: at words to refine, at an iteration's step"
        )


@pytest.mark.gpu
@each_gpu_operator
def test_operator_in_a_graph(gpu: torch.device, operator: Operator) -> None:
    _skip_waiting(operator)
    check_graph(operator, gpu, (1,))


@pytest.mark.gpu
@each_gpu_operator
def test_no_operator_waits_for_the_device(gpu: torch.device, operator: Operator) -> None:
    _skip_waiting(operator)
    check_nothing_waits(operator, gpu)


@pytest.mark.gpu
@each_gpu_operator
def test_operator_on_another_device(gpu: torch.device, operator: Operator) -> None:
    check_another_device(operator, gpu)


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
