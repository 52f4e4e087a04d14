"""Tests of Accumulator.load_state_dict: a wrong state is refused in a sentence and leaves the accumulator unchanged."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern.ops import Accumulator

SIZE = 5
State = dict[str, Any]


def make_filled(exact: bool) -> Accumulator:
    accumulator = Accumulator(SIZE, exact)
    for k in range(1, 4):
        accumulator.add(torch.arange(float(SIZE)) * k, k)
    return accumulator


def put(name: str, value: Any) -> Callable[[State], Any]:
    return lambda state: {**state, name: value(state[name]) if callable(value) else value}


def without(name: str) -> Callable[[State], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def set_element(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[index] = value
        return x

    return set_element


# (what is done to the state, what is said), for both kinds, for the plain one and for the exact one.
BOTH: dict[str, tuple[Callable[[State], Any], str]] = {
    "a list": (lambda state: list(state), "state must be a dict made by state_dict"),
    "empty": (lambda state: {}, "the state must have the entry 'size'"),
    **{f"no {name}": (without(name), f"the state must have the entry '{name}'")
       for name in ("size", "exact", "count", "weight", "dtype")},
    "one more": (put("more", 1), "the state must not have the entry 'more'"),
    "other size": (put("size", SIZE + 1), "the state must be of size 5 and exact="),
    "size as text": (put("size", "5"), "the state's size must be a whole number, not str"),
    "size as a fraction": (put("size", 5.5), "the state's size must be a whole number, not float"),
    "other kind": (put("exact", lambda exact: 1 - exact), "the state must be of size 5 and exact="),
    "count as text": (put("count", "3"), "the state's count must be a whole number, not str"),
    "negative count": (put("count", -1), "the state's count must be that of vectors of weight 6, not -1"),
    "no count": (put("count", 0), "the state's count must be that of vectors of weight 6, not 0"),
    "weight as text": (put("weight", "6"), "the state's weight must be a number, not str"),
    "negative weight": (put("weight", -6.0), "the state's weight must be finite and not negative"),
    "infinite weight": (put("weight", math.inf), "the state's weight must be finite and not negative"),
    "no such dtype": (put("dtype", 4), "the state's dtype must be one of 0, 1, 2, 3, not 4"),
    "no dtype yet": (put("dtype", -1), "the state's dtype must be one of 0, 1, 2, 3, not -1"),
    "dtype as dtype": (put("dtype", torch.float32), "the state's dtype must be a whole number, not dtype"),
}  # fmt: skip
PLAIN: dict[str, tuple[Callable[[State], Any], str]] = {
    "no sum": (without("sum"), "the state must have the entry 'sum'"),
    "sum of one": (put("sum", lambda x: x[:1]), r"the state's sum must have shape \[5\], but has \[1\]"),
    "sum as a list": (put("sum", lambda x: x.tolist()), "the state's sum must be a tensor, but got list"),
    "sum of fp32": (put("sum", lambda x: x.float()), "the state's sum must have dtype torch.float64"),
    "sparse sum": (put("sum", lambda x: x.to_sparse()), "the state's sum must be a dense tensor"),
}
EXACT: dict[str, tuple[Callable[[State], Any], str]] = {
    **{f"no {name}": (without(name), f"the state must have the entry '{name}'") for name in ("units", "digits", "top")},
    "short units": (put("units", lambda x: x[:-1]), r"the state's units must have shape \[280\], but has \[279\]"),
    "units past floats": (
        put("units", lambda x: torch.full_like(x, 255)),
        "the state's units must be a sum of weights",
    ),
    "weight of others": (put("weight", 7.0), "the state's weight must be that of its units, 6, not 7"),
    "count past the digits": (put("count", 2**31), "the state's count must be that of vectors of weight 6"),
    "digits of one": (
        put("digits", lambda x: x[:, :1]),
        r"the state's digits must have shape \[3, 5\], but has \[3, 1\]",
    ),
    "two digits": (put("digits", lambda x: x[:2]), r"the state's digits must have shape \[3, 5\], but has \[2, 5\]"),
    "fractions": (put("digits", lambda x: x.double()), "the state's digits must have dtype torch.int64"),
    "large digit": (put("digits", at(3, 2**62)), "the state's digits must be within 2\\^32 for each of its 3 vectors"),
    "small digit": (put("digits", at(7, -(2**63))), "the state's digits must be within"),
    "top of one": (put("top", lambda x: x[:1]), r"the state's top must have shape \[5\], but has \[1\]"),
    "high top": (put("top", at(2, 35)), "the state's top must be between -31 and 34"),
    "low top": (put("top", at(2, -32)), "the state's top must be between -31 and 34"),
    "infinite with digits": (put("top", at(2, 32)), "the state's digits must be 0 where its top says"),
}
CASES = [(False, name, *case) for name, case in {**BOTH, **PLAIN}.items()]
CASES += [(True, name, *case) for name, case in {**BOTH, **EXACT}.items()]


@pytest.mark.parametrize(
    ("exact", "name", "change", "message"), CASES, ids=[f"{'exact' if e else 'plain'}-{n}" for e, n, _, _ in CASES]
)
def test_refused(exact: bool, name: str, change: Callable[[State], Any], message: str) -> None:
    accumulator, changed = make_filled(exact), make_filled(exact)
    changed.add(torch.ones(SIZE), 0.0)
    with pytest.raises((TypeError, ValueError), match=message) as told:
        changed.load_state_dict(change(accumulator.state_dict()))
    assert "\n" not in str(told.value)
    assert (changed.count, changed.weight) == (4, 6.0)
    assert torch.equal(changed.mean(), accumulator.mean())


@pytest.mark.parametrize("exact", [False, True])
def test_states_of_all_kinds_are_taken(exact: bool) -> None:
    empty, unweighted, special = Accumulator(SIZE, exact), Accumulator(SIZE, exact), Accumulator(SIZE, exact)
    unweighted.add(torch.ones(SIZE), 0.0)
    special.add(torch.tensor([math.inf, -math.inf, math.nan, 5e-324, 1.7e308], dtype=torch.float64), 0.75)
    for source in (empty, unweighted, special, make_filled(exact)):
        state = source.state_dict()
        for given in (state, {name: x if isinstance(x, Tensor) else torch.tensor(x) for name, x in state.items()}):
            target = make_filled(exact)
            target.load_state_dict(given)
            assert (target.count, target.weight) == (source.count, source.weight)
            target.add(torch.arange(float(SIZE)), 2.0)
            twin = Accumulator(SIZE, exact)
            twin.load_state_dict(state)
            twin.add(torch.arange(float(SIZE)), 2.0)
            torch.testing.assert_close(target.mean(), twin.mean(), rtol=0, atol=0, equal_nan=True)
    accumulator = Accumulator(0, exact)
    accumulator.load_state_dict(accumulator.state_dict())
