"""Tests of operands that are made of one another: derivatives beside forward mode, which records no backward pass."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.every_operator import Operator, each_differentiable

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGIN = torch.linspace(-1, 1, 4, dtype=torch.float64)


def total(results: Sequence[Tensor]) -> Tensor:
    return torch.stack([(r + r.square()).flatten() @ (torch.arange(r.numel()) % 5 + 1).to(r) for r in results]).sum()


def dependent_loss(operator: Operator, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a loss whose operands are made of four numbers and of the second operand."""
    draw = torch.Generator().manual_seed(0)
    fixed = operator.inputs(dtype)
    maps = [torch.randn(x.numel(), 4, generator=draw).to(dtype) / 2 for x in fixed]

    def loss(numbers: Tensor) -> Tensor:
        operands = []
        for place, (x, matrix) in enumerate(zip(fixed, maps, strict=True)):
            change = (matrix @ numbers).sin().view(x.shape)
            operands.append(x * (1 + 0.3 * change) if place in operator.positive else x + change)
        factor = operands[min(1, len(operands) - 1)].mean().exp()
        operands = [x if place == 1 else x * factor for place, x in enumerate(operands)]
        return total(operator.results(*operands))

    return loss


@pytest.mark.parametrize("forced", [None, "reference"])
@each_differentiable
def test_every_operand_counts_once(forced: str | None, operator: Operator) -> None:
    """The second derivatives are differences: torch's own forward mode of a batch norm is wrong twice (2.13)."""
    forward = torch.func.jacfwd(dependent_loss(operator, torch.float64))
    with ops.use_backend("reference"):
        ahead, behind = ([forward(ORIGIN + step) for step in sign * 1e-6 * torch.eye(4)] for sign in (1, -1))
        expected = [forward(ORIGIN), (torch.stack(ahead) - torch.stack(behind)) / 2e-6]
    numbers = ORIGIN.float().requires_grad_()
    loss = dependent_loss(operator, torch.float32)
    with ops.use_backend(forced):
        (usual,) = torch.autograd.grad(loss(numbers), numbers)
        (recorded,) = torch.autograd.grad(loss(numbers), numbers, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(x, numbers, retain_graph=True)[0] for x in recorded])
    for got, wanted in ((usual, expected[0]), (recorded, expected[0]), (hessian, expected[1])):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
