"""Tests of the short way to the aggregate CPU kernels: the calls that it takes, and those for the general way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.kernels import AggregateKernels
from fedkern.ops._core import backend

pytest.importorskip("fedkern._cpu")


def vectors(count: int = 3, size: int = 70) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size) for _ in range(count)]


def ready(given: Any, *others: Tensor | None) -> AggregateKernels | None:
    return backend.select_ordinary("aggregate", given, torch.is_grad_enabled(), *others)


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
