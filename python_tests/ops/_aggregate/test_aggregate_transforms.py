"""weighted_mean under autograd, torch.compile and torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkern.ops import Accumulator, weighted_mean
from python_tests.ops.operator_cases import BACKENDS, using

pytestmark = pytest.mark.usefixtures("one_thread")


def case() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    vectors = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    return vectors, torch.rand(3, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name: str) -> None:
    vectors, weights = case()
    rows = [row.detach().clone().requires_grad_() for row in vectors]
    with using(name):
        for function, inputs in (
            (weighted_mean, (vectors, weights)),
            (lambda a, b, c, w: weighted_mean([a, b, c], w), (*rows, weights)),
            (lambda a, b, c: weighted_mean([a, b, c], [1, 2, 3]), tuple(rows)),
            (lambda a: weighted_mean([a, rows[1].detach()], [1, 2]), (rows[0],)),
        ):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.exhaustive
def test_opcheck_and_compile() -> None:
    vectors, weights = case()
    torch.library.opcheck(torch.ops.fedkern.weighted_mean.default, (vectors, weights, None))
    torch._dynamo.reset()
    compiled = torch.compile(lambda v, w: weighted_mean([v[0], v[1], v[2]], w), fullgraph=True)
    out = compiled(vectors, weights)
    torch.testing.assert_close(out, weighted_mean(vectors, weights))
    one = torch.autograd.grad(out.pow(2).sum(), (vectors, weights))
    two = torch.autograd.grad(weighted_mean(vectors, weights).pow(2).sum(), (vectors, weights))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (2, 1)])
def test_vmap_and_grad(dims: tuple[int | None, int | None]) -> None:
    full = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1
    given = [t[0] if d is None else t.movedim(0, d) for t, d in zip(full, dims, strict=True)]
    each = [[t[0] if d is None else t[k] for t, d in zip(full, dims, strict=True)] for k in range(4)]

    def plain(vectors: Tensor, weights: Tensor) -> Tensor:
        return weights @ vectors / weights.sum()

    out = torch.func.vmap(weighted_mean, dims)(*given)
    torch.testing.assert_close(out, torch.stack([plain(*one) for one in each]))
    ours = torch.func.vmap(torch.func.grad(lambda v, w: weighted_mean(v, w).pow(3).sum(), argnums=(0, 1)), dims)(*given)
    wanted = [torch.func.grad(lambda v, w: plain(v, w).pow(3).sum(), argnums=(0, 1))(*one) for one in each]
    for k in range(2):
        torch.testing.assert_close(ours[k], torch.stack([w[k] for w in wanted]))


def test_accumulator_refuses_transforms() -> None:
    accumulator = Accumulator(3)

    def add(vector: Tensor) -> Tensor:
        accumulator.add(vector)
        return vector

    with pytest.raises(RuntimeError, match="keeps state"):
        torch.func.vmap(add)(torch.ones(2, 3))
