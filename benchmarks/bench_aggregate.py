"""weighted_mean and Accumulator against a loop of add_, _foreach_add_, torch.compile and Flower's NumPy averages.

Model bytes: every vector read once, the result written once, (M + 1) * P * 4.  The contestants write into memory of
their own that they reuse, but for "Flower, inplace=False", which has none.  Where a case says "fresh" all of them
allocate a new result, page faults included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import COPY
from contestants import apex_mean
from flower_means import LAYERS, fresh_mean, inplace_mean
from harness import compare
from torch import Tensor

from fedkern import ops


def add_loop(vectors: list[Tensor], weights: list[float], out: Tensor) -> Callable[[], Tensor]:
    total = sum(weights)

    def run() -> Tensor:
        torch.mul(vectors[0], weights[0] / total, out=out)
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            out.add_(vector, alpha=weight / total)
        return out

    return run


def foreach_add(vectors: list[Tensor], weights: list[float], out: Tensor) -> Callable[[], Tensor]:
    """Layer by layer, one client after another."""
    total = sum(weights)
    layers = list(out.chunk(LAYERS))
    clients = [list(vector.chunk(LAYERS)) for vector in vectors]

    def run() -> Tensor:
        torch.mul(vectors[0], weights[0] / total, out=out)
        for client, weight in zip(clients[1:], weights[1:], strict=True):
            torch._foreach_add_(layers, client, alpha=weight / total)
        return out

    return run


def compiled(vectors: list[Tensor], weights: list[float], out: Tensor | None) -> Callable[[], Tensor]:
    """One pass over the vectors, written into ``out`` or a new result."""
    shares = [weight / sum(weights) for weight in weights]

    def mean(vectors: list[Tensor], out: Tensor | None) -> Tensor:
        total = vectors[0] * shares[0]
        for vector, share in zip(vectors[1:], shares[1:], strict=True):
            total = total + vector * share
        return total if out is None else out.copy_(total)

    function = torch.compile(mean, dynamic=False)
    return lambda: function(vectors, out)


def make(count: int, size: int) -> tuple[list[Tensor], list[float], Tensor, Tensor]:
    torch.manual_seed(0)
    vectors = [torch.randn(size) for _ in range(count)]
    weights = [float(100 + 7 * m) for m in range(count)]
    return vectors, weights, torch.zeros(size), torch.zeros(size)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("count", "size", "floors"),
    [
        (10, 11_000_000, {"add_": 1.5, "_foreach_add_": 1.5, "Flower": 3.0, COPY: 0.9}),
        (50, 1_000_000, {"add_": 1.0, "_foreach_add_": 1.0}),
        (20, 5_000_000, {}),
        (10, 100_000, {}),
    ],
)
def test_weighted_mean(benchmark: Any, count: int, size: int, floors: dict[str, float], threads: int) -> None:
    vectors, weights, out, other = make(count, size)
    runs = {
        "fedkern": lambda: ops.weighted_mean(vectors, weights, out=out),
        "add_": add_loop(vectors, weights, other),
        "_foreach_add_": foreach_add(vectors, weights, other),
        "compile": compiled(vectors, weights, other),
        "Flower": inplace_mean(vectors, weights, other),
        "Flower, inplace=False": fresh_mean(vectors, weights),
        "apex": apex_mean(vectors, weights, other),
    }
    bytes_ = (count + 1) * size * 4
    case = f"M={count} P={size:,} into out="
    compare(
        benchmark,
        "aggregate",
        case,
        runs,
        model_bytes=bytes_,
        copy=True,
        floors=floors if threads == 1 else {},
        threads=threads,
    )


@pytest.mark.parametrize("size", [100_000_000, 130_000_000])
def test_weighted_mean_of_a_large_model(benchmark: Any, size: int) -> None:
    vectors, weights, out, other = make(5, size)
    runs = {
        "fedkern": lambda: ops.weighted_mean(vectors, weights, out=out),
        "add_": add_loop(vectors, weights, other),
        "_foreach_add_": foreach_add(vectors, weights, other),
        "compile": compiled(vectors, weights, other),
        "Flower": inplace_mean(vectors, weights, other),
    }
    floors = {"add_": 2.0, "_foreach_add_": 2.0, "Flower": 3.0, COPY: 0.9}
    bytes_ = 6 * size * 4
    case = f"M=5 P={size:,} into out="
    note = "bound by memory: it moves its bytes as fast as a copy moves as many"
    compare(
        benchmark, "aggregate", case, runs, model_bytes=bytes_, copy=True, floors=floors, threads=1, pairs=15, note=note
    )


def test_fresh_result(benchmark: Any) -> None:
    vectors, weights, _, _ = make(10, 11_000_000)
    total = sum(weights)

    def add_() -> Tensor:
        out = vectors[0] * (weights[0] / total)
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            out.add_(vector, alpha=weight / total)
        return out

    runs = {
        "fedkern": lambda: ops.weighted_mean(vectors, weights),
        "add_": add_,
        "compile": compiled(vectors, weights, None),
        "Flower": inplace_mean(vectors, weights),
        "Flower, inplace=False": fresh_mean(vectors, weights),
    }
    compare(benchmark, "aggregate", "M=10 P=11,000,000 fresh", runs, model_bytes=11 * 44_000_000, copy=True, threads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(benchmark: Any, dtype: torch.dtype) -> None:
    vectors, weights, out, other = (
        [t.to(dtype) for t in x] if isinstance(x, list) and isinstance(x[0], Tensor) else x
        for x in make(10, 11_000_000)
    )
    out, other = out.to(dtype), other.to(dtype)
    runs = {
        "fedkern": lambda: ops.weighted_mean(vectors, weights, out=out),
        "add_": add_loop(vectors, weights, other),
        "compile": compiled(vectors, weights, other),
    }
    case = f"M=10 P=11,000,000 {str(dtype).removeprefix('torch.')}"
    compare(benchmark, "aggregate", case, runs, model_bytes=11 * 22_000_000, copy=True, threads=1)


@pytest.mark.parametrize("size", [11_000_000, 100_000])
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_accumulator(benchmark: Any, exact: bool, size: int) -> None:
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
    compare(benchmark, "aggregate", case, runs, model_bytes=moved, copy=True, threads=1)


def test_flat_against_layers(benchmark: Any) -> None:
    """Loading an averaged model: one flat copy against load_state_dict."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.ReLU()) for _ in range(31)])
    state = {key: value.clone() for key, value in module.state_dict().items()}
    twin = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.ReLU()) for _ in range(31)])
    flat = ops.FlatParameters(twin)
    vector = flat.vector.clone()
    runs = {"fedkern": lambda: flat.load(vector), "load_state_dict": lambda: module.load_state_dict(state)}
    compare(benchmark, "aggregate", "load 62 tensors, P=4,972,400", runs, threads=1)
