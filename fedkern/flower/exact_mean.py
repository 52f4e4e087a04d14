"""Mean of the models of a round whose bits do not depend on the order of arrival, with few passes over memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, FLOATS, Misfit
from fedkern.flower.model_layout import Entry, Layout, Model, largest
from fedkern.flower.model_sums import Whole
from fedkern.ops._aggregate.error_free import ErrorFreeSum


class Refused(NamedTuple):
    """A reply that turned out not to count after it had been taken.

    Attributes:
        node: the node that sent it.
        nth: how many replies of the node were taken before it.
        misfit: the reason.
    """

    node: int
    nth: int
    misfit: Misfit


class _Held(NamedTuple):
    model: Model
    weight: float
    node: int
    nth: int


class NewModel:
    """Memory for the floating entries of a new model.

    Args:
        layout: the model's layout.
        as_arrays: whether the entries are written straight to the bytes of new arrays, where their dtypes allow it.

    Attributes:
        vector: ``[P]`` in the layout's dtype; None where the entries are in ``data``.
        data: bytes of the arrays, by key; `array_bytes.FLAT` is that of a flat model's vector.
    """

    def __init__(self, layout: Layout, as_arrays: bool) -> None:
        self._layout = layout
        dtypes = {FLOATS[entry.dtype] for entry in layout.floating} | ({FLOATS[layout.flat]} if layout.flat else set())
        as_arrays = as_arrays and dtypes <= {layout.dtype}
        self.vector = None if as_arrays else torch.empty(layout.size, dtype=layout.dtype)
        self.data: dict[str, bytes] = {}
        self._flat: Tensor | None = None
        self._copied: list[tuple[tuple[Entry, ...], Tensor]] = []

    def part(self, run: tuple[Entry, ...]) -> Tensor:
        """Where the numbers of a segment of the layout are to be written, ``[n]``."""
        begin, end = run[0].begin, run[-1].end
        if self.vector is not None:
            return self.vector[begin:end]
        if self._layout.flat:
            if self._flat is None:
                self.data[FLAT], self._flat = array_bytes.writable(b"", self._layout.dtype, self._layout.size)
            return self._flat[begin:end]
        if len(run) > 1:
            part = torch.empty(end - begin, dtype=self._layout.dtype)
            self._copied.append((run, part))
            return part
        head = array_bytes.npy_header(np.dtype(run[0].dtype).str, run[0].shape)
        self.data[run[0].key], part = array_bytes.writable(head, self._layout.dtype, end - begin)
        return part

    def finish(self) -> NewModel:
        """Puts small entries into arrays of their own, once all segments are written."""
        for run, part in self._copied:
            for entry in run:
                own = part[entry.begin - run[0].begin : entry.end - run[0].begin].numpy()
                self.data[entry.key] = array_bytes.npy_bytes(own, entry.shape)
        if self.vector is None and self._layout.flat:
            self.data.setdefault(FLAT, b"")  # no segment has asked for a part
        self._copied = []
        return self


class ExactMean:
    """Weighted mean of models in 8 bytes for most numbers, the same bits for every order of arrival.

    Models are held until the next one might exceed ``room``, then added together in one pass over the sums.  Where all
    of them fit, there are no sums: one pass reads the models and writes the mean.  Whether numbers are finite shows in
    the sums, so no other pass looks at them.

    Args:
        layout: the models' layout.
        expected: the number of models that will come, as far as it is known; 0: unknown.
        room: bytes of models that may be held at once; one model is held in any case.

    Attributes:
        layout: as given.
        refused: models that turned out not to be finite, which do not count.  All are known after :meth:`close`.
    """

    def __init__(self, layout: Layout, expected: int, room: float) -> None:
        self.layout, self._expected, self._room = layout, expected, room
        self._taken = 0
        self._held: list[_Held] = []
        self._bytes = 0
        self._sums: list[ErrorFreeSum] | None = None
        self._weights: list[float] = []
        self._whole: Whole = {}
        self._by_node: dict[int, int] = {}
        self._made: NewModel | None = None
        self.refused: list[Refused] = []

    def add(self, model: Model, weight: float, node: int) -> None:
        """Takes a model; one of weight 0 is not read."""
        nth = self._by_node.get(node, 0)
        self._by_node[node] = nth + 1
        self._taken += 1
        if weight:
            self._held.append(_Held(model, weight, node, nth))
            self._bytes += model.nbytes
            # The next model is in memory before this class sees it.
            if self._bytes + model.nbytes > self._room and self._taken != self._expected:
                self._add_held()

    def close(self, made: NewModel) -> None:
        """Ends the round: writes the mean to ``made``, which :meth:`result` returns.

        The sums are given up on the way, so that sums and mean are never whole at the same time.
        """
        if self._sums is None:
            while self._held and not self._mean_at_once(made):
                pass
        else:
            self._add_held()
            total = math.fsum(self._weights)
            for run in reversed(self.layout.segments) if self._weights else ():
                self._sums.pop().mean(made.part(run), total)
        if self._weights:
            self._made = made.finish()

    def result(self) -> tuple[NewModel, Whole] | None:
        """The mean and the other entries, after :meth:`close`; None where no weight was added."""
        return None if self._made is None else (self._made, self._whole)

    def _mean_at_once(self, made: NewModel) -> bool:
        """Writes the mean of the models held; False where some were refused instead."""
        weights = [held.weight for held in self._held]
        for run in self.layout.segments:
            odd = ErrorFreeSum.mean_at_once([held.model.segment(run) for held in self._held], weights, made.part(run))
            if odd:
                self._refuse(odd)
                return False
        self._count()
        return True

    def _add_held(self) -> None:
        """Adds the models held to the sums."""
        segments = self.layout.segments
        if self._sums is None:
            self._sums = [ErrorFreeSum(run[-1].end - run[0].begin) for run in segments]
        good, bad = list(range(len(self._held))), []
        for s, (run, total) in enumerate(zip(segments, self._sums, strict=True)):
            parts = [self._held[m].model.segment(run) for m in good]
            odd = [good[i] for i in total.add(parts, [self._held[m].weight for m in good])]
            for m in odd:
                model, weight, *_ = self._held[m]
                for before, earlier in zip(segments[:s], self._sums, strict=False):  # exact sums can be taken back
                    earlier.add([model.segment(before)], [-weight])
            bad += odd
            good = [m for m in good if m not in odd]
        self._refuse(sorted(bad))
        self._count()

    def _refuse(self, places: list[int]) -> None:
        for m in reversed(places):
            model, _, node, nth = self._held.pop(m)
            try:
                model.check_finite()
                misfit = Misfit("finite", "holds NaN, infinite or too large values")
            except Misfit as found:
                misfit = found
            self.refused.append(Refused(node, nth, misfit))

    def _count(self) -> None:
        for model, weight, *_ in self._held:
            self._weights.append(weight)
            for key, array in model.whole.items():
                self._whole[key] = largest(self._whole.get(key), array)
        self._held, self._bytes = [], 0
