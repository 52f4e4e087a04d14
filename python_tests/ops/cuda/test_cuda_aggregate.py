"""Tests of the aggregate kernels on CUDA against plain PyTorch in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.distances import _scores, _shares
from fedkern.ops._aggregate.kernels import AggregateKernels
from fedkern.ops._aggregate.plain import PLAIN
from fedkern.ops._aggregate.reference import normal
from fedkern.ops._aggregate.rules import RULES, ServerCall, ServerRule
from fedkern.ops._core import backend
from python_tests.ops._aggregate.aggregate_cases import REFINED, REFINED_SEED, accumulate, refined_numbers
from python_tests.ops.operator_cases import DTYPES, assert_close


@pytest.fixture
def kernels(device: torch.device) -> AggregateKernels:
    """Return the kernels of the device's backend."""
    return backend.select("aggregate", torch.empty(0, device=device))


def close(label: str, got: Tensor, expected: Tensor, **tolerances: float) -> None:
    assert_close(label, got.cpu(), expected.cpu().double(), **{"relative": 1e-6, "absolute": 1e-7, **tolerances})


def special_rows(count: int, size: int, dtype: torch.dtype, largest: float) -> Tensor:
    """Return rows with ties, NaN and infinities of both signs, both zeros and the smallest number."""
    generator = torch.Generator().manual_seed(count)
    info = torch.finfo(dtype)
    values = torch.tensor([torch.nan, torch.inf, 0.0, info.smallest_normal * info.eps, largest], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    values = torch.cat([values, (values.view(bits) ^ torch.iinfo(bits).min).view(dtype)])  # of negative sign, NaN too
    rows = torch.randn(count, size, generator=generator).to(dtype)
    chosen = torch.randint(0, len(values), rows.shape, generator=generator)
    rare = torch.rand(rows.shape, generator=generator) < torch.linspace(0, 1, size)
    return torch.where(rare, values[chosen], rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_medians_and_trimmed_means_of_every_count(device, kernels, dtype):
    """Some counts have kernels of their own.

    Two coordinates in 16 bits are sorted at a time, wherever they lie.
    """
    for count in range(1, 65):
        size = 37 + count % 2
        spread = [torch.zeros(2 * size + 2, dtype=dtype, device=device) for _ in range(count)]
        aligned, odd, strided = (
            [x[begin:][: step * size : step] for x in spread] for begin, step in ((0, 1), (1, 1), (0, 2))
        )
        trim = (count - 1) // 3
        cases = ((count - 1) // 2, count // 2 + 1, torch.finfo(dtype).max), (trim, count - trim, 3.0)
        for low, high, largest in cases:
            rows = special_rows(count, size, dtype, largest)
            wide = rows.double()
            expected = PLAIN.sorted_mean(wide, low, high, None)
            found = []
            for vectors in (aligned, odd, strided):
                for vector, row in zip(vectors, rows, strict=True):
                    vector.copy_(row)
                found.append(kernels.sorted_mean(vectors, low, high, None).cpu())
            close(f"{low} to {high} of {count}", found[0], expected)
            if high - low == 1:
                assert torch.equal(found[0].double().nan_to_num(7.0), expected.nan_to_num(7.0))
                assert not (found[0] == 0)[found[0].signbit()].any()
            for result in found[1:]:
                assert torch.equal(result.nan_to_num(7.0), found[0].nan_to_num(7.0))
        weights = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
        if dtype is torch.float64:
            with pytest.raises(RuntimeError, match="no kernel for a weighted trimmed mean or median"):
                kernels.sorted_mean(rows.to(device), trim, count - trim, weights)
            continue
        got = kernels.sorted_mean(rows.to(device), trim, count - trim, weights)
        close(f"weighted, of {count}", got, PLAIN.sorted_mean(wide, trim, count - trim, weights))
        got = kernels.weighted_median(rows.to(device), weights)
        close(f"weighted median of {count}", got, PLAIN.weighted_median(wide, weights))


@pytest.mark.parametrize("count", [4, 5, 10, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_server_step_of_full_tiles(device, kernels, dtype, count):
    """Some tiles have infinities in all models.

    Addresses are aligned and odd.
    """
    rows = torch.randn(count + 1, 4099, generator=torch.Generator().manual_seed(count)).to(dtype)
    rows[:, 1500:1600] = -torch.inf
    odd = torch.zeros(count + 1, 4101, dtype=dtype, device=device)[:, 1:4100].copy_(rows)
    weights = [float(m % 3) + (m == 1) for m in range(count)]
    rule = ServerRule(RULES.index("adam"), 0.1, 0.9, 0.99, 1e-3)
    for models in (rows.to(device), odd):
        ours, theirs = ([torch.zeros(4099, dtype=torch.float64) for _ in range(2)] for _ in range(2))
        moments = [state.to(device) for state in ours]
        got = kernels.server_step(ServerCall(models[0], list(models[1:]), weights, rule, *moments))
        wide = rows.double()
        expected = PLAIN.server_step(ServerCall(wide[0], list(wide[1:]), weights, rule, *theirs))
        for result, wanted in zip((*got, *moments), (*expected, *theirs), strict=True):
            close("step", result, wanted)


def test_weights_of_sum_zero_give_nan(device: torch.device, kernels: AggregateKernels) -> None:
    vectors, nothing = torch.randn(3, 9, device=device), torch.zeros(3, dtype=torch.float64, device=device)
    assert kernels.weighted_mean(vectors, nothing, None).isnan().all()
    assert kernels.weighted_median(vectors, nothing).isnan().all()
    assert kernels.sorted_mean(vectors, 1, 2, nothing).isnan().all()


@pytest.mark.parametrize("stacked", [False, True])
def test_more_vectors_than_one_launch_takes(device: torch.device, kernels: AggregateKernels, stacked: bool) -> None:
    rows = torch.randn(300, 137, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1)).double()
    vectors = rows.to(device) if stacked else [row.to(device) for row in rows]
    expected = PLAIN.weighted_mean(rows, weights.tolist(), None)
    assert torch.equal(kernels.weighted_mean(vectors, weights.tolist(), None).cpu(), expected)
    assert torch.equal(kernels.weighted_mean(vectors, weights.to(device), None).cpu(), expected)
    close("norms", kernels.squared_norms(vectors), PLAIN.squared_norms(rows), relative=1e-12)
    factors = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = kernels.scale_and_noise(vectors, factors.to(device), 0.5, 3, 4)
    close("noise", got, PLAIN.scale_and_noise(rows.double(), factors, 0.5, 3, 4), absolute=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 64, 1000, 1025])
@pytest.mark.parametrize("offset", [0, 1, 63, 2**64 - 100])
def test_noise(device: torch.device, kernels: AggregateKernels, dtype: torch.dtype, size: int, offset: int) -> None:
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    factors = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)
    seed = 2**64 - 5 - size
    got = kernels.scale_and_noise(rows.to(device), factors.to(device), 1.5, seed, offset)
    assert got.dtype == dtype
    # logarithm, sine and cosine are taken in fp32, of numbers up to 9.5
    close("noise", got, PLAIN.scale_and_noise(rows.double(), factors, 1.5, seed, offset), absolute=5e-6, slack=5e-6)
    clipped = kernels.scale_and_noise(rows.to(device), factors.to(device), 0.0, seed, offset)
    close("clipped", clipped, factors[:, None] * rows.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 7), (2, 5003), (2, 8192), (130, 9)])
