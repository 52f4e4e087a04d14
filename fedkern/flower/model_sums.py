"""Models of a round: their running mean, or all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkern import ops
from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, FLOATS, Misfit
from fedkern.flower.model_layout import Entry, Layout, Model

Integers = dict[str, np.ndarray]

# Norms of updates are estimated from a part of models with more elements than this: that part costs less than the mean.
_MEASURED = 1 << 17
_WINDOW, _SHARE = 4096, 32
# A mean whose numbers grow by this factor is reason enough to measure the updates as a whole.
_GROWN = 10


class NewModel:
    """Memory for a new model's floating entries: a ``vector`` ``[P]``, or ``data``, the bytes of its arrays by key.

    ``as_arrays`` asks for ``data``, which is used where dtypes allow.
    """

    def __init__(self, layout: Layout, as_arrays: bool, dtype: torch.dtype | None = None) -> None:
        self._layout = layout
        dtypes = {FLOATS[entry.dtype] for entry in layout.floating} | ({FLOATS[layout.flat]} if layout.flat else set())
        as_arrays = as_arrays and dtypes <= {layout.dtype}
        self.vector = None if as_arrays else torch.empty(layout.size, dtype=dtype or layout.dtype)
        self.data: dict[str, bytes] = {}
        self._flat: Tensor | None = None
        self._copied: list[tuple[tuple[Entry, ...], Tensor]] = []

    def part(self, run: tuple[Entry, ...]) -> Tensor:
        begin, end = run[0].begin, run[-1].end
        if self.vector is not None:
            return self.vector[begin:end]
        if self._layout.flat:
            if self._flat is None:
                self.data[FLAT], self._flat = array_bytes.allocate_bytes(b"", self._layout.dtype, self._layout.size)
            return self._flat[begin:end]
        if len(run) > 1:
            part = torch.empty(end - begin, dtype=self._layout.dtype)
            self._copied.append((run, part))
            return part
        head = array_bytes.npy_header(np.dtype(run[0].dtype).str, run[0].shape)
        self.data[run[0].key], part = array_bytes.allocate_bytes(head, self._layout.dtype, end - begin)
        return part

    def finish(self) -> NewModel:
        """Copy small entries into their own arrays, once all segments are written."""
        for run, part in self._copied:
            for entry in run:
                values = part[entry.begin - run[0].begin : entry.end - run[0].begin].numpy()
                self.data[entry.key] = array_bytes.npy_bytes(values, entry.shape)
        if self.vector is None and self._layout.flat:
            self.data.setdefault(FLAT, b"")  # no segment has asked for a part
        self._copied = []
        return self


class RunningMean:
    """Weighted mean of models that arrive one by one, with the same bits for every order of arrival.

    Memory: 25 bytes for each of P elements, for any number of models. Without ``start``, the model that was sent, no
    norms of updates are computed.
    """

    def __init__(self, layout: Layout, start: Model | None = None) -> None:
        self._layout, self._start = layout, start
        self._sums = [ops.Accumulator(run[-1].end - run[0].begin, exact=True, device="cpu") for run in layout.segments]
        self._integers: Integers = {}
        self._some = False
        self.nodes: list[int] = []
        """The models' nodes, in the order of arrival."""
        self._norms: list[float] = []

    def add(self, model: Model, weight: float, node: int) -> None:
        """Add ``weight`` times a model. A model of weight 0 is not read."""
        self.nodes.append(node)
        if self._start is not None:
            self._norms.append(model.distance(self._start))
        if not weight:
            return
        for total, part in zip(self._sums, model.segments(), strict=True):
            total.add(part, weight)
        self._add_integers(model)

    def add_update(self, model: Model, start: Model, factor: float) -> None:
        """Add ``factor * (model - start)`` with weight 1, in fp64."""
        for total, part, start_part in zip(self._sums, model.segments(), start.segments(), strict=True):
            # Equal infinities, of a mask among the buffers, differ by nothing.
            change = torch.where(part == start_part, 0.0, part.double() - start_part.double())
            total.add(change * factor)
        self._add_integers(model)

    def _add_integers(self, model: Model) -> None:
        self._some = True
        for key, array in model.integers.items():
            self._integers[key] = take_rank([self._integers.get(key, array), array])

    def norms(self) -> list[float]:
        return self._norms

    def result(self, model: NewModel) -> tuple[NewModel, Integers] | None:
        """Write the mean to ``model``, and return model and other entries, None if no weight was added.

        Each sum is freed after its part of the mean, so that sums and mean never fill memory together.
        """
        if not self._some:
            return None
        for run in reversed(self._layout.segments):
            self._sums.pop().mean(out=model.part(run))
        return model.finish(), self._integers


class _Held(NamedTuple):
    node: int
    place: int
    weight: float
    model: Model


