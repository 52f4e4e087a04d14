"""Cases of classes masked with a large finite number, as in language models, for every distill operator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.operator_cases import assert_close, using

EVERYBODY = torch.tensor([[True] * 3 + [False], [True] * 4, [False] + [True] * 3])


def _wide(mask: Tensor, classes: int) -> Tensor:
    """Repeat a mask of four classes cyclically for more classes."""
    return mask[:, torch.arange(classes) % 4]


def _stack(*rows: Tensor) -> Tensor:
    return torch.stack(rows)


def _log_probs(*rows: Tensor) -> Tensor:
    """Return logarithms of probabilities, never in 16 bits, which would round them."""
    stack = torch.stack(rows)
    return stack.to(torch.promote_types(stack.dtype, torch.float32)).log_softmax(2)


# Each takes a row without masked classes, a masked one, one with both, and a temperature.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kl_div": lambda s, t, b, T: ops.kl_div(s, t, T),
    "kl_div, both masked": lambda s, t, b, T: ops.kl_div(b, t, T, reduction="sum"),
    "kl_div, weight": lambda s, t, b, T: ops.kl_div(s, t, T, weight=torch.arange(1, len(s) + 1, device=s.device) / 2),
    "dual_kl": lambda s, t, b, T: ops.dual_kl(s, b, t, T),
    "dual_kl of the student": lambda s, t, b, T: ops.dual_kl(t, b, s, T, direction="student"),
    "probabilities": lambda s, t, b, T: ops.ensemble_kl(s, _stack(t, b, t), None, T),
    "probabilities of which some are masked": lambda s, t, b, T: ops.ensemble_kl(
        s, _stack(s.detach().flip(0), b, t), None, T
    ),
    "probabilities, class mask": lambda s, t, b, T: ops.ensemble_kl(
        s, _stack(s.detach().flip(0), b, t), None, T, class_mask=_wide(EVERYBODY, s.shape[1]).to(s.device)
    ),
    "log-probabilities": lambda s, t, b, T: ops.ensemble_kl(s, _log_probs(t, b), None, T, log_probs=True),
    "logits": lambda s, t, b, T: ops.ensemble_kl(s, _stack(t, b, t), None, T, mix="logits"),
    "mean of divergences": lambda s, t, b, T: ops.ensemble_kl(
        s, _stack(t, b, s.detach().flip(0)), None, T, mode="mean_of_kl"
    ),
    "mean, log-probabilities": lambda s, t, b, T: ops.ensemble_kl(
        s, _log_probs(t, b), None, T, mode="mean_of_kl", log_probs=True
    ),
    "js_div": lambda s, t, b, T: ops.js_div(_stack(t, s, b)),
    "js_div, weights": lambda s, t, b, T: ops.js_div(_stack(t, b), torch.tensor([1.0, 3.0], device=s.device)),
    "consensus": lambda s, t, b, T: torch.stack(ops.consensus(_stack(t, s, b))).sum(),
    "entropy": lambda s, t, b, T: ops.entropy(t),
}


def compare(call: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compare losses and gradients of finite masks on the backend in use with ``-inf`` in the float64 reference."""
    for shape in ((5, 5), (5, 40), (5, 9, 2)):
        generator = torch.Generator().manual_seed(shape[1])
        rows = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
        rows[2] = (rows[1] + 0.1 * rows[2]).to(dtype)  # near the row before
        for number in (torch.finfo(dtype).min, -1e30, -1e9, -2e4):
            if number < torch.finfo(dtype).min:
                continue
            results = _differentiate(call, [x.to(device) for x in rows], number)
            with using("reference"):
                expected = _differentiate(call, [x.double() for x in rows], -math.inf)
            for got, exact in zip(results, expected, strict=True):
                assert_close(f"{call} of {shape} masked with {number:g}", got.cpu(), exact)


def _differentiate(call: str, rows: list[Tensor], mask: float) -> list[Tensor]:
    """Return the losses at some temperatures, each with its gradients."""
    results = []
    inputs = [x.clone() for x in rows]
    for x in inputs[1:]:
        x[:, x.shape[1] // 2 :] = mask
    for x in inputs:
        x.requires_grad_()
    for temperature in (1.0, 0.7, 20.0):
        loss = CALLS[call](*inputs, temperature)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        results += [loss, *(x for x in gradients if x is not None)]
    return results
