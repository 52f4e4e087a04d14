"""Tests of trimmed_mean and median: every available backend and ISA level against sorting each coordinate in Python."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fedkern.ops import median, trimmed_mean
from python_tests.ops._aggregate.aggregate_cases import CLIENTS, SIZES, close, make_vectors, make_weights
from python_tests.ops.operator_cases import DTYPES, pairwise, thin_out

KINDS = ["none", "equal", "counts", "random", "zeros"]


def in_order(column: list[float], weights: list[float]) -> list[tuple[float, float]]:
    """Return values with their weights, ascending.

    NaN comes last, equal values in their order.
    """
    pairs = list(zip(column, weights, strict=True))
    numbers = sorted((pair for pair in pairs if not math.isnan(pair[0])), key=lambda pair: pair[0])
    return numbers + [pair for pair in pairs if math.isnan(pair[0])]


def trimmed_in_python(column: list[float], weights: list[float], trim: int) -> float:
    kept = in_order(column, weights)[trim : len(column) - trim]
    total = math.fsum(weight for _, weight in kept)
    return math.fsum(weight * value for value, weight in kept if weight) / total if total else math.nan


def median_in_python(column: list[float], weights: list[float]) -> float:
    """Return the weighted median with exact sums of weights, where half of the weight is within 2^-40."""
    ordered = in_order(column, weights)
    half = sum(map(Fraction, weights)) / 2
    below, reached = Fraction(0), []
    for _, weight in ordered:
        below += Fraction(weight)
        reached.append(below)
    little = Fraction(1, 2**40)
    lower = next(k for k, sum_ in enumerate(reached) if sum_ >= half * (1 - little))
    upper = next(k for k, sum_ in enumerate(reached) if sum_ > half * (1 + little))
    lowest, two = ordered[lower][0], ordered[upper][0]
    return lowest if lower == upper else (lowest + two) / 2


def columns(vectors: list[Tensor]) -> list[list[float]]:
    return torch.stack(vectors, 1).double().tolist()


def check(count: int, size: int, dtype: torch.dtype, kind: str, seed: int = 0) -> None:
    vectors = make_vectors(count, size, dtype, seed)
    if size > 3:
        # Ties, signed zeros, infinities and a NaN.
        for vector in vectors[1::2]:
            vector[0] = vectors[0][0]
        vectors[-1][1], vectors[0][1] = -0.0, 0.0
        vectors[0][2], vectors[-1][2] = math.inf, math.nan
    weights = None if kind == "none" else make_weights(kind, count, seed)
    plain = weights or [1.0] * count
    for trim in sorted({0, 1, count // 3, (count - 1) // 2}):
        if 2 * trim >= count:
            continue
        expected = [trimmed_in_python(column, plain, trim) for column in columns(vectors)]
        given = trimmed_mean(vectors, trim, weights)
        assert given.dtype == dtype
        close(given, torch.tensor(expected, dtype=torch.float64))
        assert torch.equal(given.nan_to_num(), trimmed_mean(torch.stack(vectors), trim, weights).nan_to_num())
    expected = [median_in_python(column, plain) for column in columns(vectors)]
    close(median(vectors, weights), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.sampled
@pytest.mark.parametrize("count", [*CLIENTS, 64, 65, 130])
def test_clients(backend: str, count: int) -> None:
    check(count, 130, torch.float32, "none")
    check(count, 70, torch.float32, "random")


def test_pairs(backend: str) -> None:
    axes = {"count": CLIENTS[:6], "size": SIZES[:-2], "dtype": list(DTYPES), "kind": KINDS}
    for seed, case in enumerate(thin_out(pairwise(axes, seed=5))):
        check(**case, seed=seed)


def test_more_than_a_chunk(backend: str) -> None:
    vectors = make_vectors(5, 35_001, torch.float32)
    stacked = torch.stack(vectors)
    assert torch.equal(median(vectors), stacked.median(0).values)
    close(trimmed_mean(vectors, 1), stacked.double().sort(0).values[1:4].mean(0))


def test_no_byte_outside_is_read_into_a_result(backend: str) -> None:
    for size in thin_out(range(1, 70)):
        memory = torch.full((4, size + 2), math.nan)
        inside = memory[:, 1:-1]
        inside.copy_(torch.stack(make_vectors(4, size, torch.float32)))
        assert not median(list(inside)).isnan().any()
        assert not trimmed_mean(inside, 1, [1, 2, 3, 4]).isnan().any()


def test_a_minority_of_nan_or_infinity_has_no_say(backend: str) -> None:
    honest = make_vectors(5, 100, torch.float32)
    for bad in (math.nan, math.inf, -math.inf):
        given = [*honest, torch.full((100,), bad), torch.full((100,), bad)]
        assert median(given).isfinite().all()
        assert median(given, make_weights("equal", 7)).isfinite().all()
        assert trimmed_mean(given, 2).isfinite().all()
        assert trimmed_mean(given, 2, [1.0] * 7).isfinite().all()
    assert median([torch.full((3,), math.nan)] * 3).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_median_of_one_and_of_equal_vectors(backend: str, dtype: torch.dtype) -> None:
    (vector,) = make_vectors(1, 200, dtype)
    for count in (1, 2, 7, 10):
        assert torch.equal(median([vector] * count), vector)
        assert torch.equal(median([vector] * count, make_weights("random", count)), vector)
        assert torch.equal(trimmed_mean([vector] * count, (count - 1) // 2), vector)


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 1e-300, 7e200, 1e-323, 1e306])
def test_equal_weights_give_the_plain_median(backend: str, weight: float) -> None:
    """Ten times 0.1 is not 1 in floating point, but half of the weight must still count as half."""
    for count in (2, 6, 10, 20, 33):
        vectors = make_vectors(count, 40, torch.float64)
        assert torch.equal(median(vectors, [weight] * count), median(vectors))


def test_integer_weights_repeat_a_vector(backend: str) -> None:
    vectors = make_vectors(4, 60, torch.float32)
    repeated = [vectors[k] for k, times in enumerate((3, 1, 0, 4)) for _ in range(times)]
    assert torch.equal(median(vectors, [3, 1, 0, 4]), median(repeated))


def test_ties_are_trimmed_in_the_order_of_the_vectors(backend: str) -> None:
    """The first vector loses a tie for the smallest value, and the last one a tie for the largest."""
    vectors = torch.tensor([[1.0], [1.0], [5.0], [9.0], [9.0]])
    assert trimmed_mean(vectors, 1, [100, 1, 1, 1, 100]).item() == 5.0
    assert trimmed_mean(vectors, 1, [0, 100, 1, 1, 0]).item() == pytest.approx((100 + 5 + 9) / 102)
    assert trimmed_mean(vectors, 2, [1, 1, 0, 1, 1]).isnan().all()
