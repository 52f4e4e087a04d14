"""What must hold whatever the numbers are: averages, order statistics, distances, clipping."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from python_tests.ops._aggregate.aggregate_cases import accumulate
from python_tests.ops.property_inputs import VALUES, examples, orders, tensors, uploads

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


@examples
@given(uploads(3))
def test_order_statistics_stay_among_the_values(given: Uploads) -> None:
    vectors, weights = given
    assert torch.equal(ops.median(vectors[:1]), vectors[0])
    assert torch.equal(ops.median(vectors[:1], weights[:1] + 1), vectors[0])
    middle = ops.median(vectors)
    ordered = vectors.sort(0).values
    low, high = ordered[(len(vectors) - 1) // 2], ordered[len(vectors) // 2]
    assert ((middle >= low) & (middle <= high)).all()
    assert torch.equal(ops.median(vectors, torch.full((len(vectors),), 3.0)), middle)
    trimmed = ops.trimmed_mean(vectors, 1)
    assert ((trimmed >= ordered[1]) & (trimmed <= ordered[-2])).all()


@examples
@given(uploads(2), tensors(st.just(40), VALUES))
def test_one_upload_cannot_move_robust_means_far(given: Uploads, wild: Tensor) -> None:
    """Whatever one of at least three sends, the median stays within the others' range."""
    vectors, _ = given
    honest = torch.cat([vectors, vectors[:1]])
    others = torch.cat([honest, 1e30 * wild[None, : vectors.shape[1]]])
    for robust in (ops.median(others), ops.trimmed_mean(others, 1)):
        assert ((robust >= honest.min(0).values) & (robust <= honest.max(0).values)).all()
