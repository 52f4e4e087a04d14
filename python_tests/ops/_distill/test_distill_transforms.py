"""kl_div, dual_kl, entropy under torch.func, vmap, fake tensors and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._distill.reference import kl_div_reference
from python_tests.ops._distill.distill_operators import OPERATORS, each_operator, logits


@each_operator
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_torch_func(operator: str, reduction: str) -> None:
    count, call = OPERATORS[operator]
    inputs = logits(count, 5, 7, 3)
    weight = None if operator == "entropy" else torch.rand(5) + 0.1
    more: dict[str, Any] = {} if weight is None else {"weight": weight}

    def loss(*tensors: Tensor) -> Tensor:
        return (call(tensors, reduction=reduction, **more) * 3).sum()

    gradients = torch.func.grad(loss, argnums=tuple(range(count)))(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss(*leaves).backward()
    for got, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad)

    stacked = [torch.stack([x, x + 1, x * 2, -x]) for x in inputs]
    mapped = torch.vmap(lambda *t: call(t, reduction=reduction, **more))(*stacked)
    for i in range(4):
        torch.testing.assert_close(mapped[i], call([x[i] for x in stacked], reduction=reduction, **more))
    per_sample = torch.vmap(torch.func.grad(loss))(*stacked)
    for i in range(4):
        leaves = [x[i].clone().requires_grad_() for x in stacked]
        loss(*leaves).backward()
        torch.testing.assert_close(per_sample[i], leaves[0].grad)


def test_vmap_over_some_arguments_and_other_axes() -> None:
    student, teacher = logits(2, 6, 7)
    students = torch.stack([student, student * 2, student + 1], dim=1)  # mapped axis in the middle
    weights = torch.rand(3, 6)
    got = torch.vmap(lambda s, w: ops.kl_div(s, teacher, weight=w), in_dims=(1, 0))(students, weights)
    for i in range(3):
        torch.testing.assert_close(got[i], ops.kl_div(students[:, i], teacher, weight=weights[i]))


def test_second_derivatives_under_torch_func() -> None:
    student, teacher = logits(2, 3, 4, dtype=torch.float64)

    def hessian(function: Any) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(function))(student)

    expected = hessian(lambda s: kl_div_reference(s, teacher, 2.0))
    torch.testing.assert_close(hessian(lambda s: ops.kl_div(s, teacher, 2.0)), expected)
    expected = hessian(lambda s: -(s.log_softmax(1).exp() * s.log_softmax(1)).sum() / 3)
    torch.testing.assert_close(hessian(ops.entropy), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction: int) -> None:
    student, other, teacher = (x.requires_grad_() for x in logits(3, 4, 6))
    weight = torch.rand(4, requires_grad=True)
    divergence, entropy = torch.ops.fedkern.divergence.default, torch.ops.fedkern.entropy.default
    torch.library.opcheck(divergence, (student, None, teacher.detach(), None, None, 2.0, False, reduction))
    torch.library.opcheck(divergence, (student, other, teacher, weight, None, 2.0, True, reduction))
    torch.library.opcheck(divergence, (student, other, teacher, weight, torch.tensor(2.0), 1.0, True, reduction))
    torch.library.opcheck(entropy, (student, reduction))
    maps = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(entropy, (maps, reduction))


def test_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        student, teacher = torch.empty(4, 6, 2, dtype=torch.bfloat16), torch.empty(4, 6, 2)
        assert ops.kl_div(student, teacher, reduction="none").shape == (4, 2)
        assert ops.kl_div(student, teacher).dtype is torch.float32
        assert ops.entropy(student).shape == ()


def _both_losses(student: Tensor, other: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    pair = ops.kl_div(student, teacher, 2.0, weight=weight) + ops.entropy(other, reduction="none").mean()
    return pair + 0.5 * ops.dual_kl(student, other, teacher, direction="student", reduction="sum")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compile_without_graph_break_or_recompilation(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_both_losses, fullgraph=True, dynamic=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (8, 16, 33):
            inputs = [x.requires_grad_() for x in logits(3, rows, 10)]
            weight = torch.rand(rows)
            compiled(*inputs, weight).backward()
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            expected = _both_losses(*leaves, weight)
            expected.backward()
            torch.testing.assert_close(compiled(*inputs, weight), expected)
            for got, leaf in zip(inputs, leaves, strict=True):
                torch.testing.assert_close(got.grad, leaf.grad)
