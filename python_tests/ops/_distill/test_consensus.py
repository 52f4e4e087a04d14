"""Tests of js_div and consensus: every backend and ISA level against the float64 reference, and their guarantees."""

import math

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core.backend import select
from fedkern.ops._distill.ensemble_reference import js_reference
from fedkern.ops._distill.kernels import CONSENSUS
from python_tests.ops._distill.ensemble_cases import AGREEMENTS, logits, run_agreement
from python_tests.ops.operator_cases import BACKENDS, KERNELS, backends, describe, using


@pytest.mark.sampled(37)
@pytest.mark.parametrize("number", range(len(AGREEMENTS)), ids=lambda n: f"{n}-{describe(AGREEMENTS[n])}")
def test_against_float64(number: int) -> None:
    case = AGREEMENTS[number]
    run_agreement(number, backends(number, case["teachers"] * case["rows"] * case["classes"]))


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
@pytest.mark.parametrize("number", range(len(AGREEMENTS)), ids=lambda n: f"{n}-{describe(AGREEMENTS[n])}")
def test_every_case_in_tritons_interpreter(number: int) -> None:
    run_agreement(number, ["triton"])


# --- what the divergence is


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
@pytest.mark.parametrize("classes", [3, 10, 100, 1000])
def test_nearly_equal_distributions_keep_their_digits(backend: str, classes: int, scale: float) -> None:
    stack = logits(33, classes) + scale * logits(4, 33, classes, seed=1)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5])
    loss = ops.js_div(stack, weights, reduction="none")
    expected = js_reference(stack.double(), weights.double()[:, None].expand(4, 33), 0)
    limit = 1e-1 if backend == "reference" else 3e-5
    assert ((loss - expected).abs() / expected).max() < limit
    assert (loss >= 0).all()


def test_equal_distributions_do_not_diverge(backend: str) -> None:
    for shape in ((7, 101),) if backend == "triton" else ((33, 101), (40, 10)):
        stack = logits(*shape).expand(5, *shape).clone().requires_grad_()
        for weights in (None, torch.rand(5) + 0.1):
            loss = ops.js_div(stack, weights, reduction="none")
            assert loss.abs().max() <= (1e-10 if backend == "reference" else 0)
            (gradient,) = torch.autograd.grad(loss.sum(), stack)
            assert gradient.abs().max() < 1e-6


def test_never_above_log_k(backend: str) -> None:
    for count in (2, 3, 5, 20):
        for classes in (count, 129):
            stack = torch.zeros(count, 7, classes)
            stack[torch.arange(count), :, torch.arange(count)] = 200.0
            loss = ops.js_div(stack, reduction="none")
            assert (loss <= math.log(count)).all()
            torch.testing.assert_close(loss, torch.full((7,), math.log(count)))


# --- gradients


KEPT = [  # shape, and whether samples come before teachers in memory
    ((20, 33, 100), False),
    ((20, 33, 100), True),
    ((20, 33, 10), False),  # a row per lane
    ((12, 40, 30), False),
    ((9, 5, 40, 3, 7), False),
    ((40, 3, 700), False),  # longer than the workspace
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_from_what_consensus_kept(name: str, dtype: torch.dtype) -> None:
    """Classes are masked, and teachers of weight 0 hold NaN.

    The bits are the same on one thread and on two.
    """
    relative, absolute = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 2e-6)}.get(dtype, (1e-2, 1e-3))
    for number, (shape, samples_first) in enumerate(KEPT):
        for reduction in ("none", "batchmean"):
            x = 1.5 * logits(*shape, seed=number, dtype=dtype)
            weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(number)) + 0.1
            x[1, 0, 2] = -math.inf
            absent = (number + (reduction == "none")) % 2 == 0
            if absent:
                weights[2], x[2] = 0, math.nan
            if samples_first:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)

            def gradient(x: Tensor, w: Tensor = weights, how: str = reduction) -> Tensor:
                mixture, mean = ops.consensus(x, w, reduction=how)
                loss = (0.7 * mixture - 0.3 * mean).sum()
                (once,) = torch.autograd.grad(loss, x, retain_graph=True)
                assert torch.equal(once, torch.autograd.grad(loss, x)[0])
                return once

            x.requires_grad_()
            with using(name):
                kernel = select("consensus", x)
                assert kernel.stack_statistics(x, CONSENSUS) is not None
                torch.set_num_threads(1)
                got = gradient(x)
                torch.set_num_threads(2)
                assert torch.equal(gradient(x), got)
            with using("reference"):
                expected = gradient(x.detach().double().requires_grad_(), weights.double())
            if absent:
                assert not got[2].any()
                got, expected = (torch.cat([g[:2], g[3:]]) for g in (got, expected))
            torch.testing.assert_close(got.double(), expected, rtol=relative, atol=absolute)


# --- errors


def test_wrong_arguments() -> None:
    good = torch.zeros(3, 4, 5)
    for match, error, arguments in [
        (r"logits must have shape \[K, B, C\].*\[4, 5\]", ValueError, (torch.zeros(4, 5),)),
        (r"at least one teacher and class.*\[0, 4, 5\]", ValueError, (torch.zeros(0, 4, 5),)),
        (r"weights must have shape \[3\], \[3, 4\], but has \[4\]", ValueError, (good, torch.ones(4))),
        (r"weights must be on cpu.*meta", ValueError, (good, torch.ones(3, device="meta"))),
    ]:
        for function in (ops.js_div, ops.consensus):
            with pytest.raises(error, match=match):
                function(*arguments)
