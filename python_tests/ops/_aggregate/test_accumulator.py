"""Tests of Accumulator: sums in any order, and wrong states, which are refused in a sentence."""

import copy
import itertools
import math
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedkern.ops import Accumulator
from python_tests.ops._aggregate.aggregate_cases import accumulate
from python_tests.ops.operator_cases import BACKENDS, KERNELS, using

pytestmark = pytest.mark.usefixtures("one_thread")


def wild(count: int, size: int) -> tuple[list[Tensor], list[float]]:
    """Return vectors over the whole range of fp64, with infinities and NaN in places."""
    torch.manual_seed(5)
    vectors = [
        torch.randn(size, dtype=torch.float64) * 10.0 ** torch.randint(-308, 290, (size,)).double()
        for _ in range(count)
    ]
    vectors[0][:4] = torch.tensor([math.inf, math.inf, math.nan, 5e-324])
    vectors[1][:4] = torch.tensor([-math.inf, 1.0, 1.0, -5e-324])
    vectors[2][4:6] = torch.tensor([-math.inf, 1e308])
    return vectors, [[1.0, 3.7, 1e-5, 1e6][k % 4] for k in range(count)]


@pytest.mark.parametrize("name", BACKENDS)
def test_exact_accumulator_does_not_see_the_order(name: str) -> None:
    vectors, weights = wild(20, 500)
    order = list(range(20))
    results = []
    for _ in range(5):
        with using(name):
            accumulator = accumulate([vectors[k] for k in order], [weights[k] for k in order])
            results.append((accumulator.mean(), accumulator.weight, accumulator.state_dict()))
        random.Random(len(results)).shuffle(order)
    for mean, weight, state in results[1:]:
        assert torch.equal(mean.view(torch.int64), results[0][0].view(torch.int64))
        assert weight == results[0][1]
        assert all(torch.equal(state[key], results[0][2][key]) for key in ("digits", "top", "units"))
    mean = results[0][0]
    assert mean[:6].isnan().tolist() == [True, False, True, False, False, False]
    assert mean[1] == math.inf
    assert mean[4] == -math.inf
    total = sum(map(Fraction, weights))
    for j in range(6, 500):
        products = [Fraction(float(vector[j] * weight)) for vector, weight in zip(vectors, weights, strict=True)]
        wanted = sum(products) / total
        scale = max(abs(product) for product in products) / total
        assert abs(Fraction(float(mean[j])) - wanted) <= abs(wanted) * Fraction(1, 2**51) + scale * Fraction(20, 2**64)


