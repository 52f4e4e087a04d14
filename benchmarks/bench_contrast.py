"""contrastive against eager torch and torch.compile: forward and backward on leaf inputs.

Eager is the form people write: similarities once, and a cross-entropy of them and of their transpose.  Embeddings are
normalised, D = 128 where nothing else is said, and the temperature is 0.07; CLIP's 0.01 takes two exponentials to a
similarity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import compare, device
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fedkern import ops

# What issue and design promise at 256 and 1,024 pairs; below, no loss.
FLOORS = {"eager": 1.3, "compile": 1.0}
SMALL_FLOORS = {"eager": 1.0, "compile": 1.0}


def eager_contrastive(x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
    similarities = x @ y.T / temperature
    own = torch.arange(len(x), device=x.device)
    return cross_entropy(similarities, own) + cross_entropy(similarities.T, own)


def pair(pairs: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Embeddings of which partners are nearer to each other than to others."""
    x, noise = torch.randn(pairs, size), torch.randn(pairs, size)
    return [normalize(t, dim=1).to(dtype).requires_grad_() for t in (x, x + 2 * noise)]


def train_step(loss: Callable[..., Tensor], leaves: list[Tensor], *others: Any) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, *others).backward()

    return step


def contest(leaves: list[Tensor], *others: Any) -> dict[str, Callable[[], None]]:
    return {
        "fedkern": train_step(ops.contrastive, leaves, *others),
        "eager": train_step(eager_contrastive, leaves, *others),
        "compile": train_step(torch.compile(eager_contrastive, dynamic=False), leaves, *others),
    }


@pytest.mark.parametrize(("threads", "loaded"), [(1, False), (2, False)])
@pytest.mark.parametrize("pairs", [32, 64, 256, 1024])
def test_contrastive(benchmark: Any, pairs: int, threads: int, loaded: bool) -> None:
    compare(
        benchmark,
        "contrast",
        f"B={pairs}",
        contest(pair(pairs, 128), 0.07),
        floors=FLOORS if pairs >= 256 else SMALL_FLOORS,
        threads=threads,
        loaded=loaded,
    )


@pytest.mark.parametrize(("pairs", "size"), [(2048, 128), (4096, 128), (4096, 512)], ids=str)
def test_contrastive_of_large_batches(benchmark: Any, pairs: int, size: int) -> None:
    """More similarities than are held: they are multiplied again for the gradients."""
    case = f"B={pairs}" + (f" D={size}" if size != 128 else "")
    compare(benchmark, "contrast", case, contest(pair(pairs, size), 0.07), floors=FLOORS, threads=1)


@pytest.mark.parametrize("case", ["T=0.01", "learnt", "D=512", "bfloat16", "loss alone"])
def test_contrastive_variants(benchmark: Any, case: str) -> None:
    """CLIP's final and its learnt temperature, longer embeddings, half precision, evaluation."""
    leaves = pair(1024, 512 if case == "D=512" else 128, torch.bfloat16 if case == "bfloat16" else torch.float32)
    others: list[Any] = [0.01 if case == "T=0.01" else 0.07]
    if case == "learnt":
        leaves, others = [*leaves, torch.tensor(0.07, device=device(), requires_grad=True)], []
    if case == "loss alone":
        leaves = [x.detach() for x in leaves]
        runs: dict[str, Callable[[], Any]] = {
            "fedkern": lambda: ops.contrastive(*leaves, 0.07),
            "eager": lambda: eager_contrastive(*leaves, 0.07),
        }
        compiled = torch.compile(eager_contrastive, dynamic=False)
        runs["compile"] = lambda: compiled(*leaves, 0.07)
        compare(benchmark, "contrast", f"B=1024 {case}", runs, threads=1)
        return
    compare(benchmark, "contrast", f"B=1024 {case}", contest(leaves, *others), threads=1)
