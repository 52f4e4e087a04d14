"""js_div, consensus: every backend and ISA level against the float64 reference, and their further promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core.backend import select
from fedkern.ops._distill.ensemble_reference import consensus_reference, js_reference
from python_tests.ops._distill.ensemble_cases import COMMON, agreement, compare, logits, make_inputs
from python_tests.ops.operator_cases import BACKENDS, KERNELS, backends, describe, pairwise, using

AXES: dict[str, Any] = {
    **COMMON,
    "operator": ("js_div", "consensus"),
    "weights": (None, "K", "KB", "rows"),
    "needs": ("logits", "weights", "all"),
}
CASES = pairwise(AXES, seed=4)
NEEDS = {"logits": (False, True, False), "weights": (False, False, True), "all": (False, True, True)}


def run(number: int, names: list[str]) -> None:
    case = CASES[number]
    _, stack, weights = make_inputs(case, seed=number)
    needs = NEEDS["logits" if weights is None else case["needs"]]
    compare(case, names, *agreement(case), [None, stack, weights], needs)


@pytest.mark.sampled(37)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{describe(CASES[n])}")
def test_against_float64(number: int) -> None:
    case = CASES[number]
    run(number, backends(number, case["teachers"] * case["rows"] * case["classes"]))


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{describe(CASES[n])}")
def test_every_case_in_tritons_interpreter(number: int) -> None:
    run(number, ["triton"])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("operator", ["js_div", "consensus"])
@pytest.mark.parametrize("near", [None, 1e-2])
def test_rows_longer_than_the_workspace(name: str, operator: str, near: float | None) -> None:
    case = {
        "teachers": 3,
        "classes": 33_001,
        "rows": 1,
        "dtype": torch.float32,
        "reduction": "batchmean",
        "layout": "stacked",
        "near": near,
        "zeros": False,
        "special": None,
        "operator": operator,
        "weights": "KB",
    }
    _, stack, weights = make_inputs(case, seed=1)
    compare(case, [name], *agreement(case), [None, stack, weights], (False, True, True))


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


def test_symmetric_and_between_entropies(backend: str) -> None:
    stack = logits(5, 17, 10)
    weights = torch.rand(5, 17) + 0.1
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = ops.js_div(stack, weights, reduction="none")
    torch.testing.assert_close(ops.js_div(stack[order], weights[order], reduction="none"), loss)
    mixture, mean = ops.consensus(stack, weights, reduction="none")
    torch.testing.assert_close(mixture - mean, loss, rtol=1e-4, atol=2e-6)
    share = (weights / weights.sum(0)).unsqueeze(2)
    p = (share * stack.softmax(2)).sum(0)
    torch.testing.assert_close(mixture, -(p * p.log()).sum(1))
    torch.testing.assert_close(
        mean, (share.squeeze(2) * ops.entropy(stack.flatten(0, 1), reduction="none").view(5, 17)).sum(0)
    )


def test_one_distribution(backend: str) -> None:
    stack = logits(1, 9, 10)
    assert torch.equal(ops.js_div(stack, reduction="none"), torch.zeros(9))
    mixture, mean = ops.consensus(stack, reduction="none")
    torch.testing.assert_close(mixture, ops.entropy(stack[0], reduction="none"))
    torch.testing.assert_close(mean, ops.entropy(stack[0], reduction="none"))


def test_who_has_weight_zero_is_not_looked_at(backend: str) -> None:
    for shape in ((4, 6, 5, 3),) if backend == "triton" else ((4, 6, 40), (4, 40, 5), (4, 6, 5, 3)):
        stack, weights = logits(*shape), torch.rand(4, *shape[1:2]) + 0.1
        weights[2] = 0
        clean = [ops.js_div(stack, weights), *ops.consensus(stack, weights)]
        for bad in (math.nan,) if backend == "triton" else (math.nan, math.inf, -math.inf):
            spoiled = stack.clone()
            spoiled[2] = bad
            spoiled.requires_grad_()
            again = weights.clone().requires_grad_()
            results = [ops.js_div(spoiled, again), *ops.consensus(spoiled, again)]
            for got, expected in zip(results, clean, strict=True):
                torch.testing.assert_close(got.detach(), expected)
            sum(results[1:], results[0]).backward()
            for x in (spoiled, again):
                assert x.grad is not None
                assert x.grad.isfinite().all()
                assert not x.grad[2].any()


# --- gradients


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_gradcheck(backend: str, reduction: str) -> None:
    for shape in ((3, 2, 4), (2, 2, 3, 2)):
        stack = logits(*shape, dtype=torch.float64).requires_grad_()
        weights = (torch.rand(shape[:2], dtype=torch.float64) + 0.2).requires_grad_()
        for function in (ops.js_div, ops.consensus):

            def loss(x: Tensor, w: Tensor, function: Any = function) -> Any:
                return function(x, w, reduction=reduction)

            assert torch.autograd.gradcheck(loss, (stack, weights), fast_mode=backend == "triton")
            if backend in ("reference", *KERNELS[-1:]):  # second derivatives are the reference's on every ISA level
                assert torch.autograd.gradgradcheck(loss, (stack, weights), fast_mode=True)


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
    """Masked classes and teachers of weight 0 that hold NaN; the same bits on one thread and on two."""
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
            threads = torch.get_num_threads()
            try:
                with using(name):
                    kernel = select("consensus", x)
                    assert kernel is not None
                    assert kernel.consensus_kept(x) is not None
                    torch.set_num_threads(1)
                    got = gradient(x)
                    torch.set_num_threads(2)
                    assert torch.equal(gradient(x), got)
            finally:
                torch.set_num_threads(threads)
            with using("reference"):
                expected = gradient(x.detach().double().requires_grad_(), weights.double())
            if absent:
                assert not got[2].any()
                got, expected = (torch.cat([g[:2], g[3:]]) for g in (got, expected))
            torch.testing.assert_close(got.double(), expected, rtol=relative, atol=absolute)


def test_retained_graphs_and_batched_gradients() -> None:
    stack = logits(3, 7, 10).requires_grad_()
    loss = ops.js_div(stack)
    (once,) = torch.autograd.grad(loss, stack, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, stack, retain_graph=True)
    torch.testing.assert_close(twice, 2 * once)
    rows = ops.js_div(stack, reduction="none")
    directions = torch.randn(4, 7)
    (batched,) = torch.autograd.grad(rows, stack, directions, is_grads_batched=True, retain_graph=True)
    for direction, got in zip(directions, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(rows, stack, direction, retain_graph=True)[0])
    mixture, mean = ops.consensus(stack)
    (one,) = torch.autograd.grad(mixture, stack, retain_graph=True)
    (other,) = torch.autograd.grad(mean, stack, retain_graph=True)
    (both,) = torch.autograd.grad(mixture - mean, stack)
    torch.testing.assert_close(both, one - other)


# --- torch.func, torch.compile


def _both(stack: Tensor, weights: Tensor) -> Tensor:
    mixture, mean = ops.consensus(stack, weights)
    return ops.js_div(stack, weights) + 0.5 * mixture - 0.2 * mean


def test_torch_func_and_vmap() -> None:
    stack, weights = logits(3, 6, 5), torch.rand(3, 6) + 0.1
    leaves = [x.clone().requires_grad_() for x in (stack, weights)]
    _both(*leaves).backward()
    for got, leaf in zip(torch.func.grad(_both, argnums=(0, 1))(stack, weights), leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad)
    stacks, many = torch.stack([stack, 2 * stack, -stack], dim=1), torch.rand(3, 3, 6) + 0.1
    mapped = torch.vmap(torch.func.grad(_both), in_dims=(1, 0))(stacks, many)
    for i in range(3):
        torch.testing.assert_close(mapped[i], torch.func.grad(_both)(stacks[:, i], many[i]))
    rows = torch.vmap(lambda x: ops.js_div(x, weights, reduction="none"), in_dims=1)(stacks)
    for i in range(3):
        torch.testing.assert_close(rows[i], ops.js_div(stacks[:, i], weights, reduction="none"))


def test_second_derivatives_under_torch_func() -> None:
    stack = logits(2, 2, 3, dtype=torch.float64)

    def hessian(function: Any) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(function))(stack)

    torch.testing.assert_close(hessian(ops.js_div), hessian(lambda x: js_reference(x, None, 2)))
    torch.testing.assert_close(
        hessian(lambda x: sum(ops.consensus(x))), hessian(lambda x: sum(consensus_reference(x, None, 2)))
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", [0, 2])
def test_opcheck(reduction: int) -> None:
    stack, weights = logits(3, 4, 6).requires_grad_(), (torch.rand(3, 4) + 0.1).requires_grad_()
    for operator in (torch.ops.fedkern.jensen_shannon.default, torch.ops.fedkern.consensus.default):
        torch.library.opcheck(operator, (stack, None, reduction))
        torch.library.opcheck(operator, (stack, weights, reduction))


def test_compile_without_graph_break_or_recompilation() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (8, 16, 33):
            stack, weights = logits(3, rows, 10).requires_grad_(), torch.rand(3, rows) + 0.1
            compiled(stack, weights).backward()
            leaf = stack.detach().clone().requires_grad_()
            _both(leaf, weights).backward()
            torch.testing.assert_close(stack.grad, leaf.grad)


# --- errors


def test_wrong_arguments() -> None:
    good = torch.zeros(3, 4, 5)
    for match, error, arguments in [
        (r"logits must be a tensor of logits, but got list", TypeError, ([[1.0]],)),
        (r"logits must have dtype.*int64", TypeError, (torch.zeros(3, 4, 5, dtype=torch.int64),)),
        (r"logits must have shape \[K, B, C\].*\[4, 5\]", ValueError, (torch.zeros(4, 5),)),
        (r"at least one teacher and class.*\[0, 4, 5\]", ValueError, (torch.zeros(0, 4, 5),)),
        (r"weights must have shape \[3\], \[3, 4\], but has \[4\]", ValueError, (good, torch.ones(4))),
        (r"weights must be a tensor, but got float", TypeError, (good, 1.0)),
        (r"weights must have dtype.*int64", TypeError, (good, torch.ones(3, dtype=torch.int64))),
        (r"weights must be on cpu.*meta", ValueError, (good, torch.ones(3, device="meta"))),
    ]:
        for function in (ops.js_div, ops.consensus):
            with pytest.raises(error, match=match):
                function(*arguments)
    with pytest.raises(ValueError, match=r'reduction must be "none", "sum" or "batchmean", but is \'mean\''):
        ops.js_div(good, reduction="mean")
