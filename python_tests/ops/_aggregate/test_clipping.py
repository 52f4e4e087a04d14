"""Tests of clip_by_norm and clip_and_noise: against fp64, and the generator against known answers and its law."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedkern.ops import clip_and_noise, clip_by_norm
from fedkern.ops._aggregate.reference import REFINED as BELOW
from fedkern.ops._aggregate.reference import normal, philox, uniform
from python_tests.ops._aggregate.aggregate_cases import REFINED, REFINED_SEED, close, make_vectors, refined_numbers
from python_tests.ops.operator_cases import DTYPES, KERNELS, thin_out, using

MOST = (1 << 64) - 1


def noise_of(size: int, seed: int, offset: int = 0) -> Tensor:
    """Return the operator's standard normal numbers: noise on zeros, clipped to 1."""
    return clip_and_noise(torch.zeros(size), 1.0, 1.0, seed, offset)


@pytest.mark.parametrize(
    ("counter", "high", "key", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (MOST, MOST, MOST, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_published_words(counter: int, high: int, key: int, words: tuple[int, ...]) -> None:
    """The words are Random123's known answers for Philox4x32-10."""
    signed = counter - (1 << 64) if counter >> 63 else counter
    assert tuple(int(word) for word in philox(torch.tensor([signed]), key, high)) == words


def test_the_transform_of_known_words() -> None:
    """Places 0, 16, 32 and 48 are the four numbers of counter 0."""
    w = [int(word) for word in philox(torch.tensor([0]), 0)]
    given = normal(64, 0, 0)
    for k in (0, 2):
        u = float(torch.tensor(float(w[k]), dtype=torch.float32) + 0.5) / 2**32
        signed = w[k + 1] - (1 << 32) if w[k + 1] >> 31 else w[k + 1]
        angle = math.pi * float(torch.tensor(float(signed), dtype=torch.float32)) / 2**31
        radius = math.sqrt(-2 * math.log(u))
        assert float(given[16 * k]) == pytest.approx(radius * math.cos(angle), abs=1e-6)
        assert float(given[16 * (k + 1)]) == pytest.approx(radius * math.sin(angle), abs=1e-6)


def test_tails_and_the_smallest_numbers(backend: str) -> None:
    """A million numbers, the far ones included, are accurate."""
    expected = normal(1 << 20, 11, 0)
    given = noise_of(1 << 20, 11).double()
    assert float(expected.abs().max()) > 4.5
    assert float((given - expected).abs().max()) < 2e-6


def test_refined_radius_words_in_every_backend(backend: str) -> None:
    """The two numbers of a radius word in the lowest 2^-20 have 32 more bits.

    Their neighbours do not change.
    """
    for place, counter, k in thin_out(REFINED):
        start = place & ~63
        given = noise_of(64, REFINED_SEED, start).double()
        words = philox(torch.arange(16) + (counter & ~15), REFINED_SEED)
        assert [int((words[j] < BELOW).sum()) for j in (0, 2)] == [int(k == 0), int(k == 2)]
        for at, expected in zip((place - start, place - start + 16), refined_numbers(counter, k), strict=True):
            assert float(given[at]) == pytest.approx(expected, rel=1e-6, abs=4e-7)
        unrefined = torch.ones(64, dtype=torch.bool)
        unrefined[[place - start, place - start + 16]] = False
        plain = torch.empty(4, 16, dtype=torch.float64)
        for j in (0, 2):
            radius = (-2 * ((words[j].float() + 0.5) * 2.0**-32).double().log()).sqrt()
            turn = ((words[j + 1] + (1 << 31)) % (1 << 32) - (1 << 31)).float().double() * (math.pi / 2**31)
            plain[j], plain[j + 1] = radius * turn.cos(), radius * turn.sin()
        assert bool(((given - plain.flatten())[unrefined].abs() < 1e-5).all())
        # The same numbers wherever a call begins and ends, and in a vector that starts in the middle of a group.
        assert float(noise_of(1, REFINED_SEED, place)) == float(given[place - start])
        assert torch.equal(noise_of(100, REFINED_SEED, place - 7).double()[7:8], given[place - start][None])


def test_the_tail_follows_the_exact_law_to_nine_deviations() -> None:
    """P(radius > r) is exp(-r^2 / 2): for every r, bisection finds the share of the 2^64 pairs of words."""

    def radius(pair: int) -> float:
        u = uniform(torch.tensor([pair >> 32]), lambda places: torch.tensor([pair & 0xFFFFFFFF]))
        return math.sqrt(-2 * math.log(float(u)))

    for r in (3.0, 5.0, 5.26, 5.27, 5.5, 6.0, 6.7, 6.8, 7.0, 8.0, 9.0):
        low, high = 0, 1 << 64  # the largest number of a pair whose radius is above r
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if radius(middle) > r else (low, middle)
        exact = math.exp(-r * r / 2)
        # Steps of a word, at most 2^-12 of it, where none is refined; then fp32's, and 2^-64.
        rounding = 2.0**-12 * exact if exact > 2.0**-20 else 1e-6 * exact + 2.0**-64
        assert abs(low / 2**64 - exact) < rounding
    assert radius(0) == pytest.approx(math.sqrt(2 * 65 * math.log(2)))
    edge = [radius(pair << 32) for pair in (BELOW - 1, BELOW)]
    assert 0 < edge[0] - edge[1] < 1e-4


@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_refined_numbers_have_the_same_bits_for_every_isa() -> None:
    runs = []
    for name in KERNELS:
        with using(name):
            runs.append(torch.stack([noise_of(200, REFINED_SEED, place - 70) for place, _, _ in REFINED]))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


def test_noise_does_not_depend_on_the_grouping(backend: str) -> None:
    seed, size = 99, 150
    stream = noise_of(4 * size, seed, 1000)
    rows = clip_and_noise(torch.zeros(4, size), 1.0, 1.0, seed, 1000)
    assert torch.equal(rows.flatten(), stream)
    assert torch.equal(torch.cat(clip_and_noise([torch.zeros(size)] * 4, 1.0, 1.0, seed, 1000)), stream)
    for cut in thin_out([1, 15, 16, 63, 64, 65, 129]):
        parts = [noise_of(cut, seed, 1000), noise_of(4 * size - cut, seed, 1000 + cut)]
        assert torch.equal(torch.cat(parts), stream)
    assert torch.equal(noise_of(300, seed, MOST - 99)[100:], noise_of(200, seed, 0))
    assert not torch.equal(noise_of(100, seed), noise_of(100, seed + 1))


@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_same_bits_for_every_isa_and_thread_count() -> None:
    vectors = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(0))
    runs = []
    for name, threads in [(name, 1) for name in KERNELS] + [(KERNELS[-1], 2)]:
        torch.set_num_threads(threads)
        with using(name):
            # The norm is a sum, whose order is the ISA level's; a bound that is not reached leaves it out.
            runs.append(clip_and_noise(vectors, 1e4, 1e-4, 3))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


def test_the_law_is_normal(backend: str) -> None:
    """Moments, Kolmogorov-Smirnov and chi-squared hold at a level of 1e-6 each, and neighbours do not correlate."""
    count = 1 << 19
    numbers = noise_of(count, 2024).double()
    root = math.sqrt(count)
    assert abs(float(numbers.mean())) < 5 / root
    assert abs(float(numbers.var()) - 1) < 5 * math.sqrt(2) / root
    assert abs(float(numbers.pow(3).mean())) < 5 * math.sqrt(15) / root
    assert abs(float(numbers.pow(4).mean()) - 3) < 5 * math.sqrt(96) / root
    uniform = torch.special.ndtr(numbers.sort().values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps - uniform).max(), (uniform - steps + 1 / count).max())
    assert float(distance) < 2.69 / root
    bins = 256
    seen = torch.histc(uniform, bins, 0, 1)
    expected = count / bins
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert abs(statistic - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    # Neighbours, the pair of one transform, words of one counter, groups.
    for lag in (1, 16, 32, 48, 64, 1024):
        assert abs(float((numbers[lag:] * numbers[:-lag]).mean())) < 5 / root
        assert abs(float((numbers[lag:].square() * numbers[:-lag].square()).mean()) - 1) < 5 * math.sqrt(8) / root


def clip_exactly(vector: Tensor, bound: float) -> Tensor:
    norm = float(vector.double().norm())
    return vector.double() * (min(1.0, bound / norm) if norm else 1.0)


def test_clipping(backend: str) -> None:
    cases = [(1, 0), (1, 1), (3, 100), (2, 255), (5, 257), (9, 1271)]
    for dtype, (count, size) in thin_out(list(itertools.product(DTYPES, cases))):
        vectors = make_vectors(count, size, dtype, size)
        for bound in (1e-3, 1.0, 20.0):
            given = clip_by_norm(vectors, bound)
            assert isinstance(given, list)
            for row, vector in zip(given, vectors, strict=True):
                assert row.dtype == dtype
                close(row, clip_exactly(vector, bound))
            stacked = clip_by_norm(torch.stack(vectors), bound)
            assert torch.equal(stacked, torch.stack(given))
            assert torch.equal(stacked, clip_and_noise(torch.stack(vectors), bound, 0.0, 5))
            single = clip_by_norm(vectors[0], bound)
            assert torch.equal(single, given[0])
        assert torch.equal(clip_by_norm(vectors[0], 1e9), vectors[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rounding_lifts_a_norm_above_the_bound(backend: str, dtype: torch.dtype) -> None:
    """The bound holds where every element rounds up, and at lengths that are scaled in one pass or in two."""
    step = 1 + torch.finfo(dtype).eps
    for size, bound in thin_out(list(itertools.product((1, 3, 1000, 20_000), (1.0, 0.3, 7.7)))):
        for vector in (torch.full((size,), 3.0 * step), make_vectors(1, size, torch.float32, size)[0] + 2):
            given = clip_by_norm(vector.to(dtype), bound / math.sqrt(2))
            norm, before = float(given.double().norm()), float(vector.to(dtype).double().norm())
            eps = max(torch.finfo(dtype).eps, 1e-12)
            assert norm <= bound / math.sqrt(2) * (1 + (0 if dtype.itemsize == 2 else 8 * eps))
            assert norm >= min(bound / math.sqrt(2), before) * (1 - 8 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_by_factors_below_the_range_of_fp32(backend: str, dtype: torch.dtype) -> None:
    """The factor is not rounded to a float there, which would raise the norm by up to a half."""
    for size, share in thin_out(list(itertools.product((100, 20_000), (0.99, 0.01, 1e-6)))):
        vector = torch.full((size,), 2e38).to(dtype)
        norm = float(vector.double().norm())
        bound = norm * torch.finfo(torch.float32).tiny * share
        factor = bound / norm * (1 - torch.finfo(dtype).eps / 2 if dtype is torch.bfloat16 else 1)
        for given in (clip_by_norm(vector, bound), *clip_by_norm([vector, -vector], bound)):
            wanted = vector.double() * factor
            torch.testing.assert_close(given.abs().double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
            assert float(given.double().norm()) <= bound * (1 + 1e-6)
        if size == 100:
            noisy = clip_and_noise(vector[None], bound, 0.01, 5, 9)[0]
            expected = vector.double() * (bound / norm) + 0.01 * bound * normal(size, 5, 9)
            torch.testing.assert_close(noisy.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_that_the_dtype_cannot_hold_is_refused(backend: str, dtype: torch.dtype) -> None:
    """The generator's largest number is 9.42: nothing is infinite up to the largest noise that is accepted."""
    limit, zeros = torch.finfo(dtype).max / 9.5, torch.zeros(1, 2000, dtype=dtype)
    for given in (zeros, zeros[0], [zeros[0]] * 2):
        for bound, noise in ((1.0, limit), (limit, 1.0), (limit / 10, 10.0)):
            taken = clip_and_noise(given, bound * 0.999, noise, 3)
            assert all(row.isfinite().all() for row in (taken if isinstance(taken, list) else [taken]))
            for factor in (1.01, 9.0):
                with pytest.raises(ValueError, match=f"noise times max_norm must be at most .* for vectors of {dtype}"):
                    clip_and_noise(given, bound, noise * factor, 3)
    assert clip_and_noise(zeros, 1e300, 0.0, 3).isfinite().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e200, 1e300])
def test_clipping_numbers_whose_squares_leave_fp64(backend: str, scale: float) -> None:
    for size in thin_out([1, 5, 3000, 17_000]):
        vector = (make_vectors(1, size, torch.float64, size)[0] + 1) * scale
        direction = vector / scale / (vector / scale).norm()
        for bound in (scale / 1e3, 1e-3 if scale > 1 else 1e-306):
            given = clip_by_norm([vector, vector / 2], bound)
            for row in given:
                torch.testing.assert_close(row / bound, direction, rtol=1e-9, atol=1e-12)
        assert torch.equal(clip_by_norm(vector, 1e308 if scale > 1 else 1.0), vector)
    assert clip_by_norm(torch.tensor([math.inf, 1e200], dtype=torch.float64), 1.0).isnan().tolist() == [True, False]


@pytest.mark.parametrize("size", [5, 20_000])
@pytest.mark.parametrize("stacked", [False, True])
def test_rows_of_a_list_have_memory_of_their_own(backend: str, size: int, stacked: bool) -> None:
    vectors = make_vectors(3, size, torch.float32)
    given = clip_and_noise(torch.stack(vectors) if stacked else vectors, 1.0, 0.5, seed=3, offset=(1 << 64) - size)
    assert torch.equal(torch.stack(list(given)), clip_and_noise(torch.stack(vectors), 1.0, 0.5, 3, (1 << 64) - size))
    if not stacked:
        assert all(row.untyped_storage().nbytes() == row.nbytes for row in given)


def test_zero_nan_and_infinity(backend: str) -> None:
    vectors = torch.ones(4, 30)
    vectors[0] = 0
    vectors[1, 3], vectors[2, 4] = math.nan, math.inf
    given = clip_by_norm(vectors, 1.0)
    assert torch.equal(given[0], vectors[0])
    assert given[1].isnan().all()
    assert given[2].isnan().tolist() == [k == 4 for k in range(30)]
    assert not given[2].nan_to_num().any()
    assert float(given[3].norm()) == pytest.approx(1.0)
    large = torch.full((1, 64), 1e30)
    assert float(clip_by_norm(large, 1.0).norm()) == pytest.approx(1.0)
    assert torch.equal(clip_by_norm(large * 1e-60, 1.0), large * 1e-60)
