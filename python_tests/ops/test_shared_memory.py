"""Tests of server_step: a state that shares memory with another argument is refused, and nothing is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.emulated_core import emulate
from python_tests.ops.operator_cases import BACKENDS, using

SIZE = 8
WEIGHTS = [1.0, 2.0, 0.5]


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "global_": torch.randn(SIZE, dtype=dtype),
        "vectors": torch.randn(3, SIZE, dtype=dtype),
        "first": torch.zeros(SIZE, dtype=dtype),
        "second": torch.ones(SIZE, dtype=dtype),
        "out": torch.empty(SIZE, dtype=dtype),
    }


def memory(start: int, step: int = 1) -> tuple[Tensor, Tensor]:
    """Return a state, and a vector that begins ``start`` elements behind it."""
    held = torch.zeros(2 * SIZE + SIZE * step)
    return held[SIZE : 2 * SIZE], held[SIZE + start :][: SIZE * step : step]


def shares(state: str, name: str, start: int = 0, step: int = 1) -> Callable[[dict[str, Tensor]], None]:
    def put(given: dict[str, Tensor]) -> None:
        given[state], given[name] = memory(start, step)

    return put


def a_row(state: str, row: int) -> Callable[[dict[str, Tensor]], None]:
    def put(given: dict[str, Tensor]) -> None:
        given[state] = given["vectors"][row]

    return put


def between_rows(given: dict[str, Tensor]) -> None:
    given["first"] = given["vectors"].flatten()[SIZE // 2 :][:SIZE]


def in_columns(given: dict[str, Tensor]) -> None:
    held = torch.randn(SIZE, 3)
    given["vectors"], given["first"] = held.t(), held.flatten()[:SIZE]


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "out is first": (shares("first", "out"), "first must not share memory with out"),
    "out is second": (shares("second", "out"), "second must not share memory with out"),
    "out begins within first": (shares("first", "out", SIZE - 1), "first must not share memory with out"),
    "out ends within first": (shares("first", "out", 1 - SIZE), "first must not share memory with out"),
    "strided out within first": (shares("first", "out", -SIZE, 2), "first must not share memory with out"),
    "first is second": (shares("first", "second"), "first must not share memory with second"),
    "first overlaps second": (shares("first", "second", 3), "first must not share memory with second"),
    "first is a vector": (a_row("first", 1), r"first must not share memory with vectors\[1\]"),
    "second is a vector": (a_row("second", 2), r"second must not share memory with vectors\[2\]"),
    "first overlaps two vectors": (between_rows, r"first must not share memory with vectors\[0\]"),
    "first lies among columns": (in_columns, r"first must not share memory with vectors\[0\]"),
    "first is global_": (shares("first", "global_"), "first must not share memory with global_"),
    "second overlaps global_": (shares("second", "global_", -2), "second must not share memory with global_"),
}
APART: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "behind first": shares("first", "out", SIZE),
    "before second": shares("second", "out", -SIZE),
    "vectors and states in one block": lambda given: given.update(
        zip(("vectors", "first", "second"), torch.randn(5, SIZE).abs().split([3, 1, 1]), strict=True)
    ),
}


def step(given: dict[str, Tensor], listed: bool = False) -> ops.ServerStep:
    vectors = list(given["vectors"]) if listed else given["vectors"]
    states = {name: given[name] for name in ("first", "second", "out")}
    return ops.server_step(given["global_"], vectors, WEIGHTS, "adam", **states)


@pytest.mark.parametrize("name", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(name: str, case: str) -> None:
    put, message = REFUSED[case]
    for listed in (False, True):
        given = arguments()
        put(given)
        before = {key: x.clone() for key, x in given.items()}
        with emulate() if name == "cuda" else using(name), pytest.raises(ValueError, match=message):
            step(given, listed)
        for key, x in given.items():
            assert torch.equal(x.nan_to_num(), before[key].nan_to_num()), key


@pytest.mark.parametrize("state", ["first", "second"])
def test_weights_as_a_state_are_refused(state: str) -> None:
    given = arguments()
    given["vectors"] = torch.randn(SIZE, SIZE)
    states = {name: given[name] for name in ("first", "second")}
    with pytest.raises(ValueError, match=f"{state} must not share memory with weights"):
        ops.server_step(given["global_"], given["vectors"], states[state].fill_(1), "adam", **states)


def test_momentum_has_one_state() -> None:
    given = arguments()
    for name in ("global_", "out"):
        with pytest.raises(ValueError, match=f"first must not share memory with {name}"):
            ops.server_step(
                given["global_"], given["vectors"], WEIGHTS, "momentum", first=given[name], out=given["out"]
            )


@pytest.mark.parametrize("case", APART)
def test_memory_that_only_touches_is_taken(case: str) -> None:
    given = arguments()
    APART[case](given)
    given = {name: x[0] if name in ("first", "second") and x.dim() == 2 else x for name, x in given.items()}
    expected = step({name: x.clone() for name, x in given.items()})
    torch.testing.assert_close(step(given).model, expected.model, rtol=0, atol=0)


def test_refused_under_compile() -> None:
    torch._dynamo.reset()
    given = arguments()
    given["second"] = given["first"]
    with pytest.raises(Exception, match="first must not share memory with second"):
        torch.compile(step, backend="eager", fullgraph=True)(given)
