"""Tests of operators under torch.compile with numbers that change from call to call: few graphs, and eager's values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fedkern import ops

CALLS = 6


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def adamw(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: Any) -> tuple[Tensor, ...]:
    found = ops.adamw_step(theta, g, m, v, step, lr=lr)
    return theta, m, v, *found


def sgd(theta: Tensor, g: Tensor, m: Tensor, lr: Any, decay: float, norm: float) -> tuple[Tensor, ...]:
    found = ops.sgd_step(theta, g, m, lr=lr, momentum=0.9, weight_decay=decay, max_norm=norm, zero=True)
    return theta, g, m, *found


def cohort(theta: Tensor, g: Tensor, *lr: float) -> tuple[Tensor, ...]:
    return ops.sgd_step(theta, g, lr=list(lr)).squared_norm, theta


def blend(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, ...]:
    return (ops.blend(x, y, alpha),)


def boxes(x: Tensor, y: Tensor, dtype: torch.dtype, *fill: Any) -> tuple[Tensor, ...]:
    corners = torch.cat([torch.zeros(2, 3, 2), 4 * y.to(torch.float32)], 2)
    values = list(fill) if len(fill) > 1 else fill[0]
    return ops.erase_boxes(x.to(dtype), corners, values), ops.keep_boxes(x.to(dtype), [*corners], values)


def divergence(x: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return ops.kl_div(x, y, temperature), ops.dual_kl(x, y, y, temperature, reduction="none")


def ensemble(x: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return (ops.ensemble_kl(x, y, torch.tensor([0.2, 0.8]), temperature),)


def contrastive(x: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return (ops.contrastive(x, y, temperature),)


def clip(x: Tensor, norm: float, noise: float, seed: int) -> tuple[Tensor, ...]:
    return ops.clip_by_norm(x, norm), ops.clip_and_noise(x, norm, noise, seed, 3 * seed)


def server(g: Tensor, x: Tensor, m: Tensor, lr: float, beta: float) -> tuple[Tensor, ...]:
    return *ops.server_step(g, x, [1.0] * 8, "momentum", first=m, learning_rate=lr, beta1=beta), m


def mean(x: Tensor, *weights: float) -> tuple[Tensor, ...]:
    return ops.weighted_mean(x, list(weights)), ops.median(x, list(weights)), ops.geometric_median(x, list(weights))


def weights(t: int) -> list[float]:
    return [float(t * (i + 3) % 11 + 1) for i in range(8)]


SCHEDULES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], Callable[[int], tuple[Any, ...]]]] = {
    "adamw, step": (adamw, [(64,)] * 4, lambda t: (t, 1e-3)),
    "adamw, step and learning rate": (adamw, [(64,)] * 4, lambda t: (t, 1e-3 / t)),
    "adamw, tensor": (adamw, [(64,)] * 4, lambda t: (t, torch.tensor(1e-3 / t))),
    "adamw of two rows, tensor": (adamw, [(2, 9)] * 4, lambda t: (t, torch.tensor([1e-3 / t, 0.1]))),
    "sgd": (sgd, [(64,)] * 3, lambda t: (0.1 / t, 0.01 * t, 1.0 + t)),
    "sgd of two rows, tensor": (sgd, [(2, 9)] * 3, lambda t: (torch.tensor(0.1 / t), 0.0, 2.5)),
    "sgd, a rate for each row": (cohort, [(2, 9)] * 2, lambda t: (0.1 / t, 0.2 / t)),
    "blend": (blend, [(8, 3), (8, 3)], lambda t: (t / 13,)),
    "fill of boxes, bf16": (boxes, [(2, 3, 8, 8), (2, 3, 2)], lambda t: (torch.bfloat16, t / 13)),
    "fill of boxes, channels": (boxes, [(2, 3, 8, 8), (2, 3, 2)], lambda t: (torch.float32, t / 13, 0.5, -t)),
    "divergences": (divergence, [(8, 5), (8, 5)], lambda t: (1.0 + t / 4,)),
    "ensemble": (ensemble, [(8, 5), (2, 8, 5)], lambda t: (1.0 + t / 4,)),
    "contrastive": (contrastive, [(8, 5), (8, 5)], lambda t: (0.05 * t,)),
    "clipping": (clip, [(8, 10)], lambda t: (1.0 / t, 0.5 * t, t)),
    "server_step": (server, [(10,), (8, 10), (10,)], lambda t: (1.0 / t, 0.9 - t / 20)),
    "weights of a round": (mean, [(8, 10)], lambda t: tuple(weights(t))),
}


DIFFERENTIABLE = ("blend", "contrastive", "divergences", "ensemble")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_compiles_nothing_anew(name: str) -> None:
    compare(name, "aot_eager")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_under_inductor(name: str) -> None:
    compare(name, "inductor")


def compare(name: str, backend: str) -> None:
    function, shapes, numbers = SCHEDULES[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for t in range(1, CALLS):
        eager, traced = ([x.abs() for x in tensors(*shapes)] for _ in range(2))
        for x in (eager[0], traced[0]):
            x.requires_grad_(name in DIFFERENTIABLE)
        results = compiled(*traced, *numbers(t))
        expected = function(*eager, *numbers(t))
        for result, wanted in zip((*results, *traced), (*expected, *eager), strict=True):
            assert torch.equal(result, wanted)
        if results[0].requires_grad:
            results[0].sum().backward()
            expected[0].sum().backward()
            torch.testing.assert_close(traced[0].grad, eager[0].grad, rtol=1e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()


def test_gradients_are_zeroed_within_the_operator() -> None:
    """A compiler may share the memory of ``gradients`` and a clone unless the schema says that they change."""
    schemas = [torch.ops.fedkern.optimiser_step, torch.ops.fedkern.optimiser_step_and_zero]
    written = [operator.default._schema.arguments[1].is_write for operator in schemas]
    assert written == [False, True]
    gradients, total = torch.ones(4), torch.ones(4)

    def step(theta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        total = g.clone()
        ops.sgd_step(theta, g, lr=0.5, gradient_sum=total, zero=True)
        return total, g

    torch._dynamo.reset()
    total, after = torch.compile(step, backend="aot_eager", fullgraph=True)(torch.ones(4), gradients)
    assert torch.equal(total, torch.full((4,), 2.0))
    assert not after.any()
    assert not gradients.any()
    torch._dynamo.reset()


def test_the_gradient_of_a_compiled_function() -> None:
    """Since torch.compile of torch.func.grad refuses custom operators, docs/ops.md names this way."""
    x, y = tensors((4, 5), (4, 5))

    def loss(x: Tensor) -> Tensor:
        return ops.kl_div(x, y, 2.0)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"fake tensor call|functorch"):
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(x)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(x))
    torch._dynamo.reset()
