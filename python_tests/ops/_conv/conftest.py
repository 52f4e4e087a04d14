"""Fixtures of the tests of both convolutions."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from fedkern.ops._conv.kernels import ConvKernels, PoolKernels
from python_tests.ops._conv.conv_cases import Served


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Served:
    """Return the list of kernel calls, which grows during the test."""
    seen = Served()
    for kernels, name in itertools.product((ConvKernels, PoolKernels), ("forward", "backward")):
        before = getattr(kernels, name)

        def one(*given: Any, before: Callable[..., Any] = before, name: str = name) -> Any:
            seen.append(name)
            seen.last = before(*given)
            return seen.last

        monkeypatch.setattr(kernels, name, one)
    return seen
