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
few_examples = settings(examples, max_examples=12)

# Quarters: sums of them with whole numbers are exact in fp32.
QUARTERS = st.integers(-160, 160).map(lambda n: n / 4)
EXTREME = st.one_of(QUARTERS, st.sampled_from([0.0, -1e4, 1e4, 1e-3, -1e-3, 88.0, -104.0]))
VALUES = st.floats(-1e6, 1e6, width=32)


def tensors(shape: Any, elements: st.SearchStrategy[float] = EXTREME) -> st.SearchStrategy[Tensor]:
    """fp32 tensors of a shape, or of shapes drawn."""
    return arrays.arrays(np.float32, shape, elements=elements, fill=st.nothing()).map(torch.from_numpy)


@st.composite
def logits(draw: st.DrawFn, count: int, elements: st.SearchStrategy[float] = EXTREME) -> list[Tensor]:
    """``count`` logits ``[B, C]`` of one shape."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    return [draw(tensors(shape, elements)) for _ in range(count)]


@st.composite
def members(draw: st.DrawFn, least: int = 1) -> tuple[Tensor, Tensor]:
    """Logits ``[K, B, C]`` and weights ``[K]``, of which one at least is positive."""
    k = draw(st.integers(least, 5))
    shape = (k, draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    return draw(tensors(shape)), draw(weights(k))


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
