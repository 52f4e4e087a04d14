"""ErrorFreeSum: on every backend the bits of Python's exact sums, for every order and every way to split."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from aggregate_cases import CLIENTS, SIZES, make_vectors, make_weights, odd_views
from operator_cases import BACKENDS, DTYPES, KERNELS, using
from torch import Tensor

from fedkern.ops import Accumulator
from fedkern.ops._aggregate.error_free import BLOCK, ErrorFreeSum
from fedkern.ops._core import backend


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exact(vectors: list[Tensor], weights: list[float], dtype: torch.dtype) -> Tensor:
    """The sum of the products, rounded once by Python's fsum, over the sum of the weights."""
    rows = [(vector.double() * weight).tolist() for vector, weight in zip(vectors, weights, strict=True)]
    total = math.fsum(weights)
    means = [math.fsum(column) / total for column in zip(*rows, strict=True)]
    return torch.tensor(means, dtype=torch.float64).to(dtype)


def summed(
    vectors: list[Tensor], weights: list[float], dtype: torch.dtype, parts: int = 1
) -> tuple[Tensor, ErrorFreeSum]:
    """The mean after so many calls of add."""
    made = ErrorFreeSum(len(vectors[0]))
    for part in range(parts):
        assert made.add(vectors[part::parts], weights[part::parts]) == []
    out = torch.full((len(vectors[0]),), 7.0, dtype=dtype)
    made.mean(out, math.fsum(weights))
    return out, made


