"""Benchmark of ensemble_kl, js_div and consensus against eager torch and torch.compile: forward and backward.

Eager is the form people write: mix the teachers' softmaxes, then one ``kl_div``; entropies as ``-(p * p.log()).sum()``
with the probabilities kept off zero.  The rows "to teachers" differentiate toward the student and all teachers; js_div
and consensus always differentiate toward all K.  Model bytes: every logit read once, every gradient written once.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from benchmarks.baselines import liger_jsd
from benchmarks.harness import compare, contest
from fedkern import ops

SHAPES = [(20, 64, 10), (20, 256, 10), (20, 64, 100), (20, 256, 100)]
MAPS = (5, 8, 4, 128, 128)
TINY = 1e-30


def share(weights: Tensor, like: Tensor) -> Tensor:
    return (weights / weights.sum()).view(-1, *[1] * (like.dim() - 1))


def eager_probs(student: Tensor, teachers: Tensor, weights: Tensor, temperature: float) -> Tensor:
    mixture = (share(weights, teachers) * softmax(teachers / temperature, 2)).sum(0)
    return kl_div(log_softmax(student / temperature, 1), mixture, reduction="batchmean") * temperature**2


def eager_logits(student: Tensor, teachers: Tensor, weights: Tensor, temperature: float) -> Tensor:
    mixture = softmax((share(weights, teachers) * teachers).sum(0) / temperature, 1)
    return kl_div(log_softmax(student / temperature, 1), mixture, reduction="batchmean") * temperature**2


def eager_mean(student: Tensor, teachers: Tensor, weights: Tensor, temperature: float) -> Tensor:
    p = softmax(teachers / temperature, 2)
    terms = kl_div(log_softmax(student / temperature, 1).expand_as(p), p, reduction="none")
    return (share(weights, teachers) * terms).sum() / student.shape[0] * temperature**2


def eager_consensus(stack: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    log_p = log_softmax(stack, 2)
    p, w = log_p.exp(), share(weights, stack)
    mixture = (w * p).sum(0)
    rows = stack[0].numel() // stack.shape[2]
    return -(mixture * mixture.clamp_min(TINY).log()).sum() / rows, -(w * p * log_p).sum() / rows


def eager_js(stack: Tensor, weights: Tensor) -> Tensor:
    mixture, mean = eager_consensus(stack, weights)
    return mixture - mean


def join(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Return both results of consensus as one loss."""

    def loss(*arguments: Any) -> Tensor:
        mixture, mean = function(*arguments)
        return mixture - 0.5 * mean

    return loss


MIXES: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "probs": (eager_probs, {}),
    "logits": (eager_logits, {"mix": "logits"}),
    "mean_of_kl": (eager_mean, {"mode": "mean_of_kl"}),
}


@pytest.mark.parametrize("to_teachers", [False, True], ids=["to student", "to teachers"])
@pytest.mark.parametrize(
    ("mix", "shape"), [("probs", s) for s in SHAPES] + [(m, SHAPES[-1]) for m in MIXES if m != "probs"]
)
def test_ensemble_kl(node: str, mix: str, shape: tuple[int, int, int], to_teachers: bool, threads: int) -> None:
    student, teachers = torch.randn(shape[1:], requires_grad=True), torch.randn(shape, requires_grad=to_teachers)
    weights = torch.rand(shape[0]) + 0.1
    eager, how = MIXES[mix]
    leaves = [student, teachers] if to_teachers else [student]
    fixed = [weights, 2.0] if to_teachers else [teachers, weights, 2.0]
    compare(
        node,
        "ensemble_kl",
        f"{shape} {mix}" + (" to teachers" if to_teachers else ""),
        contest(lambda *tensors: ops.ensemble_kl(*tensors, **how), eager, leaves, *fixed),
        model_bytes=4 * (2 * student.numel() + (2 if to_teachers else 1) * teachers.numel()),
        copy=True,
        threads=threads,
    )


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("shape", [*SHAPES, MAPS], ids=str)
def test_js_div(node: str, shape: tuple[int, ...], near: bool, threads: int) -> None:
    """Teachers are far apart, or so close that a second pass keeps digits that eager's difference loses."""
    stack = torch.randn(shape)
    if near:
        stack = stack[:1] + 0.01 * stack
    stack.requires_grad_()
    compare(
        node,
        "js_div",
        f"{shape}" + (" nearly equal" if near else ""),
        contest(ops.js_div, eager_js, [stack], torch.rand(shape[0]) + 0.1),
        model_bytes=2 * 4 * stack.numel(),
        copy=True,
        threads=threads,
    )


@pytest.mark.parametrize("shape", [(2, 64, 10), (2, 4096, 100), (2, 256, 32_000)], ids=str)
def test_js_div_of_two(node: str, shape: tuple[int, ...], threads: int) -> None:
    """Liger-Kernel computes the same: two members of equal weight."""
    stack = torch.randn(shape, requires_grad=True)
    compare(
        node,
        "js_div",
        f"{shape}",
        {**contest(ops.js_div, eager_js, [stack], torch.ones(2)), "Liger-Kernel": liger_jsd(stack)},
        model_bytes=2 * 4 * stack.numel(),
        copy=True,
        threads=threads,
        note="Liger-Kernel's gradient goes to one of the two alone",
    )


@pytest.mark.parametrize("shape", [*SHAPES, MAPS], ids=str)
def test_consensus(node: str, shape: tuple[int, ...], threads: int) -> None:
    stack = torch.randn(shape, requires_grad=True)
    compare(
        node,
        "consensus",
        f"{shape}",
        contest(join(ops.consensus), join(eager_consensus), [stack], torch.rand(shape[0]) + 0.1),
        model_bytes=2 * 4 * stack.numel(),
        copy=True,
        threads=threads,
    )
