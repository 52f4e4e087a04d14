"""Tests of ``out=``: the same bits whatever its strides, rounded once, to its own dtype."""

import contextlib
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops._aggregate.aggregate_cases import accumulate
from python_tests.ops.emulated_core import emulate
from python_tests.ops.operator_cases import BACKENDS, DTYPES, using
from python_tests.ops.operator_runs import Calls, Named

SIZE = 37
WEIGHTS = [1.0, 2.0, 0.5]


def write_total(vectors: Tensor, out: Tensor, exact: bool) -> Tensor:
    return accumulate(vectors, WEIGHTS, exact).mean(out=out)


def write_step(vectors: Tensor, out: Tensor) -> Tensor:
    states = {name: torch.full((SIZE,), 0.25, dtype=torch.float64) for name in ("first", "second")}
    return ops.server_step(vectors[0], vectors, WEIGHTS, "adam", out=out, **states).model


WRITERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted_mean": lambda vectors, out: ops.weighted_mean(vectors, WEIGHTS, out=out),
    "weighted_mean list": lambda vectors, out: ops.weighted_mean(list(vectors), WEIGHTS, out),
    "weighted_mean tensor": lambda vectors, out: ops.weighted_mean(vectors, torch.tensor(WEIGHTS), out=out),
    "server_step": lambda vectors, out: ops.server_step(vectors[0], vectors, WEIGHTS, out=out).model,
    "server_step adam": write_step,
    "Accumulator.mean": lambda vectors, out: write_total(vectors, out, False),
    "Accumulator.mean exact": lambda vectors, out: write_total(vectors, out, True),
}

LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "offset": lambda dtype: torch.empty(SIZE + 3, dtype=dtype)[3:],
    "strided": lambda dtype: torch.empty(2 * SIZE, dtype=dtype)[::2],
    "column": lambda dtype: torch.empty(SIZE, 3, dtype=dtype)[:, 1],
    "negated": lambda dtype: torch._neg_view(torch.empty(SIZE, dtype=dtype)),
}


def test_every_operator_that_takes_out_is_covered() -> None:
    public = {name: getattr(ops, name) for name in ops.__all__}
    public |= {f"Accumulator.{name}": value for name, value in vars(ops.Accumulator).items() if callable(value)}
    taking = {name for name, value in public.items() if "out" in inspect.signature(value).parameters}
    assert taking == {name.split()[0] for name in WRITERS}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("writer", WRITERS)
def test_strides_of_out_do_not_matter(name: str, writer: str) -> None:
    write = WRITERS[writer]
    with emulate() if name == "cuda" else using(name):
        for dtype in DTYPES:
            vectors = torch.randn(3, SIZE, dtype=torch.float64).to(dtype)
            for wanted in DTYPES:
                expected = write(vectors, torch.empty(SIZE, dtype=wanted))
                if wanted is torch.float64 and dtype is not wanted:
                    assert not torch.equal(expected, expected.to(dtype).double())
                for layout, make in LAYOUTS.items():
                    out = make(wanted)
                    assert write(vectors, out) is out
                    assert torch.equal(out, expected), (dtype, wanted, layout)


@pytest.mark.parametrize("writer", WRITERS)
def test_out_within_the_vectors_memory(writer: str) -> None:
    """The result overwrites a vector while others read it."""
    draw = torch.randn(3, SIZE + 1)
    for start in (0, 1):
        memory = draw.clone()
        vectors, out = memory[:, :SIZE], memory[1, start : start + SIZE]
        expected = WRITERS[writer](vectors.clone(), torch.empty(SIZE))
        assert torch.equal(WRITERS[writer](vectors, out), expected)


def compile_writer(write: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(write, backend="aot_eager")


def as_subclasses(write: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda vectors, out: write(vectors.as_subclass(Named), out).as_subclass(Tensor)


OBSERVERS = {"compile": compile_writer, "mode": lambda write: write, "subclass": as_subclasses}


@pytest.mark.exhaustive
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("writer", [name for name in WRITERS if not name.startswith("Accumulator")])
def test_out_is_rounded_once_where_somebody_looks_on(writer: str, observer: str) -> None:
    vectors = torch.randn(3, SIZE)
    for wanted in DTYPES:
        expected = WRITERS[writer](vectors, torch.empty(SIZE, dtype=wanted))
        for out in (torch.empty(SIZE, dtype=wanted), LAYOUTS["strided"](wanted)):
            with Calls() if observer == "mode" else contextlib.nullcontext():
                OBSERVERS[observer](WRITERS[writer])(vectors, out)
            assert torch.equal(out, expected), wanted