def spread(count: int, size: int, powers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Vectors whose numbers of one element differ in size by up to 2^(2 powers)."""
    generator = torch.Generator().manual_seed(powers)
    scales = torch.randint(-powers, powers + 1, (count, size), generator=generator).double().exp2()
    return list((torch.randn(count, size, generator=generator, dtype=torch.float64) * scales).to(dtype).unbind())


def bits(vector: Tensor) -> Tensor:
    return vector.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[vector.itemsize])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_are_exact_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    for number, (size, count) in enumerate(zip(SIZES, (*CLIENTS, *CLIENTS), strict=False)):
        vectors, weights = make_vectors(count, size, dtype, number), make_weights("counts", count, number)
        wanted = exact(vectors, weights, torch.float64)
        with using(name):
            found, _ = summed(vectors, weights, torch.float64, 1 + number % 3)
            once = torch.empty(size, dtype=torch.float64)
            assert ErrorFreeSum.mean_at_once(vectors, weights, once) == []
            narrow = torch.empty(size, dtype=dtype)
            ErrorFreeSum.mean_at_once(vectors, weights, narrow)
        assert torch.equal(bits(found), bits(wanted))
        assert torch.equal(bits(once), bits(wanted))
        if dtype in (torch.float32, torch.float64):  # torch rounds fp64 to 16 bits in two steps
            assert torch.equal(bits(narrow), bits(wanted.to(dtype)))
        else:
            torch.testing.assert_close(narrow, wanted.to(dtype))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("powers", [12, 40, 120])
def test_numbers_of_very_different_size(name: str, powers: int) -> None:
    size = 3 * BLOCK + 41
    vectors = spread(23, size, powers)
    draw = random.Random(1)
    weights = [draw.choice([1.0, 3.7, 1e-5, 600.0, 1e6]) for _ in vectors]
    wanted = exact(vectors, weights, torch.float32)
    order = list(range(len(vectors)))
    for turn in range(4):
        with using(name):
            rows, shares = [vectors[k] for k in order], [weights[k] for k in order]
            found, made = summed(rows, shares, torch.float32, 1 + 5 * turn)
            once = torch.empty(size)
            assert ErrorFreeSum.mean_at_once(rows, shares, once) == []
        assert torch.equal(bits(found), bits(wanted))
        assert torch.equal(bits(once), bits(wanted))
        assert int(made._used) > 0
        assert made._notes or powers < 120
        random.Random(turn).shuffle(order)


@pytest.mark.parametrize("name", BACKENDS)
def test_sums_that_cancel(name: str) -> None:
    values = [1e30, 1.0, -1e30, 1e-30, 2.0**-149, -1.0, -0.0]
    vectors = [torch.full((70,), value) for value in values]
    weights = [1.0] * len(values)
    for _ in range(5):
        with using(name):
            found, _ = summed(vectors, weights, torch.float64, 3)
        assert found.tolist() == [math.fsum(float(vector[0]) for vector in vectors) / 7] * 70
        random.Random(3).shuffle(vectors)
    with using(name):
        nothing, made = summed([torch.full((130,), -0.0)] * 3, [1.0, 2.0, 5.0], torch.float32)
    assert not nothing.signbit().any()
    assert name == "reference" or name == "triton" or int(made._used) == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_most_elements_take_eight_bytes(name: str) -> None:
    vectors, weights = make_vectors(10, 100_000, torch.float32), make_weights("counts", 10)
    with using(name):
        _, made = summed(vectors, [w // 40 for w in weights], torch.float32)
    if name in KERNELS:
        assert int(made._used) < len(made._slots) / 10
    assert not made._notes


@pytest.mark.parametrize("name", BACKENDS)
def test_vectors_that_are_not_finite_leave_no_trace(name: str) -> None:
    size = 5 * BLOCK + 3
    vectors, weights = spread(14, size, 30), make_weights("random", 14)
    wanted = exact(vectors, weights, torch.float32)
    bad = {2: (math.nan, 0), 6: (math.inf, 700), 7: (-math.inf, 700), 16: (math.nan, size - 1)}
    rows, shares = list(vectors), list(weights)
    for place, (value, at) in bad.items():
        spoiled = torch.randn(size) * 1e3
        spoiled[at] = value
        rows.insert(place, spoiled)
        shares.insert(place, 3.5)
    with using(name):
        made = ErrorFreeSum(size)
        refused = made.add(rows[:9], shares[:9])
        refused += [9 + place for place in made.add(rows[9:], shares[9:])]
        out = torch.empty(size)
        made.mean(out, math.fsum(weights))
        assert ErrorFreeSum.mean_at_once(rows, shares, torch.empty(size)) == sorted(bad)
    assert refused == sorted(bad)
    assert torch.equal(bits(out), bits(wanted))


@pytest.mark.parametrize("name", BACKENDS)
def test_what_was_added_can_be_taken_out(name: str) -> None:
    vectors, weights = spread(9, 300, 100), make_weights("random", 9)
    with using(name):
        made = ErrorFreeSum(300)
        made.add(vectors, weights)
        made.add(vectors[6:], [-weight for weight in weights[6:]])
        out = torch.empty(300)
        made.mean(out, math.fsum(weights[:6]))
    assert torch.equal(bits(out), bits(exact(vectors[:6], weights[:6], torch.float32)))


@pytest.mark.parametrize("name", BACKENDS)
def test_any_strides_and_mixed_dtypes(name: str) -> None:
    vectors, weights = make_vectors(5, 333, torch.float32), make_weights("counts", 5)
    wanted = exact(vectors, weights, torch.float32)
    with using(name):
        for rows in odd_views(vectors):
            assert torch.equal(bits(summed(rows, weights, torch.float32)[0]), bits(wanted))
        mixed = [vector.to(dtype) for vector, dtype in zip(vectors, (*DTYPES, torch.float32), strict=True)]
        assert torch.equal(bits(summed(mixed, weights, torch.float32)[0]), bits(exact(mixed, weights, torch.float32)))
        once = torch.empty(333)
        ErrorFreeSum.mean_at_once(mixed, weights, once)
        assert torch.equal(bits(once), bits(exact(mixed, weights, torch.float32)))


def test_backends_take_turns_on_one_sum() -> None:
    vectors, weights = spread(12, 1000, 60), make_weights("random", 12)
    made = ErrorFreeSum(1000)
    for k, (vector, weight) in enumerate(zip(vectors, weights, strict=True)):
        with using(BACKENDS[k % len(BACKENDS)]):
            made.add([vector], [weight])
    out = torch.empty(1000)
    made.mean(out, math.fsum(weights))
    assert torch.equal(bits(out), bits(exact(vectors, weights, torch.float32)))


@pytest.mark.skipif(not KERNELS, reason="no compiled core")
def test_the_number_of_threads_changes_no_bit() -> None:
    vectors, weights = spread(4, 200_000, 9), make_weights("counts", 4)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(summed(vectors, weights, torch.float32, 2)[0])
        once = torch.empty(200_000)
        ErrorFreeSum.mean_at_once(vectors, weights, once)
        found.append(once)
    assert all(torch.equal(bits(other), bits(found[0])) for other in found[1:])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_bits_of_an_exact_accumulator(name: str) -> None:
    vectors, weights = make_vectors(11, 20_000, torch.float32, 4), make_weights("counts", 11)
    accumulator = Accumulator(20_000, exact=True)
    with using(name):
        for vector, weight in zip(vectors, weights, strict=True):
            accumulator.add(vector, weight)
        assert torch.equal(bits(summed(vectors, weights, torch.float32)[0]), bits(accumulator.mean()))


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to average yet"):
        ErrorFreeSum(3).mean(torch.empty(3), 1.0)


@pytest.mark.skipif(not KERNELS, reason="no compiled core")
def test_the_core_refuses_what_it_cannot_walk() -> None:
    core, row = backend.cpu_core(), torch.zeros(300)
    assert core.error_free_block == BLOCK
    sums = torch.zeros(300, dtype=torch.float64)
    slots, rests = torch.full((2,), -1, dtype=torch.int32), torch.zeros(2 * BLOCK, dtype=torch.float64)
    used = torch.zeros(1, dtype=torch.int64)
    good = [(row,), [1.0], True, sums, None, 1.0, slots, rests, used, 1]
    assert core.error_free_sum(*good) == ([], [])
    for place, value, error, text in (
        (0, (torch.zeros(600)[::2],), TypeError, "unit stride"),
        (0, (row, torch.zeros(299)), ValueError, "differ in dtype, size"),
        (1, [1.0, 2.0], ValueError, "differ in number"),
        (3, None, ValueError, "needs its memory"),
        (3, sums.float(), TypeError, "in float64"),
        (4, torch.zeros(299), TypeError, "of the vectors' size"),
        (6, slots.long(), TypeError, "slots must be int32"),
        (7, rests[:-1], TypeError, "of the vectors' size"),
        (8, used.int(), TypeError, "used int64"),
    ):
        with pytest.raises(error, match=text):
            core.error_free_sum(*good[:place], value, *good[place + 1 :])
