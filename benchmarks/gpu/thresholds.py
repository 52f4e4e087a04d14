"""Writes the sizes from which Triton serves instead of the CUDA core on one GPU, from the times of both.

python -m benchmarks.gpu.thresholds --results DIR    # into fedkern/ops/_core/crossovers.json

DIR has the ``kernels.json`` of ``python -m benchmarks.gpu.kernels --results DIR``.  A row counts where its call used
one operator.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import kernels
from fedkern.ops._core import dispatch
from fedkern.ops._core.crossovers import FILE, Entry, Times, read_entries, write_entries

MARGIN = 1.02
"""How many times faster Triton must be, in the geometric mean over the rows that it would serve."""
VERSIONS = ("torch", "cuda", "triton")
"""What of the machine an entry keeps."""


class Refused(Exception):
    """No thresholds follow from what is there; the message is a sentence."""


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code; 2, with one sentence, where the rows do not give thresholds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.thresholds", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder of kernels.json")
    parser.add_argument("--into", type=Path, default=FILE, metavar="FILE", help="the table, by default fedkern's own")
    given = parser.parse_args(words)
    try:
        entry = measured(given.results / kernels.FILE)
        others = [one for one in _read(given.into) if one.gpu != entry.gpu]
        write_entries([*others, entry], given.into)
    except Refused as refusal:
        print(f"{parser.prog}: {refusal}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or error
        print(
            f"{parser.prog}: {given.into} cannot be written ({reason}): name another file with --into.", file=sys.stderr
        )
        return 2
    for operator in dispatch.CROSSOVER:
        print(_told(operator, entry))
    print(f"{entry.gpu} in {given.into}")
    return 0


def measured(path: Path) -> Entry:
    """The entry of the GPU that measured.

    Raises:
        Refused: no thresholds follow from the rows.
    """
    try:
        content = json.loads(path.read_text())
        machine, rows = content["machine"], content["rows"]
        major, minor = (int(part) for part in machine["capability"].split("."))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({error}): play the stage 'kernels' of benchmarks/gpu/all.sh.") from None
    walls: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        if len(row.get("operators", ())) == 1:
            ((operator, size),) = row["operators"].items()
            key = operator, size, row["operator"], row["size"], row["dtype"], row["odd"]
            walls.setdefault(key, {})[row["backend"]] = float(f"{row['wall']:.4g}")
    times: dict[str, list[Times]] = {}
    for (operator, size, *_), wall in sorted(walls.items()):
        if "cuda" in wall and "triton" in wall:
            times.setdefault(str(operator), []).append(Times(size, wall["cuda"], wall["triton"]))
    if not times:
        raise Refused(f"{path} has no row of one operator that was measured with both cuda and triton: measure both.")
    return Entry(
        gpu=machine["gpu"],
        capability=(major, minor),
        versions={name: str(machine[name]) for name in VERSIONS if name in machine},
        time=machine["time"],
        thresholds={operator: crossover(found) for operator, found in times.items()},
        times=times,
    )


def crossover(rows: Sequence[Times]) -> int | None:
    """The size from which Triton serves, so that the sum of the logarithms of the times is smallest; None: never."""
    best, chosen = 0.0, None
    for size in sorted({row.size for row in rows}, reverse=True):
        gains = [math.log(row.cuda / row.triton) for row in rows if row.size >= size]
        if sum(gains) > best:
            best, chosen = sum(gains), size
    served = [row for row in rows if chosen is not None and row.size >= chosen]
    return chosen if served and best >= len(served) * math.log(MARGIN) else None


def _read(path: Path) -> tuple[Entry, ...]:
    try:
        return read_entries(path) if path.exists() else ()
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{path} cannot be read ({reason}): put it back, or remove it to begin a new one.") from None


def _told(operator: str, entry: Entry) -> str:
    if operator not in entry.thresholds:
        return f"{operator}: no rows, the estimate stays"
    rows, size = entry.times[operator], entry.thresholds[operator]
    if size is None:
        return f"{operator}: CUDA at every size ({len(rows)} rows)"
    served = [math.log(row.cuda / row.triton) for row in rows if row.size >= size]
    gain = math.exp(sum(served) / len(served))
    return f"{operator}: Triton from {size:,} bytes, {gain:.2f}× as fast there ({len(served)} of {len(rows)} rows)"


if __name__ == "__main__":
    sys.exit(main())
