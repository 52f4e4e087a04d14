"""Final figures of a run on every test set (evaluation.csv)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedkern.files import atomic
from fedkern.tasks.figure_names import OVER_CLIENTS

EVALUATION = "evaluation.csv"
COLUMNS = ("client", "test_set", "metric", "value")
ONLY, OWN = "test", "own"
"""Names in the column ``test_set``: a run's only test set, and a client's own test set."""
_LEFT_OUT = ("validation_", *OVER_CLIENTS)

Row = tuple[str, str, str, float | None]


def rows(
    metrics: Mapping[str, float],
    prefixes: Sequence[str],
    by_client: Mapping[int, Mapping[str, float | None]],
    names: Sequence[str] | None = None,
    test_set: str = OWN,
) -> Iterator[Row]:
    """Yield the rows of the file: first the test sets of the run, then every client's own.

    Args:
        metrics: figures by name, with the prefix of their test set; figures over clients are left out.
        prefixes: prefixes of the test sets (``""``, ``"id_"``); ``validation_`` is left out.
        by_client: public figures by client, None if undefined.
        test_set: `OWN`, or `ONLY` if ``by_client`` is of every client's part of the run's test set.
    """
    by_length = sorted({*prefixes, "", *_LEFT_OUT}, key=len, reverse=True)
    for name, value in metrics.items():
        prefix = next(prefix for prefix in by_length if name.startswith(prefix))
        if prefix not in _LEFT_OUT:
            yield "", prefix.removesuffix("_") or ONLY, name.removeprefix(prefix), value
    for k, own_figures in by_client.items():
        client = str(k) if names is None else names[k]
        yield from ((client, test_set, name, value) for name, value in own_figures.items())


def write_evaluation(out: Path, table: Iterator[Row]) -> None:
    """Write evaluation.csv atomically: a header, then one row per figure, in full precision, empty if undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(
        (client, test_set, name, "" if value is None else repr(float(value))) for client, test_set, name, value in table
    )
    atomic.write_bytes(out / EVALUATION, text.getvalue().encode())
