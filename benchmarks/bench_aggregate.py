"""weighted_mean and Accumulator against a loop of add_, _foreach_add_ and torch.compile.

Model bytes: every vector read once, the result written once, (M + 1) * P * 4.  The implementations write into memory of
their own that they reuse.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops

LAYERS = 62  # tensors of a ResNet-18's parameters


def add_loop(vectors: list[Tensor], weights: list[float], out: Tensor) -> Callable[[], Tensor]:
    total = sum(weights)

    def run() -> Tensor:
        torch.mul(vectors[0], weights[0] / total, out=out)
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            out.add_(vector, alpha=weight / total)
        return out

    return run


def foreach_add(vectors: list[Tensor], weights: list[float], out: Tensor) -> Callable[[], Tensor]:
    """Average layer by layer, one client after another."""
    total = sum(weights)
    layers = list(out.chunk(LAYERS))
    clients = [list(vector.chunk(LAYERS)) for vector in vectors]

    def run() -> Tensor:
        torch.mul(vectors[0], weights[0] / total, out=out)
        for client, weight in zip(clients[1:], weights[1:], strict=True):
            torch._foreach_add_(layers, client, alpha=weight / total)
        return out

    return run


def compile_mean(vectors: list[Tensor], weights: list[float], out: Tensor) -> Callable[[], Tensor]:
    """Average in one pass over the vectors, written into ``out``."""
    shares = [weight / sum(weights) for weight in weights]

    def mean(vectors: list[Tensor], out: Tensor) -> Tensor:
        total = vectors[0] * shares[0]
        for vector, share in zip(vectors[1:], shares[1:], strict=True):
            total = total + vector * share
        return out.copy_(total)

    function = torch.compile(mean, dynamic=False)
    return lambda: function(vectors, out)


def make(count: int, size: int) -> tuple[list[Tensor], list[float], Tensor, Tensor]:
    torch.manual_seed(0)
    vectors = [torch.randn(size) for _ in range(count)]
    weights = [float(100 + 7 * m) for m in range(count)]
    return vectors, weights, torch.zeros(size), torch.zeros(size)


@pytest.mark.parametrize(("count", "size"), [(10, 11_000_000), (50, 1_000_000), (20, 5_000_000), (10, 100_000)])
def test_weighted_mean(node: str, count: int, size: int, threads: int) -> None:
    vectors, weights, out, spare = make(count, size)
    runs = {
        "fedkern": lambda: ops.weighted_mean(vectors, weights, out=out),
        "add_": add_loop(vectors, weights, spare),
        "_foreach_add_": foreach_add(vectors, weights, spare),
        "compile": compile_mean(vectors, weights, spare),
    }
    bytes_ = (count + 1) * size * 4
    case = f"M={count} P={size:,} into out="
    compare(node, "aggregate", case, runs, model_bytes=bytes_, copy=True, threads=threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(node: str, dtype: torch.dtype, threads: int) -> None:
    vectors, weights, out, spare = (
        [t.to(dtype) for t in x] if isinstance(x, list) and isinstance(x[0], Tensor) else x
        for x in make(10, 11_000_000)
    )
    out, spare = out.to(dtype), spare.to(dtype)
    runs = {
        "fedkern": lambda: ops.weighted_mean(vectors, weights, out=out),
        "add_": add_loop(vectors, weights, spare),
        "compile": compile_mean(vectors, weights, spare),
    }
    case = f"M=10 P=11,000,000 {str(dtype).removeprefix('torch.')}"
    compare(node, "aggregate", case, runs, model_bytes=11 * 22_000_000, copy=True, threads=threads)


@pytest.mark.parametrize("size", [11_000_000, 100_000])
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_accumulator(node: str, exact: bool, size: int, threads: int) -> None:
    vector, total = torch.randn(size), torch.zeros(size, dtype=torch.float64)
    accumulator = ops.Accumulator(size, exact=exact)
    function = torch.compile(lambda total, vector: total.add_(vector, alpha=2.0), dynamic=False)
    compiled_total = total.clone()
    runs = {
        "fedkern": lambda: accumulator.add(vector, 2.0),
        "add_ to float64": lambda: total.add_(vector, alpha=2.0),
        "compile to float64": lambda: function(compiled_total, vector),
    }
    moved = (4 + 48 + 2 if exact else 4 + 16) * size
    case = f"add{' exact' if exact else ''} P={size:,}"
    compare(node, "aggregate", case, runs, model_bytes=moved, copy=True, threads=threads)
