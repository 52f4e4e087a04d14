"""Parameters of tests of which the default run takes a sample, and the exhaustive run the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def sampled(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values for ``pytest.mark.parametrize``.

    By default as many run as the longest axis has values, so that every value of every axis is in one of them; the
    others are marked ``exhaustive``.
    """
    sample = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, places, strict=True)),
            marks=() if places in sample else pytest.mark.exhaustive,
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]


def first(count: int, values: Sequence[Any]) -> list[Any]:
    """The values for ``pytest.mark.parametrize``, of which the first ``count`` run by default; tuples are unpacked."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if i < count else pytest.mark.exhaustive
        )
        for i, value in enumerate(values)
    ]
