"""Operands that are made of one another: gradients and second derivatives against plain formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import ops

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 8, 8, generator=GENERATOR)
MAPS = torch.randn(4, 16, 8, 8, generator=GENERATOR).contiguous(memory_format=torch.channels_last)
ROWS = torch.randn(6, 10, generator=GENERATOR)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def ensemble(s: Tensor, shares: Tensor) -> Tensor:
    p = shares[0] * F.softmax(s * 2, -1) + shares[1] * F.softmax(s.cos(), -1)
    return F.kl_div(s.log_softmax(-1), p.log(), reduction="batchmean", log_target=True)


def weights(s: Tensor) -> Tensor:
    return torch.stack([s.mean().sigmoid(), s.mean().exp()])


def contrast(z: Tensor, other: Tensor) -> Tensor:
    logits, rows = 2 * z @ other.T, torch.arange(len(z))
    return F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)


def normed(w: Tensor) -> Tensor:
    scale = w.mean((1, 2, 3)) + 1
    mean, variance = torch.linspace(-1, 1, 16, dtype=w.dtype), torch.linspace(0.5, 1.5, 16, dtype=w.dtype)
    if w.dtype == torch.float32:
        y = ops.conv_norm(MAPS * w.mean(), w, scale, scale * 0.5, mean, variance, training=False, relu=False)
    else:
        y = F.conv2d(MAPS.to(w.dtype) * w.mean(), w, padding=1)
        y = F.batch_norm(y, mean, variance, scale, scale * 0.5)
    return y.square().mean()


def pooled(w: Tensor) -> Tensor:
    bias = w.mean((1, 2, 3))
    if w.dtype == torch.float32:
        return ops.conv_pool(IMAGES, w, bias, padding=1).square().mean()
    return F.max_pool2d(F.conv2d(IMAGES.to(w.dtype), w, bias, padding=1).relu(), 2).square().mean()


CASES: dict[str, tuple[Loss, Loss, Tensor]] = {
    "kl_div": (lambda s: ops.kl_div(s.tanh(), s + s.sin()), lambda s: kl(s.tanh(), s + s.sin()), ROWS),
    "ensemble_kl": (
        lambda s: ops.ensemble_kl(s, torch.stack([s * 2, s.cos()]), weights(s)),
        lambda s: ensemble(s, weights(s) / weights(s).sum()),
        ROWS,
    ),
    "dual_kl": (lambda s: ops.dual_kl(s, s * 2, s.cos()), lambda s: kl(s, s.cos()) + kl(s * 2, s.cos()), ROWS),
    "contrastive": (lambda z: ops.contrastive(z, z.tanh(), 0.5), lambda z: contrast(z, z.tanh()), ROWS),
    "conv_norm": (normed, normed, torch.randn(16, 16, 3, 3, generator=GENERATOR) * 0.2),
    "conv_pool": (pooled, pooled, torch.randn(16, 3, 3, 3, generator=GENERATOR) * 0.2),
}


def derivatives(loss: Loss, at: Tensor, recorded: bool) -> list[Tensor]:
    """Return the gradient, and recorded also the derivative of its sum of squares."""
    (first,) = torch.autograd.grad(loss(at.requires_grad_()), at, create_graph=recorded)
    return [first.detach(), *(torch.autograd.grad(first.square().sum(), at) if recorded else ())]


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_every_operand_counts_once(forced: str | None, name: str, recorded: bool) -> None:
    served, plain, at = CASES[name]
    with ops.use_backend(forced):
        got = derivatives(served, at.clone(), recorded)
    for value, expected in zip(got, derivatives(plain, at.double(), recorded), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
