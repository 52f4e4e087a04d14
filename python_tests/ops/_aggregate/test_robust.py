"""Tests of trimmed_mean, median, pairwise_distances, krum and geometric_median: every backend and ISA level."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fedkern.ops import geometric_median, krum, median, pairwise_distances, trimmed_mean, weighted_mean
from fedkern.ops._aggregate import distances as aggregate_distances
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


# -- distances ---------------------------------------------------------------------------------------------------------


def distances_in_python(vectors: list[Tensor]) -> Tensor:
    rows = [vector.double().tolist() for vector in vectors]
    return torch.tensor([[math.dist(a, b) for b in rows] for a in rows], dtype=torch.float64)


def test_distances(backend: str) -> None:
    axes = {"count": [1, 2, 3, 4, 5, 9, 13], "size": [0, 1, 7, 100, 511, 513, 1100], "dtype": list(DTYPES)}
    for seed, case in enumerate(thin_out(pairwise(axes, seed=1))):
        vectors = make_vectors(**case, seed=seed)
        given = pairwise_distances(vectors)
        assert given.dtype == torch.float64
        torch.testing.assert_close(given, distances_in_python(vectors), rtol=1e-12, atol=0)
        assert torch.equal(given, given.t())
        assert not given.diagonal().any()
        assert torch.equal(pairwise_distances(torch.stack(vectors)), given)


def test_distances_of_long_vectors(backend: str) -> None:
    vectors = make_vectors(3, 70_001, torch.float32)
    wide = torch.stack(vectors).double()
    expected = torch.stack([(wide - row).norm(dim=1) for row in wide])
    torch.testing.assert_close(pairwise_distances(vectors), expected, rtol=1e-12, atol=0)


def test_near_equal_vectors(backend: str) -> None:
    """The vectors differ in one last bit at a length of 1e4, so squares of norms would differ in no digit."""
    vector = make_vectors(1, 1000, torch.float32)[0] * 300
    raised, third = vector.clone(), vector.clone()
    raised[7] = torch.nextafter(vector[7], torch.tensor(math.inf))
    third[11] = torch.nextafter(vector[11], torch.tensor(-math.inf))
    given = pairwise_distances([vector, raised, third, vector.clone()])
    step, two = float((raised - vector).double()[7]), float((vector - third).double()[11])
    assert given[0].tolist() == pytest.approx([0.0, step, two, 0.0], rel=1e-12, abs=0)
    assert float(given[1, 2]) == pytest.approx(math.hypot(step, two), rel=1e-12)


def test_distances_neither_overflow_nor_vanish(backend: str) -> None:
    for scale in (1e30, 1e-30):
        vectors = [vector * scale for vector in make_vectors(3, 50, torch.float32)]
        torch.testing.assert_close(pairwise_distances(vectors), distances_in_python(vectors), rtol=1e-12, atol=0)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_infinity_in_all_vectors_keeps_none_apart(backend: str, dtype: torch.dtype, sign: int) -> None:
    """A causal mask among the buffers changes no result."""
    for size in (5, 300, 1100):
        finite = make_vectors(7, size, dtype, size)
        finite[0] = finite[0] * 100
        mask = torch.full((size // 2,), sign * math.inf).to(dtype)
        masked = [torch.cat([vector[:3], mask, vector[3:]]) for vector in finite]
        kept = torch.cat([torch.arange(3), torch.arange(size // 2 + 3, size // 2 + size)])
        expected = pairwise_distances(finite)
        torch.testing.assert_close(pairwise_distances(masked), expected, rtol=1e-12, atol=0)
        for rule in (lambda x: krum(x, 2), lambda x: krum(x, 1, 3), geometric_median):
            given = rule(masked)
            torch.testing.assert_close(given[kept], rule(finite))
            assert torch.equal(given[3 : 3 + size // 2], mask)


def test_krum_refuses_where_no_score_is_finite(backend: str) -> None:
    vectors = make_vectors(6, 9, torch.float32)
    for m, vector in enumerate(vectors[1:]):
        vector[m] = math.nan if m % 2 else math.inf
    for keep in (1, 2):
        with pytest.raises(ValueError, match=rf"vectors must have {keep} finite scores? .* but 0 of 6 are"):
            krum(vectors, 1, keep)


def median_in_fp64(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """Compute the geometric median by plain Weiszfeld iterations from the median of every coordinate."""
    wide, given = torch.stack(vectors).double(), torch.tensor(weights, dtype=torch.float64)
    point = wide.median(0).values
    for _ in range(1000):
        pulls = given / (wide - point).norm(dim=1).clamp_min(1e-6)
        point = pulls @ wide / pulls.sum()
    return point


@pytest.mark.sampled(2)
@pytest.mark.parametrize("limit", [0, 128], ids=["iterated", "from distances"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_minority_moves_the_geometric_median_far(backend, limit, dtype, monkeypatch):
    monkeypatch.setattr(aggregate_distances, "MAX_FROM_DISTANCES", limit)
    cases = itertools.product(((4, 1), (10, 1), (10, 4), (21, 9)), (1e3, 6e4, 3e6, 1e9, 1e12, 1e30))
    for (count, attackers), far in thin_out([case for case in cases if dtype != torch.float16 or case[1] < 6.5e4]):
        vectors, weights = make_vectors(count, 40, torch.float32, count), make_weights("counts", count)
        for m in range(attackers):
            vectors[m] = torch.full((40,), far * (-1) ** (m % 3)) + vectors[m]
            weights[m] = 0.8 * sum(weights[attackers:]) / attackers
        vectors = [vector.to(dtype) for vector in vectors]
        expected = median_in_fp64(vectors, weights)
        given = geometric_median(vectors, weights).double()
        bound = 1e-5 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
        assert float((given - expected).norm()) <= bound * float(expected.norm()), (count, attackers, far)


@pytest.mark.parametrize("far", [1e12, 1e30])
def test_geometric_median_of_few_weights_and_equal_vectors(backend: str, far: float) -> None:
    vectors = make_vectors(2, 20, torch.float64)
    attack = torch.full((20,), far, dtype=torch.float64)
    torch.testing.assert_close(geometric_median([vectors[0], attack], [0.6, 0.4]), vectors[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(geometric_median([attack] + [vectors[0]] * 9), vectors[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("count", "exponents"), [(3, (1020, 60, -1060)), (130, (1014, 60, -1060))])
def test_geometric_median_of_weights_of_any_scale(backend: str, count: int, exponents: tuple[int, ...]) -> None:
    vectors, weights = make_vectors(count, 20, torch.float32), [float(1 + k % 3) for k in range(count)]
    wanted = geometric_median(vectors, weights)
    assert not wanted.isnan().any()
    for exponent in exponents:
        scaled = [math.ldexp(weight, exponent) for weight in weights]
        assert torch.equal(geometric_median(vectors, scaled), wanted)
        assert torch.equal(geometric_median(vectors, torch.tensor(scaled, dtype=torch.float64)), wanted)


@pytest.mark.parametrize("count", [1, 3, 130])
def test_geometric_median_of_one_vector_is_that_vector(backend: str, count: int) -> None:
    vectors = make_vectors(count, 20, torch.float32)
    vectors[-1][:2] = torch.tensor([math.nan, math.inf])
    given = geometric_median(vectors, [0.0] * (count - 1) + [2.0])
    assert torch.equal(given[1:], vectors[-1][1:])
    assert bool(given[0].isnan())


def krum_in_python(vectors: list[Tensor], byzantine: int, keep: int) -> list[int]:
    squared = distances_in_python(vectors).square().nan_to_num(math.inf).tolist()
    count = len(vectors)
    scores = []
    for m in range(count):
        distances = sorted(squared[m][k] for k in range(count) if k != m)
        scores.append(math.fsum(distances[: count - byzantine - 2]))
    return sorted(range(count), key=lambda m: scores[m])[:keep]


def test_krum(backend: str) -> None:
    for seed, (count, byzantine) in enumerate(thin_out([(3, 0), (5, 1), (7, 2), (10, 3), (11, 0), (20, 8)])):
        for keep in (1, 2, count - byzantine):
            vectors = make_vectors(count, 40, torch.float32, seed)
            chosen = krum_in_python(vectors, byzantine, keep)
            given = krum(vectors, byzantine, keep)
            if keep == 1:
                assert torch.equal(given, vectors[chosen[0]])
            else:
                wanted = weighted_mean([vectors[m] for m in sorted(chosen)], [1.0] * keep)
                assert torch.equal(given, wanted)


def test_krum_does_not_choose_attackers(backend: str) -> None:
    honest = [1 + 0.01 * vector for vector in make_vectors(6, 50, torch.float32)]
    for bad in (torch.full((50,), math.nan), torch.full((50,), math.inf), torch.full((50,), -1e3), -honest[0]):
        given = [bad, *honest, bad.clone()]
        assert any(torch.equal(krum(given, 2), vector) for vector in honest)
        assert float((krum(given, 2, 6) - 1).abs().max()) < 0.1
    assert torch.equal(krum([honest[0]] * 3, 0), honest[0])


def test_krum_reads_no_score_on_the_host_of_a_gpu() -> None:
    """Reading a value of a meta tensor is an error."""
    assert aggregate_distances._shares(torch.empty(5, dtype=torch.float64, device="meta"), 2).shape == (5,)
    scores = torch.tensor([2.0, 1.0, math.inf, 1.0])
    assert aggregate_distances._shares(scores, 2).tolist() == [0.0, 1.0, 0.0, 1.0]
    assert aggregate_distances._shares(scores, 4).isnan().all()


def objective(vectors: list[Tensor], weights: list[float], point: Tensor) -> float:
    pairs = zip(vectors, weights, strict=True)
    return math.fsum(weight * float((vector.double() - point.double()).norm()) for vector, weight in pairs if weight)


@pytest.mark.parametrize("kind", ["equal", "random", "zeros", "tiny"])
def test_geometric_median_is_the_least_sum_of_distances(backend: str, kind: str) -> None:
    vectors = make_vectors(8, 60, torch.float64, 3)
    weights = make_weights(kind, 8)
    point = geometric_median(vectors, weights, iterations=2000, tolerance=0)
    total = objective(vectors, weights, point)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-1, 1e-3):
        for _ in range(10):
            moved = point + scale * torch.randn(60, generator=generator, dtype=torch.float64)
            assert objective(vectors, weights, moved) > total
    # Where it is smooth, the pulls cancel.
    pulls = [w * (v - point) / (v - point).norm() for v, w in zip(vectors, weights, strict=True)]
    assert float(torch.stack(pulls).sum(0).norm()) < 1e-5 * sum(weights)


@pytest.mark.parametrize("limit", [0, 128], ids=["iterated", "from distances"])
def test_geometric_median_against_weiszfeld(backend: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways take the same steps, however many."""
    monkeypatch.setattr(aggregate_distances, "MAX_FROM_DISTANCES", limit)
    for dtype, iterations in thin_out(list(itertools.product(DTYPES, (0, 1, 4, 30)))):
        vectors = make_vectors(9, 200, dtype, 5)
        weights = make_weights("zeros", 9)
        point = torch.stack(vectors).double()
        shares = torch.tensor(weights, dtype=torch.float64)
        step = (shares @ point) / shares.sum()
        for _ in range(iterations):
            pulls = shares / (point - step).norm(dim=1).clamp_min(1e-6)
            step = (pulls @ point) / pulls.sum()
        close(geometric_median(vectors, weights, iterations=iterations, tolerance=0), step)


def test_geometric_median_counts_nan_but_of_weight_zero(backend: str) -> None:
    honest = make_vectors(7, 30, torch.float32)
    honest[0][0] = math.nan
    assert geometric_median(honest).isnan().any()
    assert geometric_median(honest, [0, 1, 1, 1, 1, 1, 1]).isfinite().all()
