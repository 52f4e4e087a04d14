"""Where no kernel serves, torch.compile meets the plain reference inside the operator, gradients included."""

from __future__ import annotations

import pytest
import torch

from fedkern import ops
from python_tests.ops.every_operator import OPERATORS, Operator


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.gradient and not o.changed], ids=lambda o: o.name)
def test_gradients_of_the_reference_under_compile(operator: Operator) -> None:
    inputs = [x.requires_grad_() for x in operator.inputs()]

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.stack([result.square().sum() for result in operator.results(*tensors)]).sum()

    torch._dynamo.reset()
    with ops.use_backend("reference"):
        expected = torch.autograd.grad(total(*inputs), inputs)
        compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
