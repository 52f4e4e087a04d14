"""Tests of the aggregate operators' refusals, vectors of every layout, and the short way to the CPU kernels."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.kernels import AggregateKernels
from fedkern.ops._core import backend
from python_tests.ops._aggregate.aggregate_cases import make_vectors, odd_views
from python_tests.ops.operator_cases import DTYPES, needs_core

V = [torch.ones(4), torch.zeros(4), torch.ones(4)]
G = torch.ones(4)

# Those without a gradient.
CALLS: dict[str, Callable[..., Any]] = {
    "trimmed_mean": lambda v: ops.trimmed_mean(v, 1),
    "weighted trimmed_mean": lambda v: ops.trimmed_mean(v, 1, [1.0, 2.0, 3.0, 4.0, 5.0]),
    "median": ops.median,
    "weighted median": lambda v: ops.median(v, torch.arange(1.0, 6.0)),
    "pairwise_distances": ops.pairwise_distances,
    "krum": lambda v: ops.krum(v, 1, 2),
    "geometric_median": lambda v: ops.geometric_median(v, [1.0, 2.0, 3.0, 4.0, 5.0]),
    "clip_by_norm": lambda v: ops.clip_by_norm(v, 1.5),
    "clip_and_noise": lambda v: ops.clip_and_noise(v, 1.5, 0.1, (1 << 64) - 1, (1 << 63) + 5),
    "server_step": lambda v: ops.server_step(v[0] * 0, v, [1.0, 2.0, 3.0, 4.0, 5.0]),
}

WRONG_VECTORS = [
    ([], ValueError, "vectors must hold at least one tensor"),
    (torch.ones(2, 4).int(), TypeError, "vectors must have dtype float32.*but has torch.int32"),
    (torch.ones(2, 4, 1), ValueError, r"vectors must have shape \[.*but has \[2, 4, 1\]"),
    ([*V, torch.ones(5)], ValueError, r"vectors\[3\] must have the shape \[4\] of vectors\[0\], but has \[5\]"),
    ([*V, G.double()], TypeError, r"vectors\[3\] must have the dtype torch.float32 of vectors\[0\]"),
]


@pytest.mark.parametrize("name", [*CALLS, "weighted_mean"])
def test_wrong_vectors(name: str) -> None:
    own = {
        "server_step": lambda v: ops.server_step(G, v, [1.0]),
        "weighted_mean": lambda v: ops.weighted_mean(v, [1.0]),
    }
    for vectors, error, message in WRONG_VECTORS:
        with pytest.raises(error, match=message):
            {**CALLS, **own}[name](vectors)


step = functools.partial(ops.server_step, G, V, [1, 1, 1])
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.trimmed_mean(V, 2), ValueError, "trim must be less than half of the number of vectors, 3, not 2"),
    (lambda: ops.median(V, torch.zeros(3)), ValueError, "weights must have a positive, finite sum, not 0"),
    (lambda: ops.krum(V, 1), ValueError, r"byzantine must be less than \(M - 2\) / 2 with M = 3 vectors, not 1"),
    (lambda: ops.krum(V, 0, 4), ValueError, "keep must be between 1 and 3, not 4"),
    (lambda: ops.geometric_median(V, tolerance=-1.0), ValueError, "tolerance must be at least 0, not -1"),
    (lambda: ops.geometric_median(V, smoothing=0.0), ValueError, "smoothing must be greater than 0, not 0"),
    (lambda: ops.geometric_median(V, [0, 0, 0]), ValueError, "weights must have a positive, finite sum, not 0"),
    (lambda: ops.clip_by_norm(V, 0.0), ValueError, "max_norm must be greater than 0, not 0"),
    (lambda: ops.clip_by_norm(V, math.inf), ValueError, "max_norm must be greater than 0, not inf"),
    (lambda: ops.clip_and_noise(V, 1.0, -1.0, 0), ValueError, "noise must be at least 0, not -1"),
    (lambda: ops.clip_and_noise(V, 1.0, 1.0, 0, 1 << 64), ValueError, "offset must be between 0 and"),
    (lambda: step("sgd"), ValueError, "rule must be one of mean, momentum, adam.*not 'sgd'"),
    (lambda: ops.server_step(torch.ones(5), V, [1, 1, 1]), ValueError, r"global_ must have shape \[4\], but has \[5\]"),
    (
        lambda: ops.server_step(G.double(), V, [1, 1, 1]),
        ValueError,
        "global_ must have the dtype torch.float32 of the vectors, but has torch.float64",
    ),
    (lambda: step("adam"), ValueError, 'first must be given for rule "adam"'),
    (lambda: step("yogi", first=G), ValueError, 'second must be given for rule "yogi"'),
    (lambda: step(first=G), ValueError, 'first must be None for rule "mean"'),
    (lambda: step("momentum", first=G, second=G), ValueError, 'second must be None for rule "momentum"'),
    (
        lambda: step("adam", first=G, second=G.double()),
        TypeError,
        "second must have the dtype torch.float32 of first, but has torch.float64",
    ),
    (
        lambda: step("momentum", first=G.half()),
        TypeError,
        "first must have dtype float32 or float64, but has torch.float16",
    ),
    (lambda: step("momentum", first=torch.ones(8)[::2]), ValueError, "first must be contiguous"),
    (lambda: step("momentum", first=G, beta1=1.5), ValueError, "beta1 must be at least 0 and at most 1, not 1.5"),
    (lambda: step(learning_rate=-1.0), ValueError, "learning_rate must be at least 0, not -1"),
    (lambda: step(out=torch.ones(5)), ValueError, r"out must have shape \[4\], but has \[5\]"),
    (lambda: step(out=torch.ones(1).expand(4)), ValueError, "out must not be expanded"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def five() -> Tensor:
    return torch.randn(5, 33, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_refused(name: str) -> None:
    vectors = five().requires_grad_()
    for given in (vectors, list(vectors.detach().unbind())):
        if isinstance(given, list):
            given[3].requires_grad_()
        with pytest.raises(ValueError, match="has no gradient; call it under"):
            CALLS[name](given)
        with torch.no_grad():
            CALLS[name](given)


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_where_vectors_lie(backend: str, dtype: torch.dtype) -> None:
    vectors = make_vectors(5, 143, dtype)
    weighted = {"weighted_mean": lambda v: ops.weighted_mean(v, [1.0, 2.0, 3.0, 4.0, 5.0])}
    for name, call in {**weighted, **CALLS}.items():
        if name == "server_step" and backend in ("reference", "triton"):  # Triton leaves it to the reference
            continue  # torch adds up the norms of columns in another order
        expected = torch.cat([x.flatten() for x in leaves(call(vectors))])
        for views in (*odd_views(vectors), torch.stack(vectors, 1).t()):
            assert torch.equal(torch.cat([x.flatten() for x in leaves(call(views))]), expected), name


def test_accumulator_refuses_transforms() -> None:
    accumulator = ops.Accumulator(3)

    def add(vector: Tensor) -> Tensor:
        accumulator.add(vector)
        return vector

    with pytest.raises(RuntimeError, match="keeps state"):
        torch.func.vmap(add)(torch.ones(2, 3))


# -- aggregate rows ----------------------------------------------------------------------------------------------------


def vectors(count: int = 3, size: int = 70) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size) for _ in range(count)]


def ready(given: Any, *others: Tensor | None) -> AggregateKernels | None:
    return backend.select_ordinary("aggregate", given, torch.is_grad_enabled(), *others)


@needs_core
def test_ordinary_vectors_are_taken() -> None:
    given = vectors()
    expected = ops.median(given)
    stacked = torch.stack(given)
    wide = torch.cat([stacked, stacked], 1)[:, :70]
    for taken in (given, tuple(given), stacked, wide):
        kernel = ready(taken)
        assert isinstance(kernel, AggregateKernels)
        assert torch.equal(kernel.sorted_mean(taken, 1, 2, None), expected)
    assert ready(given, None, given[0], given[0].double()) is not None
    parameter = torch.nn.Parameter(given[0])
    assert ready([*given, parameter]) is None
    with torch.no_grad():
        assert ready([*given, parameter], parameter) is not None


@needs_core
def test_others_are_left() -> None:
    given = vectors()
    ops.median(given)
    negated = torch.view_as_complex(torch.randn(70, 2)).conj().imag
    assert negated.is_neg()
    misfits = [negated, given[0][::2], given[0].double(), given[0].clone().requires_grad_(), given[0][None], "no", None]
    for misfit in misfits:
        assert ready([*given, misfit]) is None
    for misfit in [negated, given[0][::2], given[0][1:], given[0].clone().requires_grad_(), given[0][None], "no"]:
        assert ready(given, misfit) is None  # type: ignore[arg-type]
    for misfit in ([], torch.empty(0, 70), torch.stack(given).t(), torch.stack(given)[None], given[0], iter(given)):
        assert ready(misfit) is None
    with backend.use_backend("reference"):
        assert ready(given) is None


def test_batched_gradients_are_left() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return ops.weighted_mean([grads[0], grads[0]], [1.0, 1.0])

    x = torch.randn(3, requires_grad=True)
    eye = torch.eye(3)
    assert torch.equal(torch.autograd.grad(Twice.apply(x), x, eye, is_grads_batched=True)[0], eye)


@needs_core
def test_what_a_kernel_may_write_to() -> None:
    writable = backend.cpu_core().writable
    memory, spare = torch.zeros(40), torch.zeros(20)
    x, y, between = memory[:10], memory[10:20], memory[5:15]
    assert writable((spare[:10],), [x, y], ())
    assert writable((x,), (), [x, y])
    assert not writable((x,), [x], ())
    assert not writable((between,), (), [x, y])
    assert not writable((memory.view(torch.float64)[:10],), (), [memory[:10]])  # one begin, two dtypes
    assert not writable((memory[:20:2],), (), [spare[:10]])
    assert not writable((memory[20:30],), memory.view(20, 2).t()[:, 5:15], ())
    assert writable((memory[30:],), memory.view(20, 2).t()[:, 5:15], ())
    # States of an optimiser: apart from one another and from all else; only the last may replace the global model.
    assert writable((x, y, spare[:10]), [memory[20:30]], [spare[:10]])
    assert not writable((x, y, None), [memory[20:30]], [x])
    assert not writable((x, None, x), [memory[20:30]], [spare[:10]])
    assert not writable((x, spare[10:], None), [y, between], [spare[:10]])
    assert writable((memory[:0],), (), [memory[:0]])


@needs_core
def test_vectors_that_change_during_a_call() -> None:
    """Another thread may change the list, so kernels check it again."""
    core, target = backend.cpu_core(), torch.zeros(70)
    for wrong in ([torch.zeros(70), torch.zeros(69)], [torch.zeros(70), torch.zeros(70).double()], [], torch.zeros(70)):
        with pytest.raises((TypeError, ValueError), match="vector"):
            core.weighted_mean(wrong, [1.0] * 2, target, None, 1)
    with pytest.raises(ValueError, match="differ in number"):
        core.weighted_mean(vectors(), [1.0] * 2, target, None, 1)
    with pytest.raises(TypeError, match="the vectors' size"):
        core.weighted_mean(vectors(), [1.0] * 3, target[1:], None, 1)
    with pytest.raises(TypeError, match="take tensors"):
        core.weighted_mean([*vectors(2), None], [1.0] * 3, target, None, 1)