def test_clipping_a_list(device, kernels, dtype, count, size):
    """The bits are a stack's, wherever the vectors lie, each in memory of its own.

    A launch takes up to 128.
    """
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    rows[0, 0] = -0.0
    factors = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for deviation in (0.0, 0.5):
        expected = kernels.scale_and_noise(rows.to(device), factors.to(device), deviation, 3, 4).cpu()
        if not deviation and dtype.itemsize > 2:
            assert torch.equal(expected, (rows.double() * factors[:, None]).to(dtype))
        exactly = PLAIN.scale_and_noise(rows.double(), factors, deviation, 3, 4)
        close("clipped", expected, exactly, slack=5e-6 if deviation else 0.0)
        for begin, step in ((0, 1), (1, 1), (0, 2)):
            spread = [torch.zeros(2 * size + 2, dtype=dtype, device=device) for _ in range(count)]
            vectors = [x[begin:][: step * size : step].copy_(row) for x, row in zip(spread, rows, strict=True)]
            found = kernels.scale_each(vectors, factors.to(device), deviation, 3, 4)
            assert torch.equal(torch.stack(found).cpu(), expected)
            assert len({x.untyped_storage().data_ptr() for x in found}) == count
            assert all(x.untyped_storage().nbytes() == size * dtype.itemsize for x in found)


