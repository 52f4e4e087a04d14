"""Benchmark of contrastive against eager torch and torch.compile: forward and backward on leaf inputs.

Eager is the form people write: similarities once, and a cross-entropy of them and of their transpose.  Embeddings are
normalised, D = 128 where nothing else is said, and the temperature is 0.07.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.harness import compare, contest
from fedkern import ops


def eager_contrastive(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    similarities = x @ y.T / temperature
    partners = torch.arange(len(x), device=x.device)
    return cross_entropy(similarities, partners) + cross_entropy(similarities.T, partners)


def pair(pairs: int, size: int) -> list[Tensor]:
    """Return embeddings of which partners are nearer to each other than to others."""
    x, noise = torch.randn(pairs, size), torch.randn(pairs, size)
    return [normalize(t, dim=1).requires_grad_() for t in (x, x + 2 * noise)]


@pytest.mark.parametrize("pairs", [32, 64, 256, 1024])
def test_contrastive(node: str, pairs: int, threads: int) -> None:
    runs = contest(ops.contrastive, eager_contrastive, pair(pairs, 128), 0.07)
    compare(node, "contrast", f"B={pairs}", runs, threads=threads)


@pytest.mark.parametrize(("pairs", "size"), [(2048, 128), (4096, 128), (4096, 512)], ids=str)
def test_contrastive_of_large_batches(node: str, pairs: int, size: int, threads: int) -> None:
    """Similarities are too many to keep: they are multiplied again for the gradients."""
    case = f"B={pairs}" + (f" D={size}" if size != 128 else "")
    runs = contest(ops.contrastive, eager_contrastive, pair(pairs, size), 0.07)
    compare(node, "contrast", case, runs, threads=threads)
