"""aggregate: what the short way to the CPU kernels takes, and what it must leave to the general one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.launch import rows
from fedkern.ops._core import backend

pytest.importorskip("fedkern._cpu")


def vectors(count: int = 3, size: int = 70) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size) for _ in range(count)]


def test_ordinary_vectors_are_taken() -> None:
    given = vectors()
    ops.median(given)
    found = rows(given)
    assert found is not None
    assert (found.dtype, found.size, found.pointers) == (torch.float32, 70, [x.data_ptr() for x in given])
    stacked = torch.stack(given)
    found = rows(stacked)
    assert found is not None
    assert found.pointers == [x.data_ptr() for x in stacked]


def test_others_are_left() -> None:
    given = vectors()
    ops.median(given)
    negated = torch.view_as_complex(torch.randn(70, 2)).conj().imag
    assert negated.is_neg()
    others = [negated, given[0][::2], given[0].double(), given[0].clone().requires_grad_(), given[0][None], "no", None]
    for other in others:
        assert rows([*given, other]) is None  # type: ignore[list-item]
    assert rows([]) is None
    with backend.use_backend("reference"):
        assert rows(given) is None


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


def test_results_that_overlap_the_vectors() -> None:
    memory = torch.arange(20.0)
    given = [memory[:10], memory[10:]]
    wanted = (memory[:10] + memory[10:]) / 2
    assert torch.equal(ops.weighted_mean(given, [1.0, 1.0], out=memory[5:15]), wanted)
