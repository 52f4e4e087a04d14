"""Hypothesis strategies of the property tests: tensors that are small, extreme now and then, and shrink."""

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

# The same examples every time, so that a change fails on its own merits.
examples = settings(derandomize=True, max_examples=40, deadline=None, database=None)

# Quarters: sums of them with whole numbers are exact in fp32.
QUARTERS = st.integers(-160, 160).map(lambda n: n / 4)
VALUES = st.floats(-1e6, 1e6, width=32)


def tensors(shape: Any, elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """fp32 tensors of a shape, or of shapes drawn."""
    return arrays.arrays(np.float32, shape, elements=elements, fill=st.nothing()).map(torch.from_numpy)


@st.composite
def uploads(draw: st.DrawFn, least: int = 1, most: int = 7) -> tuple[Tensor, Tensor]:
    """Vectors ``[M, P]`` and weights ``[M]``."""
    m, size = draw(st.integers(least, most)), draw(st.integers(1, 40))
    return draw(tensors((m, size), VALUES)), draw(weights(m))


def weights(count: int) -> st.SearchStrategy[Tensor]:
    """``count`` weights, zeros among them but not alone."""
    values = st.one_of(st.just(0.0), st.integers(1, 1000).map(float), st.floats(2.0**-10, 1.0, width=32))
    return st.lists(values, min_size=count, max_size=count).map(
        lambda given: torch.tensor(given if any(given) else [1.0] * count)
    )


def orders(count: int) -> st.SearchStrategy[Tensor]:
    """Permutations."""
    return st.permutations(range(count)).map(torch.tensor)