def test_a_list_is_clipped_by_one_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [torch.full((20_000,), float(m + 1), device=device) for m in range(5)]
    calls = []
    call = AggregateKernels._call

    def count_call(kernel: AggregateKernels, function: Any, *arguments: Any) -> None:
        calls.append(function)
        call(kernel, function, *arguments)

    monkeypatch.setattr(AggregateKernels, "_call", count_call)
    found = ops.clip_by_norm(vectors, 20_000**0.5 * 3)
    assert [round(float(x[0]), 4) for x in found] == [1, 2, 3, 3, 3]
    assert len(calls) == 2  # the norms, and the scaling


def test_noise_is_one_stream(device: torch.device, kernels: AggregateKernels) -> None:
    zeros, factors = torch.zeros(2, 500, device=device), torch.ones(2, dtype=torch.float64, device=device)
    stream = kernels.scale_and_noise(zeros, factors, 1.0, 11, 7).flatten()
    part = kernels.scale_and_noise(zeros[:1, :300], factors[:1], 1.0, 11, 207).flatten()
    assert torch.equal(stream[200:500], part)
    assert (stream.cpu().double() - normal(1000, 11, 7)).abs().max() < 5e-6


@pytest.mark.parametrize(("place", "counter", "word"), REFINED)
def test_refined_radius_words(device, kernels, place, counter, word):
    """Words in the lowest 2^-20 have 32 more bits.

    The second number of the pair is 16 places on.
    """
    zeros, factors = torch.zeros(1, 100, device=device), torch.ones(1, dtype=torch.float64, device=device)
    got = kernels.scale_and_noise(zeros, factors, 1.0, REFINED_SEED, place - 70).flatten().cpu().double()
    expected = torch.tensor(refined_numbers(counter, word), dtype=torch.float64)
    assert (got[[70, 86]] - expected).abs().max() < 5e-6
    assert (got - normal(100, REFINED_SEED, place - 70)).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulators(device: torch.device, dtype: torch.dtype) -> None:
    vectors = [torch.randn(333, generator=torch.Generator().manual_seed(m)).to(dtype) for m in range(9)]
    vectors.append(torch.randn(999, generator=torch.Generator().manual_seed(9)).to(dtype)[::3])
    weights = [0.5, 3.0, 1e-3, 7.0, 0.1, 2.0, 1e5, 1.0, 0.0, 4.0]
    expected = PLAIN.weighted_mean(vectors, weights, None)
    running = ops.Accumulator(333, device=device)
    exact, reversed_ = (ops.Accumulator(333, exact=True, device=device) for _ in range(2))
    pairs = list(zip(vectors, weights, strict=True))
    for vector, weight in pairs:
        running.add(vector.to(device), weight)
        exact.add(vector.to(device), weight)
    for vector, weight in reversed(pairs):
        reversed_.add(vector.to(device), weight)
    assert torch.equal(running.mean().cpu(), expected)
    with ops.use_backend("reference"):
        exactly = accumulate(vectors, weights).mean()
    assert torch.equal(exact.mean().cpu(), exactly)
    assert torch.equal(reversed_.mean(), exact.mean())
    special = ops.Accumulator(4, exact=True, device=device)
    for value in (torch.inf, -torch.inf, torch.nan, 1e-300):
        special.add(torch.tensor([value, torch.inf, 1.0, value], dtype=torch.float64, device=device), 1.0)
    assert special.mean().cpu().isnan().tolist() == [True, False, False, True]


def test_no_elements_of_more_vectors_than_one_launch_takes(device: torch.device) -> None:
    assert ops.weighted_mean(torch.empty(200, 0, device=device), [1.0] * 200).shape == (0,)


