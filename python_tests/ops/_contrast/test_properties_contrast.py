"""What must hold of contrastive whatever the numbers are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from python_tests.ops.property_inputs import QUARTERS, examples, logits, orders

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = st.sampled_from([0.01, 0.07, 1.0, 30.0])


def spread(x: Tensor, y: Tensor, temperature: float) -> float:
    """At least the largest difference of logits."""
    return max(1.0, 2 * float((x @ y.T).abs().max()) / temperature)


def close(got: Tensor, expected: Tensor, scale: float) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * scale)


@examples
@given(logits(2, QUARTERS), TEMPERATURES)
def test_not_negative_and_at_most_the_spread(pair: list[Tensor], temperature: float) -> None:
    loss = float(ops.contrastive(*pair, temperature))
    assert 0 <= loss <= 2 * (math.log(len(pair[0])) + spread(*pair, temperature)) * (1 + 1e-5) + 1e-5


@examples
@given(logits(2, QUARTERS), TEMPERATURES)
def test_symmetric_in_x_and_y(pair: list[Tensor], temperature: float) -> None:
    x, y = pair
    close(ops.contrastive(y, x, temperature), ops.contrastive(x, y, temperature), spread(x, y, temperature))


@examples
@given(logits(2, QUARTERS), TEMPERATURES, st.data())
def test_does_not_see_the_order_of_pairs(pair: list[Tensor], temperature: float, data: st.DataObject) -> None:
    x, y = pair
    order = data.draw(orders(len(x)))
    expected = ops.contrastive(x, y, temperature)
    close(ops.contrastive(x[order], y[order], temperature), expected, spread(x, y, temperature))


@examples
@given(logits(1, QUARTERS), TEMPERATURES)
def test_partners_that_nothing_tells_apart(one: list[Tensor], temperature: float) -> None:
    """B equal rows: each finds its own by chance, whatever they hold."""
    x = one[0]
    loss = ops.contrastive(x, x[:1].expand_as(x), temperature)
    assert float(loss) >= 2 * math.log(len(x)) * (1 - 1e-6) - 1e-6 * spread(x, x, temperature)
    close(ops.contrastive(x[:1].expand_as(x), x[:1].expand_as(x), temperature), torch.tensor(2 * math.log(len(x))), 1.0)
