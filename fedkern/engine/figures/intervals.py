"""95 % intervals of figures: how far other patients, cases or samples of the same kind would move them.

A bootstrap draws units (patients, or else cases, or else samples) with replacement, with all their samples, and
computes the figure of every draw. The interval lies between two percentiles of these figures. With few units the
percentiles lie farther out, as Student's t does (the expanded percentile interval of Hesterberg, What Teachers Should
Know About the Bootstrap, arXiv 1411.5279).

The accuracy of a network on independent samples has Wilson's interval. So has a fraction that all draws agree on, at
the number of units. The network is taken as fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from torch import Tensor

from fedkern.data import FederatedData
from fedkern.data.sharing.groups import unit_noun
from fedkern.engine.figures.final_figures import kept_answers, set_name
from fedkern.methods.roles import EvaluatedSet
from fedkern.streams import stream
from fedkern.tasks.figure_names import scale
from fedkern.tasks.task import Floats, Rows

LEVEL, DRAWS = 0.95, 2000
LEAST = 5
"""Fewest units of an interval from draws."""
MOST = 1 << 22
"""Most numbers drawn at once."""
Row = dict[str, Any]


def intervals(
    sets: Mapping[str, EvaluatedSet],
    own_sets: Mapping[int, EvaluatedSet],
    federation: FederatedData,
    seed: int,
    own: bool,
) -> list[Row]:
    """Return the intervals on the test sets and for the clients, from what the last evaluation kept.

    Args:
        sets: the test sets (`fedkern.engine.batches.reader.Reader`) by the prefix of their figures' names.
        own_sets: the clients' own test sets; if there are none, the parts of ``sets`` from a client's site.
        own: whether a client is judged by its own network.

    Returns:
        Rows with ``set``, possibly ``client``, ``figure``, ``value``, ``low``, ``high``, ``unit`` in the plural,
        ``units`` and ``samples``. ``low`` and ``high`` are None with fewer than 5 units, and if all draws agree on a
        figure that is no fraction. Figures of pairs and users' metrics have no row.
    """
    names = federation.client_names
    places = [
        ({"set": set_name(prefix)}, data, -1, np.arange(len(data)))
        for prefix, data in sets.items()
        if prefix != "validation_"
    ]
    places += [
        ({**about, "client": name}, data, k, (data.split.homes == k).nonzero().flatten().numpy())
        for about, data, _, _ in ([] if own_sets else places)
        for k, name in enumerate(() if data.split.homes is None else names or federation.form.sites)
    ]
    for k, data in own_sets.items():
        places.append(({"set": "own", "client": str(k) if names is None else names[k]}, data, k, np.arange(len(data))))
    found = []
    for about, data, k, rows in places:
        kept = kept_answers(data, len(federation.classes))
        outputs = [output for owner, output in kept if not own or k < 0 or owner in (None, k)]
        name = data.task.sampled
        if name and outputs and len(rows):
            row = _interval(data, name, outputs, rows, stream(seed, f"interval/{about['set']}", client=k))
            found += [] if math.isnan(row["value"]) else [{**about, **row}]
    return found


def _interval(data: EvaluatedSet, name: str, outputs: Sequence[Tensor], rows: Rows, rng: np.random.Generator) -> Row:
    split, task, cases = data.split, data.task, getattr(data, "cases", None)
    labels = data.labels if task.target == "pixels" else data.labels.cpu()  # masks may be in a file
    groups, rows = split.units(), rows[rows < len(labels)]  # a collation may drop items
    units = np.unique(rows if groups is None else groups[rows], return_inverse=True)[1]
    count = int(units.max()) + 1

    def figure(counts: Floats) -> Floats:
        drawn = [task.resample_figure(output, labels, cases, rows, units, counts) for output in outputs]
        return np.asarray(np.mean(drawn, 0))

    low, high, value = None, None, float(figure(np.ones((1, count)))[0])
    if groups is None and len(outputs) == 1 and name == "accuracy":
        known = int((~task.parts(outputs[0], labels, cases)[rows].isnan()).sum())
        low, high = wilson(round(value * known), known) if known else (None, None)
    elif count >= LEAST and not math.isnan(value):
        from scipy.special import ndtr, stdtrit

        size = max(1, MOST // len(rows))
        sizes = [min(size, DRAWS - begun) for begun in range(0, DRAWS, size)]
        figures = np.concatenate([figure(_counts(rng, draws, count)) for draws in sizes])
        tail = float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - LEVEL) / 2)))
        low, high = map(float, np.nanquantile(figures, [tail, 1 - tail]))
        if low == high:
            low, high = wilson(value * count, count) if scale(name)[1] else (None, None)
    unit = "samples" if groups is None else unit_noun(cases, split.patients)
    return {
        "figure": name, "value": value, "low": low, "high": high, "unit": unit, "units": count,
        "samples": len(rows),
    }  # fmt: skip


def _counts(rng: np.random.Generator, draws: int, units: int) -> Floats:
    """Draw units with replacement, and count each in every draw, fp64 ``[draws, units]``."""
    places = rng.integers(0, units, (draws, units)) + units * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * units).reshape(draws, units).astype(np.float64)


def wilson(count: float, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, ``count`` of ``total`` (at least 1)."""
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (2 * count + normal**2) / (2 * (total + normal**2))
    half = normal * math.sqrt(4 * count * (total - count) / total + normal**2) / (2 * (total + normal**2))
    return 0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half
