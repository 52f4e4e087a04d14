"""Tests of every public operator through the CUDA backend: against the reference, and on a GPU alone.

Memory errors and races that no comparison shows:
``compute-sanitizer --tool memcheck python -m pytest -m gpu python_tests/ops/cuda``, likewise with ``--tool racecheck``,
``synccheck`` and ``initcheck``.
"""

import pytest
import torch

from fedkern import ops
from python_tests.ops import differential, operator_runs
from python_tests.ops.every_operator import Operator, each_gpu_operator


@each_gpu_operator
def test_each_operator_gives_the_reference_result(device: torch.device, operator: Operator) -> None:
    operator_runs.compare(operator, device)


# Of clipping, the emulated core's caller sees a CPU's tensors, and looks at them.
@pytest.mark.parametrize("operator", [name for name in differential.OPERATORS if name[:4] not in ("conv", "clip")])
def test_random_calls_agree_with_the_reference(device: torch.device, operator: str) -> None:
    differential.agree(operator, 100, device)


@each_gpu_operator
def test_same_bits_again(device: torch.device, operator: Operator) -> None:
    operator_runs.check_same_bits(operator, device, large=device.type == "cuda")


@pytest.mark.gpu
@each_gpu_operator
def test_operator_in_a_graph(gpu: torch.device, operator: Operator) -> None:
    operator_runs.check_graph(operator, gpu, (1, 2))


@pytest.mark.gpu
@each_gpu_operator
def test_no_operator_waits_for_the_device(gpu: torch.device, operator: Operator) -> None:
    operator_runs.check_nothing_waits(operator, gpu)


@pytest.mark.gpu
@each_gpu_operator
def test_operator_runs_on_the_current_stream(gpu: torch.device, operator: Operator) -> None:
    """The inputs arrive late on that stream: a kernel on another stream would read zeros."""
    late = [x.to(gpu) for x in operator.inputs(large=True)]
    for gradient in operator_runs.gradients(operator):
        expected = operator_runs.run(operator, late, gradient)
        inputs = [torch.zeros_like(x) for x in late]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for to, x in zip(inputs, late, strict=True):
                to.copy_(x)
            got = operator_runs.run(operator, inputs, gradient)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@each_gpu_operator
def test_operator_on_another_device(gpu: torch.device, operator: Operator) -> None:
    operator_runs.check_another_device(operator, gpu)


HUGE = 2**31 + 8


@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_32_bits_count(gpu: torch.device) -> None:
    """Inputs are constant with stride 0 where possible, else bf16: some 20 GB."""
    value = torch.tensor([1.5], dtype=torch.bfloat16, device=gpu)
    wide = value.expand(HUGE)
    mean = ops.weighted_mean([wide, 2 * value.expand(1).expand(HUGE)], [1.0, 1.0])
    assert mean[-1].item() == mean[0].item() == 2.25
    del mean
    vectors = torch.ones(2, HUGE, dtype=torch.bfloat16, device=gpu)
    vectors[1, -1] = 3
    assert ops.median(vectors)[-1].item() == 2
    assert ops.pairwise_distances(vectors)[0, 1].item() == 2
    noisy = ops.clip_and_noise(vectors, 1e9, 1e-12, seed=1)  # deviations of 1e-3
    assert noisy.shape == vectors.shape
    assert noisy[1, -1].item() == pytest.approx(3, abs=0.1)
    del noisy, vectors
    rows, classes = 2**20, 2**11 + 1
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=gpu)
    logits[-1, -1] = 4
    loss = ops.kl_div(logits, value.expand(rows, classes), reduction="none")
    assert loss[0].item() == 0
    assert loss[-1].item() > 0
    del loss
    assert ops.entropy(logits, reduction="none")[0].item() == pytest.approx(
        torch.tensor(float(classes)).log(), rel=1e-2
    )
    maps = logits.view(rows, 1, classes)
    joined = ops.fuse_concat([maps, maps[:, :, :1].expand(-1, -1, classes)])
    assert joined[-1, 0, -1].item() == 4
    del joined
    index = torch.arange(rows, device=gpu).flip(0)
    blended = ops.blend(logits, logits, 0.5, index=index)
    assert blended[0, -1].item() == blended[-1, -1].item() == 2