class AllModels:
    """All models of a round, in the memory in which they came.

    ``refused`` holds the models that turned out not to be finite, by their place in the order of addition.
    """

    def __init__(self, layout: Layout, start: Model | None = None) -> None:
        self.layout, self._start = layout, start
        self._held: list[_Held] = []
        self._grown = False
        self.refused: dict[int, Misfit] = {}

    def add(self, model: Model, weight: float, node: int) -> None:
        self._held.append(_Held(node, len(self._held), weight, model))

    def sort(self) -> None:
        """Order the models by node, so that no bit depends on the order of arrival."""
        self._held.sort(key=lambda reply: reply[:2])

    @property
    def nodes(self) -> list[int]:
        return [reply.node for reply in self._held]

    @property
    def weights(self) -> list[float]:
        return [reply.weight for reply in self._held]

    @property
    def vectors(self) -> list[Tensor]:
        return [reply.model.vector() for reply in self._held]

    def rows(self, run: Sequence[Entry], chosen: Sequence[int] | None = None) -> list[Tensor]:
        """Return a segment of the chosen models (None: all) in the layout's dtype."""
        models = [self._held[i].model for i in (range(len(self._held)) if chosen is None else chosen)]
        return [model.segment(run).to(self.layout.dtype) for model in models]

    def by_coordinate(self, rule: Callable[[list[Tensor]], Tensor], chosen: Sequence[int] | None = None) -> Tensor:
        """Return a coordinate-wise rule over the chosen models (None: all): ``[P]``."""
        vector = torch.empty(self.layout.size, dtype=self.layout.dtype)
        for run in self.layout.segments:
            vector[run[0].begin : run[-1].end] = rule(self.rows(run, chosen))
        return vector

    def mean(self, as_arrays: bool) -> NewModel | None:
        """Return the weighted mean of all models, None if all weights are 0.

        Only if the mean is not finite are all models checked, and bad models moved to :attr:`refused`. Faults that do
        not show in the mean must have been checked before.
        """
        while any(self.weights):
            model = NewModel(self.layout, as_arrays)
            finite = [self._mean_of(run, model) for run in self.layout.segments]
            if all(finite) or not self._refuse():
                return model.finish()
        return None

    def _refuse(self) -> bool:
        """Take out the models that are not finite, and return whether there were any."""
        before = len(self._held)
        for reply in list(self._held):
            try:
                reply.model.check_finite()
            except Misfit as misfit:
                self.refused[reply.place] = misfit
                self._held.remove(reply)
        return len(self._held) < before

    def _mean_of(self, run: tuple[Entry, ...], model: NewModel) -> bool:
        rows = [reply.model.segment(run) for reply in self._held]
        wide = functools.reduce(torch.promote_types, (row.dtype for row in rows))
        rows = [row.to(wide) for row in rows]
        part = model.part(run)
        if not part.numel():
            return True
        ops.weighted_mean(rows, self.weights, out=part)
        largest = _magnitude(part)
        if self._start is not None:
            self._grown |= largest > _GROWN * _magnitude(self._start.segment(run))
        return math.isfinite(largest)

    def norms(self) -> list[float]:
        """Return the norms of the updates in the order of :attr:`nodes`, empty without the model sent.

        Norms of large models are estimated from a part of every segment, unless the mean shows that numbers have grown.
        """
        if self._start is None or not self._held:
            return []
        squares = torch.zeros(len(self._held), dtype=torch.float64)
        for run in self.layout.segments:
            rows = [reply.model.segment(run) for reply in self._held]
            squares += self._squared_norms(run, self._start.segment(run), rows)
        return squares.sqrt().tolist()

    def _squared_norms(self, run: tuple[Entry, ...], sent: Tensor, rows: Sequence[Tensor]) -> Tensor:
        count = run[-1].end - run[0].begin
        part = self.layout.size > _MEASURED and not self._grown
        width = min(count, max(_WINDOW, count // _SHARE)) if part else count
        if not width:
            return torch.zeros(len(rows), dtype=torch.float64)
        middle = slice((count - width) // 2, (count + width) // 2)
        sent, *rows = (row[middle].to(self.layout.dtype) for row in (sent, *rows))
        norms = ops.server_step(sent, rows, [1.0] * len(rows), "mean").norms
        return norms.square() * (count / width)

    def integers(self, chosen: Sequence[int] | None = None, rank: int = -1) -> Integers:
        models = [self._held[i].model for i in (range(len(self._held)) if chosen is None else chosen)]
        keys = models[0].integers if models else ()
        return {key: take_rank([model.integers[key] for model in models], rank) for key in keys}


def take_rank(rows: Sequence[np.ndarray], rank: int = -1) -> np.ndarray:
    """Return the value of a rank among M arrays, element by element (-1: the largest)."""
    if len(rows) == 1:
        return rows[0].copy()
    ranked: np.ndarray = np.sort(np.stack(rows), axis=0)[rank]
    return ranked.astype(rows[0].dtype, copy=False)


def _magnitude(part: Tensor) -> float:
    if not part.numel():
        return 0.0
    low, high = part.aminmax()
    return max(abs(float(low)), abs(float(high))) if low == low else math.nan
