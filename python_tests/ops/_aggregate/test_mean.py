"""Tests of weighted_mean and Accumulator on every backend and ISA level, and of properties for any numbers."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fedkern import ops
from fedkern.ops import geometric_median, median, server_step, trimmed_mean, weighted_mean
from fedkern.ops._aggregate.reference import weighted_mean_reference
from python_tests.ops._aggregate.aggregate_cases import (
    CLIENTS,
    SIZES,
    WEIGHTS,
    accumulate,
    close,
    exact_mean,
    make_vectors,
    make_weights,
)
from python_tests.ops.operator_cases import BACKENDS, DTYPES, KERNELS, pairwise, thin_out, using

pytestmark = pytest.mark.usefixtures("one_thread")


def check(name: str, count: int, size: int, dtype: torch.dtype, kind: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]
    weights = make_weights(kind, count, seed)
    exact = exact_mean(vectors, weights)
    with using(name):
        mean = weighted_mean(vectors, weights)
        stacked = weighted_mean(torch.stack(vectors), torch.tensor(weights, dtype=torch.float64))
        columns = weighted_mean(torch.stack(vectors, 1).t(), weights)
        if kind == "subnormal":
            weights = [weight * 2.0**1000 for weight in weights]
        running, unordered = (accumulate(vectors, weights, in_any_order) for in_any_order in (False, True))
        assert mean.dtype == dtype
        close(mean, exact)
        assert torch.equal(mean, stacked)
        assert torch.equal(mean, columns)
        assert torch.equal(mean, running.mean())
        close(unordered.mean(), exact)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("count", [2, 23])
def test_more_than_a_block(name: str, count: int) -> None:
    check(name, count, 70001, torch.float32, "random")


@pytest.mark.parametrize("name", BACKENDS)
def test_pairs(name: str) -> None:
    axes = {"count": CLIENTS, "size": SIZES, "dtype": list(DTYPES), "kind": WEIGHTS}
    for seed, case in enumerate(thin_out(pairwise(axes, seed=3))):
        check(name, **case, seed=seed)


def by_weights(vectors: Tensor, weights: Any) -> Tensor:
    """Return the gradient by the weights times their sum, which is in range."""
    leaf = torch.as_tensor(weights, dtype=torch.float64).requires_grad_()
    return torch.autograd.grad((weighted_mean(vectors, leaf) * 1e-300).sum(), leaf)[0] * leaf.detach().sum()


WEIGHED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "weighted_mean": weighted_mean,
    "of a list": lambda v, w: weighted_mean(list(v), w),
    "gradient": lambda v, w: torch.func.grad(lambda x: weighted_mean(x, w).square().sum())(v),
    "by weights": by_weights,
    "trimmed_mean": lambda v, w: trimmed_mean(v, 1, w),
    "median": median,
    "geometric_median": geometric_median,
    "server_step": lambda v, w: torch.cat([x.double() for x in server_step(v[0], v, w)]),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "weights", [[1.0, 1.0, 0.0, 2.0, 1.0], [2e3, 6e3, 0.0, 4e3, 1417.0], [0.0, 1.0, 0.0, 0.0, 0.0]]
)
def test_subnormal_weights_count_as_their_multiples(name: str, weights: list[float]) -> None:
    vectors = make_vectors(1, 165, torch.float64)[0].view(5, 33)
    forward = {"forward mode": lambda v, w: torch.func.jvp(lambda x: weighted_mean(x, w), (v,), (v,))[1]}
    with using(name):
        for call in {**WEIGHED, **(forward if name == "reference" else {})}.values():
            for form in (list, functools.partial(torch.tensor, dtype=torch.float64)):
                small, usual = (call(vectors, form([w * unit for w in weights])) for unit in (5e-324, 2.0**-74))
                torch.testing.assert_close(small, usual, rtol=0, atol=0, equal_nan=True)
        for exact in (False, True):
            with pytest.raises(ValueError, match="weight must not be subnormal"):
                accumulate(vectors, [5e-324] * 5, exact)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_equal_vectors_is_that_vector(name: str, dtype: torch.dtype) -> None:
    vector = (torch.randn(3000) * 10.0 ** torch.randint(-6, 4, (3000,))).to(dtype)
    with using(name):
        for count, kind in itertools.product((1, 3, 10, 33), ("equal", "counts", "random")):
            weights = make_weights(kind, count, count)
            assert torch.equal(weighted_mean([vector] * count, weights), vector)
            for exact in (False, True):
                assert torch.equal(accumulate([vector] * count, weights, exact).mean(), vector)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)])
def test_a_mean_half_way_between_two_numbers_is_rounded_to_the_even_one(name, dtype, bits):
    # Of ten vectors of like magnitude that is every tenth element; a product with the reciprocal misses some of them.
    integers = torch.randint(2 ** (bits - 1), 2**bits, (10, 4099), generator=torch.Generator().manual_seed(0))
    assert (integers.sum(0) % 10 == 5).sum() > 300
    vectors, weights = list(integers.to(dtype)), [120.0] * 10
    exact = (integers.sum(0).double() / 10).to(dtype)
    with using(name):
        for in_any_order in (False, True):
            assert torch.equal(accumulate(vectors, weights, in_any_order).mean(), exact)
        assert torch.equal(weighted_mean(vectors, weights), exact)
        assert torch.equal(weighted_mean(torch.stack(vectors), weights), exact)
        assert torch.equal(server_step(torch.zeros_like(exact), vectors, weights).model, exact)


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_offset_over_sentinels(isa: str, dtype: torch.dtype) -> None:
    size = 257
    sources = [torch.randn(size + 41).to(dtype) for _ in range(3)]
    weights = [0.2, 3.0, 1.7]
    with using(isa):
        for i in range(41):
            vectors = [source[i : i + size] for source in sources]
            exact = exact_mean(vectors, weights)
            accumulators = [accumulate(vectors, weights, in_any_order) for in_any_order in (False, True)]
            at_once = functools.partial(weighted_mean, vectors, weights)
            for write in (at_once, *(a.mean for a in accumulators)):
                buffer = torch.full((size + 82,), 777.0, dtype=dtype)
                write(out=buffer[41 - i :][:size])
                close(buffer[41 - i :][:size], exact)
                assert bool((buffer[: 41 - i] == 777).all())
                assert bool((buffer[41 - i + size :] == 777).all())


@pytest.mark.parametrize("name", BACKENDS)
def test_out_may_be_an_input_or_overlap_one(name: str) -> None:
    for count in (3, 14):
        vectors = [torch.randn(40001) for _ in range(count)]
        weights = make_weights("random", count)
        with using(name):
            wanted = weighted_mean(vectors, weights)
            for k in (0, count - 1):
                given = [vector.clone() for vector in vectors]
                version = given[k]._version
                assert torch.equal(weighted_mean(given, weights, out=given[k]), wanted)
                assert given[k]._version > version
            buffer = torch.cat([vectors[0], torch.zeros(1)])
            assert torch.equal(weighted_mean([buffer[:-1], *vectors[1:]], weights, out=buffer[1:]), wanted)
            assert torch.equal(weighted_mean(vectors, weights, out=torch.empty(80002)[::2]), wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_client_of_weight_zero_does_not_count(name: str) -> None:
    vectors = [torch.randn(50), torch.full((50,), math.nan), torch.randn(50)]
    with using(name):
        assert torch.equal(weighted_mean(vectors, [1, 0, 2]), weighted_mean(vectors[::2], [1, 2]))
        accumulator = accumulate(vectors, (1, 0, 2), exact=True)
        assert not accumulator.mean().isnan().any()
        assert accumulator.count == 3


def large() -> list[Tensor]:
    torch.manual_seed(1)
    vectors = [torch.randn(300_007) for _ in range(12)]
    weights = make_weights("random", 12)
    plain, exact = (accumulate(vectors, weights, in_any_order) for in_any_order in (False, True))
    return [weighted_mean(vectors, weights), weighted_mean(vectors[:3], weights[:3]), plain.mean(), exact.mean()]


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_learn_beside_a_vector_of_weight_zero_that_is_not_finite(name: str) -> None:
    """The vector is no part of the mean.

    Only its own weight's gradient is not finite.
    """
    vectors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.full((2,), math.nan)]
    weights = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    with using(name):
        weighted_mean(vectors, weights).sum().backward()
    assert weights.grad[:2].tolist() == [-1, 1]
    assert weights.grad[2].isnan()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [(2**29 - 1, 2**29 - 3), (2**30 - 1, 2**30 - 3), (1 / 3, math.nextafter(1 / 3, 1))])
def test_products_and_sums_are_rounded_one_by_one(name: str, dtype: torch.dtype, weights: tuple[float, float]) -> None:
    """Cancelling vectors reveal a fused product, unless fp64 holds it: fp32's 24 binary digits and a weight's 29."""
    vector = torch.randn(20_000).to(dtype)
    vectors, shares = [vector, -vector, torch.randn(20_000).to(dtype)], [*weights, min(weights) / 2**20]
    out = torch.empty(20_000, dtype=torch.float64)
    with using(name):
        weighted_mean(vectors, shares, out=out)
    assert torch.equal(out, weighted_mean_reference([vector.double() for vector in vectors], shares))


def test_same_bits_for_every_run_thread_count_and_isa() -> None:
    torch.set_num_threads(1)
    runs = [large(), large()]
    torch.set_num_threads(2)
    runs.append(large())
    for name in KERNELS:
        with using(name):
            runs.append(large())
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_past_the_cache_are_the_same(name: str, dtype: torch.dtype, cache_bytes: Callable[[int], None]) -> None:
    """Only whole lines can be written past the cache, so results are aligned and not."""
    size = 70_001
    vectors, weights = [torch.randn(size).to(dtype) for _ in range(12)], [float(m + 1) for m in range(12)]
    results = []
    for limit in (1 << 40, -1):
        cache_bytes(limit)
        with using(name):
            memory = torch.empty(size + 16, dtype=dtype)
            out = [weighted_mean(vectors, weights, out=memory[shift : shift + size]).clone() for shift in (0, 1)]
            for exact in (False, True):
                out.append(accumulate(vectors, weights, exact).mean())
            out.append(server_step(vectors[0], vectors[1:], weights[1:]).model)
        results.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("weights", [[0.7, 0.1], [2**24 + 1, 1], [1e39, 1e39], [1e-50, 1e-50]])
def test_listed_weights_keep_their_digits_where_a_gradient_is_wanted(name: str, weights: list[float]) -> None:
    vectors = [torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)]
    with using(name):
        mean = weighted_mean(vectors, weights)
        mean.sum().backward()
        with torch.no_grad():
            assert torch.equal(mean, weighted_mean(vectors, weights))
    share = weights[0] / sum(weights)
    torch.testing.assert_close(vectors[0].grad, torch.full((3,), share, dtype=torch.float64), rtol=1e-15, atol=0)


V = [torch.ones(4), torch.ones(4)]


WRONG = [
    ((torch.ones(4), [1]), {}, ValueError, r"vectors must have shape \[M, P\] with M > 0, but has \[4\]"),
    ((torch.ones(0, 4), []), {}, ValueError, r"but has \[0, 4\]"),
    (([V[0], torch.ones(4, 1)], [1, 1]), {}, ValueError, r"vectors\[1\] must have shape \[P\], but has \[4, 1\]"),
    ((V, [1]), {}, ValueError, "weights must have one value for each of the 2 vectors, not 1"),
    ((V, torch.ones(3)), {}, ValueError, r"weights must have shape \[2\], but has \[3\]"),
    ((V, [1, -1]), {}, ValueError, r"weights\[1\] must be finite and not negative, not -1"),
    ((V, [0, 0]), {}, ValueError, "weights must have a positive, finite sum, not 0"),
    ((V, [1e308, 1e308]), {}, ValueError, "weights must have a positive, finite sum, not inf"),
    ((V, [1, 1]), {"out": torch.ones(5)}, ValueError, r"out must have shape \[4\], but has \[5\]"),
    ((V, [1, 1]), {"out": torch.ones(1).expand(4)}, ValueError, "out must not be expanded"),
    ((V, [1, 1]), {"out": torch.ones(4, requires_grad=True)}, ValueError, "out takes no part in differentiation"),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_wrong_arguments(name: str, arguments: tuple, options: dict, error: type, message: str) -> None:
    with using(name), pytest.raises(error, match=message):
        weighted_mean(*arguments, **options)


# -- properties aggregate ----------------------------------------------------------------------------------------------


Uploads = tuple[Tensor, Tensor]

# The same examples every time, so that a change fails on its own merits.
examples = settings(derandomize=True, max_examples=40, deadline=None, database=None)


@st.composite
def uploads(draw: st.DrawFn, min_count: int = 1) -> Uploads:
    """Draw vectors ``[M, P]`` and weights ``[M]``, zeros among them but not alone."""
    m, size = draw(st.integers(min_count, 7)), draw(st.integers(1, 40))
    values = st.one_of(st.just(0.0), st.integers(1, 1000).map(float), st.floats(2.0**-10, 1.0, width=32))
    weights = draw(st.lists(values, min_size=m, max_size=m))
    numbers = arrays.arrays(np.float32, (m, size), elements=st.floats(-1e6, 1e6, width=32), fill=st.nothing())
    return torch.from_numpy(draw(numbers)), torch.tensor(weights if any(weights) else [1.0] * m)


# What sums in the order given may differ in the last bit of an fp64 sum, and so after rounding in fp32's last bit;
# what orders or bins first may not.
ORDERED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "median": lambda v, w: ops.median(v),
    "median weights": ops.median,
    "exact": lambda v, w: accumulate(v, w.tolist()).mean(),
}
SUMMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted_mean": ops.weighted_mean,
    "trimmed_mean": lambda v, w: ops.trimmed_mean(v, 1),
    "geometric_median": ops.geometric_median,
    "server_step": lambda v, w: ops.server_step(v.mean(0), v, w).model,
}


@examples
@given(uploads(3), st.data())
def test_permuting_clients_permutes_nothing_in_the_result(given: Uploads, data: st.DataObject) -> None:
    vectors, weights = given
    order = data.draw(st.permutations(range(len(weights))).map(torch.tensor))
    for name, function in ORDERED.items():
        assert torch.equal(function(vectors[order], weights[order]), function(vectors, weights)), name
    size = float(vectors.abs().max())
    for name, function in SUMMED.items():
        got, expected = function(vectors[order], weights[order]), function(vectors, weights)
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * size + 1e-30), name
    distances = ops.pairwise_distances(vectors)
    torch.testing.assert_close(ops.pairwise_distances(vectors[order]), distances[order][:, order], rtol=1e-12, atol=0)


@examples
@given(uploads())
def test_trimming_nothing_is_the_mean(given: Uploads) -> None:
    vectors, weights = given
    assert torch.equal(ops.trimmed_mean(vectors, 0), ops.weighted_mean(vectors, [1.0] * len(vectors)))
    assert torch.equal(ops.trimmed_mean(vectors, 0, weights), ops.weighted_mean(vectors, weights))
