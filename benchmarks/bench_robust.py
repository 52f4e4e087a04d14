"""Benchmark of robust and private means against eager torch and torch.compile.

Model bytes: every vector read once, the result written once; for clipping every vector read twice (the norm comes
first) and written once.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops


def make(count: int, size: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, size)


def eager_median(vectors: Tensor) -> Tensor:
    """Compute torch.median, which takes the lower one of two middle values."""
    return vectors.median(0).values


def eager_trimmed(vectors: Tensor, trim: int) -> Tensor:
    return vectors.sort(0).values[trim : len(vectors) - trim].mean(0)


@pytest.mark.parametrize(("count", "size"), [(10, 1_000_000), (50, 1_000_000), (10, 10_000), (100, 100_000)])
def test_median(node: str, count: int, size: int, threads: int) -> None:
    vectors = make(count, size)
    rows = list(vectors)
    compiled = torch.compile(eager_median, dynamic=False)
    runs = {
        "fedkern": lambda: ops.median(rows),
        "torch": lambda: eager_median(vectors),
        "compile": lambda: compiled(vectors),
    }
    case, bytes_ = f"M={count} P={size:,}", (count + 1) * size * 4
    compare(node, "median", case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15)


@pytest.mark.parametrize(("count", "size"), [(10, 1_000_000), (50, 1_000_000), (10, 10_000)])
def test_trimmed_mean(node: str, count: int, size: int, threads: int) -> None:
    vectors, trim = make(count, size), count // 5
    rows = list(vectors)
    compiled = torch.compile(eager_trimmed)
    runs = {
        "fedkern": lambda: ops.trimmed_mean(rows, trim),
        "torch": lambda: eager_trimmed(vectors, trim),
        "compile": lambda: compiled(vectors, trim),
    }
    case, bytes_ = f"M={count} P={size:,} trim={trim}", (count + 1) * size * 4
    compare(node, "trimmed_mean", case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15)


def squared_distances(vectors: Tensor) -> Tensor:
    """Return squared distances from the Gram matrix: one product, whose rounding loses small differences."""
    products = vectors @ vectors.T
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp_min(0)


def gram_distances(vectors: Tensor) -> Tensor:
    return squared_distances(vectors).sqrt()


@pytest.mark.parametrize(("count", "size"), [(10, 1_000_000), (50, 1_000_000), (10, 10_000)])
def test_pairwise_distances(node: str, count: int, size: int, threads: int) -> None:
    vectors = make(count, size)
    rows = list(vectors)
    compiled = torch.compile(gram_distances, dynamic=False)
    runs = {
        "fedkern": lambda: ops.pairwise_distances(rows),
        "cdist": lambda: torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist"),
        "cdist, matrix product": lambda: torch.cdist(vectors, vectors, compute_mode="use_mm_for_euclid_dist"),
        "pdist": lambda: torch.pdist(vectors),
        "Gram matrix": lambda: gram_distances(vectors),
        "compile": lambda: compiled(vectors),
    }
    note = "differences in fp64; the others sum in fp32, and by a matrix product they lose near-equal vectors"
    name, case, bytes_ = "pairwise_distances", f"M={count} P={size:,}", count * size * 4
    compare(node, name, case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15, note=note)


def eager_geometric_median(vectors: Tensor, iterations: int) -> Tensor:
    point = vectors.mean(0)
    for _ in range(iterations):
        pulls = 1 / (vectors - point).norm(dim=1).clamp_min(1e-6)
        point = pulls @ vectors / pulls.sum()
    return point


@pytest.mark.parametrize(("count", "size"), [(10, 10_000), (10, 1_000_000), (50, 1_000_000)])
def test_geometric_median(node: str, count: int, size: int, threads: int) -> None:
    vectors = make(count, size)
    rows = list(vectors)
    compiled = torch.compile(eager_geometric_median, dynamic=False)
    runs = {
        "fedkern": lambda: ops.geometric_median(rows, iterations=10, tolerance=0),
        "torch": lambda: eager_geometric_median(vectors, 10),
        "compile": lambda: compiled(vectors, 10),
    }
    case = f"M={count} P={size:,} 10 iterations"
    bytes_ = (2 * count + 1) * size * 4
    compare(node, "geometric_median", case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15)


@pytest.mark.parametrize(("count", "size"), [(10, 10_000), (10, 1_000_000), (50, 1_000_000)])
def test_krum(node: str, count: int, size: int, threads: int) -> None:
    vectors, byzantine = make(count, size), count // 10
    near = slice(1, count - byzantine - 1)
    rows = list(vectors)

    def eager_krum(vectors: Tensor) -> Tensor:
        """Select by the Gram matrix, the quickest way to distances in torch."""
        squared = squared_distances(vectors).sort(1).values
        return vectors[squared[:, near].sum(1).argmin()]

    compiled = torch.compile(eager_krum, dynamic=False)
    runs = {
        "fedkern": lambda: ops.krum(rows, byzantine),
        "torch": lambda: eager_krum(vectors),
        "compile": lambda: compiled(vectors),
    }
    case, bytes_ = f"M={count} P={size:,} f={byzantine}", (count + 1) * size * 4
    pairs = 15 if count * size <= 10_000_000 else 5
    compare(node, "krum", case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=pairs)


def eager_clip(vectors: Tensor) -> Tensor:
    return vectors * (1.0 / vectors.norm(dim=1, keepdim=True)).clamp(max=1.0)


def eager_clip_and_noise(vectors: Tensor) -> Tensor:
    return eager_clip(vectors) + 0.7 * torch.randn_like(vectors)


# One model; FedIOD's gradients of 64 generated images, clipped image by image.
@pytest.mark.parametrize(("count", "size"), [(1, 11_000_000), (10, 100_000), (64, 3072)])
def test_clip_and_noise(node: str, count: int, size: int, threads: int) -> None:
    vectors = make(count, size)
    compiled = torch.compile(eager_clip_and_noise)
    places = iter(range(0, 1 << 62, count * size))
    runs = {
        "fedkern": lambda: ops.clip_and_noise(vectors, 1.0, 0.7, 1, next(places)),
        "eager": lambda: eager_clip_and_noise(vectors),
        "compile": lambda: compiled(vectors),
    }
    case = f"M={count} P={size:,} fresh"
    bytes_ = 3 * count * size * 4
    compare(node, "clip_and_noise", case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15)


@pytest.mark.parametrize(("count", "size"), [(1, 11_000_000), (10, 1_000_000), (64, 3072)])
def test_clip_by_norm(node: str, count: int, size: int, threads: int) -> None:
    vectors = make(count, size)
    compiled = torch.compile(eager_clip)
    runs = {
        "fedkern": lambda: ops.clip_by_norm(vectors, 1.0),
        "eager": lambda: eager_clip(vectors),
        "compile": lambda: compiled(vectors),
    }
    bytes_ = 3 * count * size * 4
    case = f"M={count} P={size:,} fresh"
    compare(node, "clip_by_norm", case, runs, model_bytes=bytes_, copy=True, threads=threads, pairs=15)
