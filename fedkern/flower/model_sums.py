"""What a round keeps of the clients' models: a running mean, or all of them where a rule compares them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern import ops
from fedkern.flower.model_layout import Layout, Model, largest
from fedkern.ops._aggregate.error_free import ErrorFreeSum

Whole = dict[str, np.ndarray[Any, Any]]


class _Exact:
    """:class:`fedkern.ops.Accumulator` of finite vectors, with exact sums."""

    def __init__(self, size: int) -> None:
        self._sum = ErrorFreeSum(size)
        self._weights: list[float] = []

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        refused = self._sum.add([vector], [weight])
        assert not refused, "models are checked before they are added"
        self._weights.append(weight)

    def mean(self, out: Tensor) -> None:
        self._sum.mean(out, math.fsum(self._weights))


class RunningMean:
    """Weighted mean of models that arrive one after another, and the largest value of every other entry.

    Memory: 8 bytes for each of P elements, and up to 16 with ``exact``, however many models are added.

    Args:
        layout: the models' layout.
        exact: whether the bits do not depend on the order of arrival (see
            :class:`~fedkern.ops._aggregate.error_free.ErrorFreeSum`).
    """

    def __init__(self, layout: Layout, exact: bool) -> None:
        self._layout = layout
        kind = _Exact if exact else ops.Accumulator
        self._sums = [kind(run[-1].end - run[0].begin) for run in layout.segments]
        self._whole: Whole = {}
        self._some = False

    def add(self, model: Model, weight: float, node: int = 0) -> None:
        """Adds ``weight`` times a model, whatever its node; a model of weight 0 is not read."""
        if not weight:
            return
        for total, part in zip(self._sums, model.segments(), strict=True):
            total.add(part, weight)
        self._add_whole(model)

    def add_update(self, model: Model, start: Model, factor: float) -> None:
        """Adds ``factor * (model - start)`` with weight 1, computed in fp64."""
        for total, part, there in zip(self._sums, model.segments(), start.segments(), strict=True):
            total.add((part.double() - there.double()) * factor)
        self._add_whole(model)

    def _add_whole(self, model: Model) -> None:
        self._some = True
        for key, array in model.whole.items():
            self._whole[key] = largest(self._whole.get(key), array)

    def result(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Whole] | None:
        """The mean ``[P]`` in ``dtype`` (None: the layout's) and the other entries; None where no weight was added.

        The sums are given up on the way, so that sums and mean are never whole at the same time.
        """
        if not self._some:
            return None
        mean = torch.empty(self._layout.size, dtype=dtype or self._layout.dtype)
        for run in reversed(self._layout.segments):
            self._sums.pop().mean(out=mean[run[0].begin : run[-1].end])
        return mean, self._whole


class AllModels:
    """The models of a round in the memory in which they came: what a rule compares, or sums in a fixed order.

    Memory: M models.

    Args:
        layout: the models' layout.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._held: list[tuple[int, float, Model]] = []

    def add(self, model: Model, weight: float, node: int) -> None:
        """Keeps a model and its weight."""
        self._held.append((node, weight, model))

    def sort(self) -> None:
        """Orders the models by node, so that nothing depends on the order of arrival."""
        self._held.sort(key=lambda held: held[0])

    @property
    def nodes(self) -> list[int]:
        """The nodes, in order."""
        return [node for node, *_ in self._held]

    @property
    def weights(self) -> list[float]:
        """The models' weights, in order."""
        return [weight for _, weight, _ in self._held]

    @property
    def vectors(self) -> list[Tensor]:
        """The models, each ``[P]``, in order; a plain model is copied."""
        return [model.vector() for *_, model in self._held]

    def segments(self, chosen: Sequence[int] | None = None) -> Iterator[list[Tensor]]:
        """The numbers of the chosen models (None: of all) segment by segment, one list of M vectors each."""
        models = [self._held[i][2] for i in (range(len(self._held)) if chosen is None else chosen)]
        for run in self._layout.segments:
            yield [model.segment(run).to(self._layout.dtype) for model in models]

    def by_coordinate(self, rule: Callable[[list[Tensor]], Tensor], chosen: Sequence[int] | None = None) -> Tensor:
        """``[P]``: a rule that treats coordinates apart, over the chosen models (None: over all)."""
        made = torch.empty(self._layout.size, dtype=self._layout.dtype)
        for run, rows in zip(self._layout.segments, self.segments(chosen), strict=True):
            made[run[0].begin : run[-1].end] = rule(rows)
        return made

    def whole(self, chosen: Sequence[int] | None = None) -> Whole:
        """The largest value of every entry that is not floating, over the chosen models (None: over all)."""
        made: Whole = {}
        for i in range(len(self._held)) if chosen is None else chosen:
            for key, array in self._held[i][2].whole.items():
                made[key] = largest(made.get(key), array)
        return made
