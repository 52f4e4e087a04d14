"""Tests of second derivatives beside weights of 0, and of operands that are made of one another."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.every_operator import Operator, each_differentiable
from python_tests.ops.operator_cases import BACKENDS, using

pytestmark = pytest.mark.usefixtures("one_thread")


Loss = Callable[..., Tensor]


def eager(loss: Loss, x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, x)


WAYS: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "eager": eager,
    "forward over reverse": lambda loss, x: torch.func.hessian(loss)(x),
    "reverse over reverse": lambda loss, x: torch.func.jacrev(torch.func.jacrev(loss))(x),
    "forward over forward": lambda loss, x: torch.func.jacfwd(torch.func.jacfwd(loss))(x),
}


def whole(loss: Loss, way: str, *tensors: Tensor) -> Tensor:
    """Return the Hessian with respect to all elements of ``tensors``, ``[N, N]``."""
    shapes, sizes = [x.shape for x in tensors], [x.numel() for x in tensors]

    def of_one(x: Tensor) -> Tensor:
        return loss(*(part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)))

    return WAYS[way](of_one, torch.cat([x.flatten() for x in tensors]).double())


# --- weighted_mean: a weight of 0 has the derivative that the formula has


def mean_squared(vectors: Tensor, weights: Tensor) -> Tensor:
    return ops.weighted_mean(vectors, weights).square().sum()


def mean_of_list(vectors: Tensor, weights: Tensor) -> Tensor:
    return ops.weighted_mean(list(vectors.unbind()), weights).square().sum()


def mean_in_torch(vectors: Tensor, weights: Tensor) -> Tensor:
    return ((weights @ vectors) / weights.sum()).square().sum()


VECTORS = torch.tensor([[0.5, -1.25, 2.0], [3.0, 0.75, -0.5], [-1.5, 1.0, 0.25]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("loss", [mean_squared, mean_of_list])
@pytest.mark.parametrize("content", [None, math.nan, math.inf])
def test_hessian_of_weighted_mean_at_a_weight_of_zero(name: str, loss: Loss, content: float | None) -> None:
    """A vector of weight 0 that is not finite spoils no other derivative than its own."""
    vectors, sound = VECTORS.clone(), torch.ones(12, dtype=torch.bool)
    if content is not None:
        vectors[1, 2] = content
        sound[[3, 4, 5, 10]] = False
    expected = whole(mean_in_torch, "eager", VECTORS, WEIGHTS)[sound][:, sound]
    for way in WAYS if name == "reference" else ["eager", "reverse over reverse"]:
        with using(name):
            given = whole(loss, way, vectors, WEIGHTS)
        torch.testing.assert_close(given[sound][:, sound], expected, msg=lambda m, w=way: w + m)


# --- the distill operators: what has weight 0 counts nothing, and neither its content nor its weight gets a gradient


@dataclass(frozen=True)
class Case:
    """Loss of (weights, weighted tensor, ...) with entries of weight 0.

    Attributes:
        loss: by the operator.
        formula: the same in plain operations.
        weights: with zeros.
        shapes: of the other tensors.
        weighed: how many of these, from the first on, have the weights' axis.
        classes: their class axis.
    """

    loss: Loss
    formula: Loss
    weights: Tensor
    shapes: tuple[tuple[int, ...], ...]
    weighed: int
    classes: int


def kl(p: Tensor, q: Tensor, axis: int = -1) -> Tensor:
    return (p.softmax(axis) * (p.log_softmax(axis) - q.log_softmax(axis))).sum(axis)


def share(weights: Tensor) -> Tensor:
    """Return shares over the teachers, ``[K, B, 1]``."""
    weights = weights.view(3, -1, 1).expand(3, 2, 1) if weights.dim() < 3 else weights
    return weights / weights.sum(0, keepdim=True)


def from_probs(p: Tensor, student: Tensor) -> Tensor:
    p = p / p.sum(-1, keepdim=True)
    return (p * (p.log() - student.log_softmax(-1))).sum()


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def both_entropies(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    w, p = share(weights), x.softmax(-1)
    return entropy((w * p).sum(0)).sum(), (w[..., 0] * entropy(p)).sum()


def consensus(weights: Tensor, x: Tensor) -> Tensor:
    mixture, mean = ops.consensus(x, weights, reduction="sum")
    return mixture.square() + 3 * mean.square()


def consensus_formula(weights: Tensor, x: Tensor) -> Tensor:
    mixture, mean = both_entropies(weights, x)
    return mixture.square() + 3 * mean.square()


def js_formula(weights: Tensor, x: Tensor) -> Tensor:
    mixture, mean = both_entropies(weights, x)
    return (mixture - mean).square()


ROWS = torch.tensor([0.7, 0.0, 2.0], dtype=torch.float64)
TEACHERS = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
PER_ROW = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.5]], dtype=torch.float64)
_STUDENTS, _STACK, _ONE = (3, 4), (3, 2, 4), (2, 4)

CASES = {
    "kl_div": Case(
        lambda w, s, t: ops.kl_div(s, t, weight=w, reduction="sum").square(),
        lambda w, s, t: (w * kl(t, s)).sum().square(),
        ROWS, (_STUDENTS,) * 2, 2, 1,
    ),
    "dual_kl": Case(
        lambda w, a, b, t: ops.dual_kl(a, b, t, weight=w, reduction="sum").square(),
        lambda w, a, b, t: (w * (kl(t, a) + kl(t, b))).sum().square(),
        ROWS, (_STUDENTS,) * 3, 3, 1,
    ),
    **{f"ensemble_kl {name}": Case(
        lambda w, t, s: ops.ensemble_kl(s, t, w, reduction="sum"),
        lambda w, t, s: from_probs((share(w) * t.softmax(-1)).sum(0), s),
        weights, (_STACK, _ONE), 1, 2,
    ) for name, weights in (("probs", TEACHERS), ("rows", PER_ROW))},
    "ensemble_kl logits": Case(
        lambda w, t, s: ops.ensemble_kl(s, t, w, mix="logits", reduction="sum"),
        lambda w, t, s: kl((share(w) * t).sum(0), s).sum(),
        TEACHERS, (_STACK, _ONE), 1, 2,
    ),
    "ensemble_kl mean_of_kl": Case(
        lambda w, t, s: ops.ensemble_kl(s, t, w, mode="mean_of_kl", reduction="sum"),
        lambda w, t, s: (share(w)[..., 0] * kl(t, s[None])).sum(),
        PER_ROW, (_STACK, _ONE), 1, 2,
    ),
    "js_div": Case(lambda w, x: ops.js_div(x, w, reduction="sum").square(), js_formula, TEACHERS, (_STACK,), 1, 2),
    "js_div rows": Case(lambda w, x: ops.js_div(x, w, reduction="sum").square(), js_formula, PER_ROW, (_STACK,), 1, 2),
    "consensus": Case(consensus, consensus_formula, TEACHERS, (_STACK,), 1, 2),
    "consensus rows": Case(consensus, consensus_formula, PER_ROW, (_STACK,), 1, 2),
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("content", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_hessians_beside_weights_of_zero(name: str, content: float) -> None:
    case = CASES[name]
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in case.shapes]
    nothing = [case.weights == 0, *(torch.zeros_like(x, dtype=torch.bool) for x in tensors)]
    for i in range(1, 1 + case.weighed):
        rows = nothing[0].view(*nothing[0].shape, *[1] * (tensors[i - 1].dim() - nothing[0].dim()))
        nothing[i] = rows.expand(tensors[i - 1].shape)
    live = ~torch.cat([x.flatten() for x in nothing])
    expected = whole(case.formula, "eager", case.weights, *tensors)
    spoilt = [torch.where(mask, content * x, x) for mask, x in zip(nothing[1:], tensors, strict=True)]
    for way in WAYS:
        given = whole(case.loss, way, case.weights, *spoilt)
        torch.testing.assert_close(given[live][:, live], expected[live][:, live], msg=lambda m, w=way: w + m)
        assert not given[~live].count_nonzero(), way
        assert not given[:, ~live].count_nonzero(), way


# -- dependent operands ------------------------------------------------------------------------------------------------


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