def test_exact_accumulator_has_the_same_digits_on_every_backend() -> None:
    vectors, weights = wild(9, 700)
    states = []
    for name in BACKENDS:
        with using(name):
            accumulator = accumulate(vectors, weights)
            states.append((accumulator.state_dict(), accumulator.mean()))
    for state, mean in states[1:]:
        assert torch.equal(state["digits"][:, 6:], states[0][0]["digits"][:, 6:])
        assert torch.equal(state["top"], states[0][0]["top"])
        torch.testing.assert_close(mean, states[0][1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_merged_accumulators_have_the_bits_of_one(name: str) -> None:
    vectors, weights = wild(20, 500)
    total, parts = Accumulator(500, exact=True), [Accumulator(500, exact=True) for _ in range(4)]
    with using(name):
        for k, (vector, weight) in enumerate(zip(vectors, weights, strict=True)):
            total.add(vector, weight)
            parts[k % 3].add(vector, weight)
        wanted, mean = total.state_dict(), total.mean()
        for order in itertools.permutations(range(4)):  # the last part has nothing
            merged = Accumulator(500, exact=True)
            for part in order:
                merged.merge(parts[part])
            found = merged.state_dict()
            assert all(torch.equal(found[key], wanted[key]) for key in ("top", "units"))
            finite = wanted["top"] < 32
            assert torch.equal(found["digits"][:, finite], wanted["digits"][:, finite])
            assert torch.equal(merged.mean().view(torch.int64), mean.view(torch.int64))
            assert (merged.weight, merged.count) == (total.weight, total.count)
            Accumulator(500, exact=True).load_state_dict(found)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("weight", [1e-300, 1e-200, 1e200, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_near_the_ends_of_the_range(name: str, weight: float, dtype: torch.dtype) -> None:
    vectors = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype) * 1e4
    with using(name):
        accumulator = accumulate(vectors, [weight] * 5)
        torch.testing.assert_close(accumulator.mean(dtype=torch.float64), vectors.double().mean(0), rtol=1e-12, atol=0)
        assert accumulator.mean().dtype == dtype
        if weight == 1e300:
            with pytest.raises(ValueError, match=r"weight 1e\+300 makes products with the vector overflow"):
                accumulator.add(torch.full((40,), 1e10, dtype=dtype), weight)
            assert accumulator.count == 5
        accumulator.add(torch.full((40,), math.inf, dtype=dtype), weight)
        assert accumulator.mean().isinf().all()


@pytest.mark.parametrize("exact", [False, True])
def test_an_accumulator_made_under_inference_mode(exact: bool) -> None:
    with torch.inference_mode():
        accumulator, copy_ = Accumulator(9, exact), Accumulator(9, exact)
        accumulator.add(torch.ones(9), 2.0)
    if exact:
        copy_.add(torch.ones(9), 2.0)
        accumulator.merge(copy_)
        with torch.inference_mode():
            accumulator.merge(copy_)
    state = accumulator.state_dict()
    accumulator.add(torch.full((9,), 4.0))
    accumulator.reset()
    accumulator.load_state_dict(state)
    assert torch.equal(accumulator.mean(), torch.ones(9))


def test_a_merged_accumulator_goes_on() -> None:
    torch.manual_seed(1)
    vectors = [torch.randn(3000) * 10.0 ** (6 * k) for k in range(-3, 4)]
    full, left, two = (Accumulator(3000, exact=True) for _ in range(3))
    for k, vector in enumerate(vectors):
        full.add(vector, k + 1)
    for k in (5, 1):
        left.add(vectors[k], k + 1)
    for k in (0, 6, 3):
        two.add(vectors[k], k + 1)
    before = two.state_dict()
    left.merge(two)
    assert all(torch.equal(before[key], two.state_dict()[key]) for key in ("digits", "top", "units"))
    for k in (4, 2):
        left.add(vectors[k], k + 1)
    assert torch.equal(left.mean(), full.mean())
    assert left.mean().dtype == torch.float32
    twice = Accumulator(3000, exact=True)
    twice.merge(full)
    twice.merge(twice)  # with itself
    assert torch.equal(twice.mean(), full.mean())
    assert twice.count == 14


def test_what_cannot_be_merged() -> None:
    exact = Accumulator(4, exact=True)
    exact.add(torch.ones(4))
    for partner, error, message in (
        ([1.0], TypeError, "other must be an Accumulator, not list"),
        (Accumulator(4), ValueError, "merge needs two exact accumulators"),
        (Accumulator(5, exact=True), ValueError, "other must have size 4 on cpu like the accumulator, but has size 5"),
        (Accumulator(4, exact=True, device="meta"), ValueError, "but has size 4 on meta"),
    ):
        with pytest.raises(error, match=message):
            exact.merge(partner)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="merge needs two exact accumulators"):
        Accumulator(4).merge(exact)
    heavy = [Accumulator(4, exact=True) for _ in range(2)]
    for accumulator in heavy:
        accumulator.add(torch.ones(4), 1.7e308)
    with pytest.raises(ValueError, match="the sum of the weights overflows"):
        heavy[0].merge(heavy[1])
    assert heavy[0].mean().tolist() == exact.mean().tolist() == [1, 1, 1, 1]


def test_cancellation_is_exact() -> None:
    """1e30 - 1e30 + 1 is 1 in any order, where a plain fp64 sum mostly gives 0."""
    for order in itertools.permutations((1e15, -1e15, 1.0)):
        accumulator = Accumulator(1, exact=True)
        for value in order:
            accumulator.add(torch.tensor([value * 1e-3 if abs(value) > 1 else value], dtype=torch.float64), 1e3)
        assert accumulator.mean().item() == 1 / 3


@pytest.mark.parametrize("exact", [False, True])
def test_state_continues_bit_for_bit(exact: bool) -> None:
    torch.manual_seed(0)
    vectors = [torch.randn(1000).bfloat16() for _ in range(6)]
    left, two = Accumulator(1000, exact=exact), Accumulator(1000, exact=exact)
    for k in range(3):
        left.add(vectors[k], k + 0.1)
    state = left.state_dict()
    two.load_state_dict(state)
    for k in range(3, 6):
        left.add(vectors[k], k + 0.1)
        two.add(vectors[k], k + 0.1)
    assert torch.equal(left.mean(), two.mean())
    assert (left.weight, left.count) == (two.weight, two.count)
    assert two.mean().dtype == torch.bfloat16
    assert two.mean(dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="the state must be of size 999"):
        Accumulator(999, exact=exact).load_state_dict(state)
    left.reset()
    assert left.count == 0
    with pytest.raises(ValueError, match="nothing to average yet"):
        left.mean()
    left.add(vectors[0], 2.0)
    assert torch.equal(left.mean(), vectors[0])


@pytest.mark.parametrize("exact", [False, True])
def test_means_where_memory_is_not_what_it_seems(exact: bool) -> None:
    """Kernels write through pointers: not under another default device, a transform, or to a fake tensor."""
    accumulator = Accumulator(3, exact=exact)
    accumulator.add(torch.tensor([1.0, 2.0, 3.0]))
    with torch.device("meta"):
        assert accumulator.mean().tolist() == [1, 2, 3]
    value, tangent = torch.func.jvp(lambda x: accumulator.mean() * x, (torch.ones(3),), (torch.ones(3),))
    assert value.tolist() == tangent.tolist() == [1, 2, 3]
    with FakeTensorMode() as mode:
        fake = torch.empty(3)
    with pytest.raises(AssertionError, match="FakeTensor"):  # torch's own words for a real sum and a fake result
        accumulator.mean(out=fake)
    with mode, pytest.raises(AssertionError, match="FakeTensor"):
        accumulator.mean()


def test_a_vector_of_another_size_and_weights_of_nothing_are_refused() -> None:
    accumulator = Accumulator(4)
    with pytest.raises(ValueError, match=r"vector must have shape \[4\], but has \[5\]"):
        accumulator.add(torch.ones(5))
    with pytest.raises(ValueError, match="weight must be finite and not negative, not inf"):
        accumulator.add(torch.ones(4), math.inf)
    accumulator.add(torch.ones(4), 0)
    with pytest.raises(ValueError, match="nothing to average yet"):
        accumulator.mean()


@pytest.mark.parametrize(
    ("name", "exact"), [("reference", False), *[("cpu", exact) for exact in (False, True) if KERNELS]]
)
def test_uploads_of_several_threads_all_count(name: str, exact: bool) -> None:
    """The vectors are so large that kernels and torch release the interpreter's lock."""
    vectors = [torch.full((60_000,), float(number)) for number in range(1, 9)]
    with using(name), ThreadPoolExecutor(8) as pool:
        total = Accumulator(60_000, exact)
        jobs = [pool.submit(total.add, vectors[number % 8], 1.0) for number in range(160)]
        seen = [pool.submit(total.state_dict) for _ in range(4)]
        for job in jobs:
            job.result()
        assert (total.count, total.weight) == (160, 160.0)
        assert (total.mean() == 4.5).all()
        for state in seen:
            again = Accumulator(60_000, exact)
            again.load_state_dict(state.result())
            assert again.count == again.weight


def test_accumulators_merged_into_each_other_by_threads_never_wait_for_each_other() -> None:
    left, right = Accumulator(50_000, True), Accumulator(50_000, True)
    for total in (left, right):
        total.add(torch.ones(50_000))
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(a.merge, b) for a, b in [(left, right), (right, left)] * 8]:
            job.result(timeout=60)
    assert all((total.mean() == 1).all() for total in (left, right))
    count = left.count
    left.merge(left)
    assert left.count == 2 * count


@pytest.mark.parametrize("exact", [False, True])
def test_copies_take_vectors(exact: bool) -> None:
    total = Accumulator(3, exact)
    total.add(torch.ones(3))
    for made in (copy.deepcopy(total), pickle.loads(pickle.dumps(total))):
        made.add(torch.full((3,), 3.0))
        assert (made.mean() == 2).all()
    assert total.count == 1


# -- accumulator state -------------------------------------------------------------------------------------------------


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
