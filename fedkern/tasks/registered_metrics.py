"""User-defined metrics of classification: ``@register_metric("name")``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedkern.errors import RAISED, UserError, describe_error, error_origin
from fedkern.tasks.figure_names import FIGURE_NAMES, PREFIXES, RECORD_NAMES
from fedkern.usercode import plugins
from fedkern.usercode.registry import Registry

F = TypeVar("F", bound=Callable[..., float])


@dataclass(frozen=True)
class Metric:
    """Registered metric: its name, a line of description, and ``function(logits, labels)``."""

    name: str
    description: str
    function: Callable[[Tensor, Tensor], float]

    def __call__(self, logits: Tensor, labels: Tensor) -> float:
        try:
            return float(self.function(logits, labels))
        except MemoryError:
            raise
        except RAISED as error:  # the user's own code may raise anything
            raise UserError(
                f'The metric "{self.name}" fails on {len(labels)} samples of {logits.shape[1]} classes '
                f"({describe_error(error)}): mend {self.function.__qualname__}{error_origin(error, self.function)}."
            ) from error


METRICS: Registry[Metric] = Registry("metric", code=lambda metric: metric.function)
"""Metrics by name."""


def register_metric(name: str) -> Callable[[F], F]:
    """Register a metric, which every evaluation of a classifier then computes on every test set.

    The function is called as ``function(logits, labels)`` with all samples of a test set, fp32 ``[n, C]`` and int64
    ``[n]`` on the CPU, and returns a number.

    Args:
        name: the figure's name: lower-case letters, digits and "_". The docstring's first line describes the figure.

    Raises:
        ValueError: the name has other characters, is that of another figure, or begins like a test set's figures.
        TypeError: there is no docstring.

    Example::

        @register_metric("top3")
        def top3(logits, labels):
            "Share of samples whose class is among the three likeliest."
            return (logits.topk(3).indices == labels[:, None]).any(1).float().mean()
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f'metric "{name}": expected lower-case letters, digits and "_" in the name')
    if name in FIGURE_NAMES or name in RECORD_NAMES or name.startswith(PREFIXES):
        raise ValueError(f'metric "{name}": expected another name, as fedkern has such figures itself')

    def add(function: F) -> F:
        METRICS[name] = Metric(name, METRICS.describe(name, function), function)
        return function

    return add


def metrics_of(stored: Mapping[str, str]) -> tuple[Metric, ...]:
    return tuple(METRICS[name] for name in plugins.names_of_run(METRICS, stored))


class Answers:
    """Logits and labels of a test set, gathered if there are metrics."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        if self._metrics:
            self._logits.append(logits.float().cpu())
            self._labels.append(labels.cpu())

    def figures(self) -> dict[str, float]:
        if not self._metrics:
            return {}
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        return {metric.name: metric(logits, labels) for metric in self._metrics}
