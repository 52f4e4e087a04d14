"""What must hold whatever the numbers are: clients in any order, and trimming nothing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from python_tests.ops._aggregate.aggregate_cases import accumulate
from python_tests.ops.property_inputs import examples, orders, uploads

pytestmark = pytest.mark.usefixtures("one_thread")

Uploads = tuple[Tensor, Tensor]


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
    order = data.draw(orders(len(weights)))
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