@pytest.mark.parametrize("case", ["plain", "far", "very far", "unused", "nan", "equal"])
@pytest.mark.parametrize("count", [2, 7, 10, 33])
def test_geometric_median(device: torch.device, count: int, case: str) -> None:
    """Vectors are also "very far", so that they are drawn in before their products are taken."""
    rows = torch.randn(count, 203, generator=torch.Generator().manual_seed(count))
    weights = [float(m % 3 + 1) for m in range(count)]
    if "far" in case and count > 2:
        rows[0] *= 1e6 if case == "far" else 1e12
    if case == "unused":
        rows[1], weights[1] = torch.nan, 0.0
    if case == "nan":
        rows[0, 3] = torch.nan
    if case == "equal":
        rows[:] = rows[0]
        rows[:, 0] = -torch.inf
    got = ops.geometric_median(rows.to(device), weights).cpu()
    with ops.use_backend("reference"):
        torch.testing.assert_close(got, ops.geometric_median(rows, weights), equal_nan=True, rtol=1e-5, atol=1e-5)


def special(rows: Tensor, kind: str) -> Tensor:
    """Return rows with NaN in one vector, an infinity in all (a causal mask), or infinities in one and in two."""
    rows = rows.clone()
    if kind == "nan":
        rows[1, -1] = torch.nan
    if kind == "mask":
        rows[:, 3::5] = -torch.inf
    if kind == "infinities":
        rows[2, 2] = torch.inf
        rows[::3, -2] = torch.inf
    return rows


COUNTS = [(1, 2, 3, 5, 6, 9, 10, 11, 15, 20, 64), pytest.param(range(1, 65), marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("counts", COUNTS, ids=["some", "all"])
@pytest.mark.parametrize("kind", ["plain", "nan", "mask", "infinities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_distances(device, kernels, dtype, kind, counts):
    """The vectors lie side by side, at odd addresses and with other strides."""
    all_rows = special(torch.randn(64, 607, generator=torch.Generator().manual_seed(5)).to(dtype), kind)
    longer = torch.zeros(64, 609, dtype=dtype, device=device)
    odd = longer[:, 1:608].copy_(all_rows)
    spread = torch.zeros(64, 2 * 607, dtype=dtype, device=device)[:, ::2].copy_(all_rows)
    expected = PLAIN.squared_distances(all_rows.double())
    for count in counts:
        vectors = (all_rows[:count].to(device), list(odd[:count]), spread[:count])[count % 3]
        got = kernels.squared_distances(vectors).cpu()
        torch.testing.assert_close(got, expected[:count, :count], rtol=1e-12, atol=0, equal_nan=True)
        assert torch.equal(got.nan_to_num(7.0), got.t().nan_to_num(7.0))
    torch.testing.assert_close(kernels.distances(vectors).cpu(), got.sqrt(), rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("counts", COUNTS, ids=["some", "all"])
@pytest.mark.parametrize("kind", ["plain", "nan", "infinities", "equal"])
def test_krum_shares(device: torch.device, kernels: AggregateKernels, kind: str, counts: Sequence[int]) -> None:
    all_rows = torch.randn(64, 9, generator=torch.Generator().manual_seed(6)).bfloat16().float()
    for count in counts:
        if count < 3:
            continue
        rows = special(all_rows[:count], kind)
        if kind == "equal":
            rows[1::2] = rows[1].clone()
        for byzantine, keep in ((0, 1), ((count - 3) // 2, count - (count - 3) // 2), ((count - 3) // 3, 2)):
            expected = _shares(_scores(PLAIN.squared_distances(rows), byzantine), keep)
            got = kernels.krum_shares(rows.to(device), byzantine, keep)
            assert torch.equal(got.cpu().nan_to_num(7.0), expected.nan_to_num(7.0)), (count, byzantine, keep)


def test_krum_of_too_few_finite_scores_is_nan(device: torch.device) -> None:
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(7))
    for m in range(5):
        rows[m, m] = torch.inf
    assert ops.krum(rows.to(device), 1, 2).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_of_weight_zero_on_the_device_adds_nothing(device, kernels, dtype):
    rows = torch.randn(7, 101, generator=torch.Generator().manual_seed(8)).to(dtype)
    rows[[0, 4, 6]] = torch.nan
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 0.0, 3.0, 0.0], dtype=torch.float64)
    expected = PLAIN.weighted_mean(rows, weights.tolist(), None)
    assert torch.equal(kernels.weighted_mean(rows.to(device), weights.to(device), None).cpu(), expected)
