"""Tests of properties for any numbers: clients in any order, and trimming nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fedkern import ops
from python_tests.ops._aggregate.aggregate_cases import accumulate

pytestmark = pytest.mark.usefixtures("one_thread")

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
