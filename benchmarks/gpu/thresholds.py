"""Writes the sizes from which Triton serves instead of the CUDA core on one GPU, from recorded times of both.

python -m benchmarks.gpu.thresholds --results DIR    # into fedkern/ops/_core/crossovers.json, with a copy in DIR

DIR has what ``python -m pytest benchmarks --record --device cuda --results DIR`` wrote with ``FEDKERN_BACKEND=cuda``
and with ``FEDKERN_BACKEND=triton``.  A row counts where its call used one operator.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparisons import Comparison, Recorded, machine_difference, read_results
from fedkern.ops._core import dispatch
from fedkern.ops._core.crossovers import FILE, Entry, Times, read_entries, write_entries

BACKENDS = ("cuda", "triton")
MARGIN = 1.02
"""How many times faster Triton must be, in the geometric mean over the rows that it would serve."""
VERSIONS = ("torch", "cuda", "triton")
"""What of a file's machine an entry keeps, where it is there."""


class Refused(Exception):
    """No thresholds follow from what is there; the message is a sentence."""


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code; 2, with one sentence, where the recorded rows do not give thresholds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.thresholds", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder of recorded rows")
    parser.add_argument("--into", type=Path, default=FILE, metavar="FILE", help="the table, by default fedkern's own")
    parser.add_argument(
        "--gpu", metavar="NAME", help="the GPU, where rows of several are there; by default this machine's"
    )
    given = parser.parse_args(words)
    try:
        entry, left_out = measured(given.results, given.gpu)
        into = [one for one in _read(given.into) if one.gpu != entry.gpu]
        for path in dict.fromkeys((given.results / FILE.name, given.into)):
            _write([*into, entry], path)
    except Refused as refusal:
        print(f"{parser.prog}: {refusal}", file=sys.stderr)
        return 2
    for operator in dispatch.CROSSOVER:
        print(_told(operator, entry))
    if left_out:
        print(f"left out: {left_out} rows, recorded with one backend alone or with other tensors")
    print(f"{entry.gpu} in {given.into}")
    return 0


def measured(folder: Path, gpu: str | None) -> tuple[Entry, int]:
    """The entry of a GPU, and how many rows have no counterpart of the other backend.

    Args:
        folder: recorded rows.
        gpu: its name; None: the only one, else this machine's.

    Raises:
        Refused: no thresholds follow from the rows.
    """
    recorded = _of_one_gpu(_recorded(folder), folder, gpu)
    machine = _one_machine(recorded)
    by_backend = {
        name: {
            (row.group, row.case): row
            for one in recorded
            if one.machine["backend"] == name
            for row in one.rows
            if len(row.operators) == 1 and row.device == "cuda"
        }
        for name in BACKENDS
    }
    for name, rows in by_backend.items():
        if not rows:
            raise Refused(
                f"{folder} has no row of one operator that {name} served on {machine['gpu']}: play the operators' "
                f"stages of benchmarks/gpu/all.sh whose names end in {name}."
            )
    cuda, triton = (by_backend[name] for name in BACKENDS)
    both = [key for key in cuda if key in triton and cuda[key].operators == triton[key].operators]
    if not both:
        raise Refused(f"{folder} has no row that was recorded with both backends: play the operators' stages again.")
    times: dict[str, list[Times]] = {}
    for key in both:
        ((operator, size),) = cuda[key].operators.items()
        times.setdefault(operator, []).append(Times(size, *_seconds(cuda[key], triton[key])))
    times = {operator: sorted(rows) for operator, rows in sorted(times.items())}
    return Entry(
        gpu=machine["gpu"],
        capability=_capability(machine),
        versions={name: str(machine[name]) for name in VERSIONS if name in machine},
        time=max(row.time for key in both for row in (cuda[key], triton[key])),
        thresholds={operator: crossover(rows) for operator, rows in times.items()},
        times=times,
    ), len(cuda) + len(triton) - 2 * len(both)


def crossover(rows: Sequence[Times]) -> int | None:
    """The size from which Triton serves, so that the sum of the logarithms of the times is smallest; None: never."""
    best, chosen = 0.0, None
    for size in sorted({row.size for row in rows}, reverse=True):
        gains = [math.log(row.cuda / row.triton) for row in rows if row.size >= size]
        if sum(gains) > best:
            best, chosen = sum(gains), size
    served = [row for row in rows if chosen is not None and row.size >= chosen]
    return chosen if served and best >= len(served) * math.log(MARGIN) else None


def _seconds(cuda: Comparison, triton: Comparison) -> tuple[float, float]:
    """What a user waits for one of many calls; the kernels' times where one row lacks that."""
    both = all(row.ours in row.wall_seconds for row in (cuda, triton))
    found = [(row.wall_seconds if both else row.seconds)[row.ours] for row in (cuda, triton)]
    return float(f"{found[0]:.4g}"), float(f"{found[1]:.4g}")


def _recorded(folder: Path) -> list[Recorded]:
    """The files of forced backends on GPUs."""
    if not folder.is_dir():
        raise Refused(
            f"{folder} is no folder of recorded rows: play the operators' stages of benchmarks/gpu/all.sh first."
        )
    try:
        every = [one for files in read_results(folder).values() for one in files]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Refused(
            f"{folder} has a file of rows that cannot be read ({error}): remove it, and record it again."
        ) from None
    found = [one for one in every if one.machine.get("backend") in BACKENDS and one.machine.get("gpu")]
    if not found:
        raise Refused(
            f"{folder} has no rows that a forced backend served on a GPU: play the operators' stages of "
            "benchmarks/gpu/all.sh first."
        )
    return found


def _of_one_gpu(recorded: Sequence[Recorded], folder: Path, gpu: str | None) -> list[Recorded]:
    names = sorted({str(one.machine["gpu"]) for one in recorded})
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    wanted = gpu or (names[0] if len(names) == 1 else here)
    if wanted not in names:
        raise Refused(f"{folder} has rows of {', '.join(names)}: name one of them with --gpu.")
    return [one for one in recorded if one.machine["gpu"] == wanted]


def _one_machine(recorded: Sequence[Recorded]) -> dict[str, Any]:
    """The machine of all files, which differ by backend alone."""
    first = recorded[0]
    for one in recorded[1:]:
        ours, theirs = ({**each.machine, "backend": ""} for each in (one, first))
        difference = machine_difference(ours, theirs)
        for name in ("cuda", "triton"):
            if not difference and ours.get(name) != theirs.get(name):
                difference = f"recorded with {name} {ours.get(name)}, but here it is {theirs.get(name)}"
        if difference:
            there = difference.replace(", but here it is", f", but in {first.name}.json it is")
            raise Refused(
                f"{one.name}.json was {there}: thresholds need all rows of one machine and its versions, so remove the "
                "older files and record them again."
            )
    return first.machine


def _capability(machine: Mapping[str, Any]) -> tuple[int, int]:
    try:
        major, minor = (int(part) for part in str(machine["capability"]).split("."))
    except (KeyError, ValueError):
        raise Refused(f"the rows of {machine['gpu']} do not tell its compute capability: record them again.") from None
    return major, minor


def _read(path: Path) -> tuple[Entry, ...]:
    try:
        return read_entries(path) if path.exists() else ()
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{path} cannot be read ({reason}): put it back, or remove it to begin a new one.") from None


def _write(entries: Sequence[Entry], path: Path) -> None:
    try:
        write_entries(entries, path)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror or error}): name another file with --into.") from None


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
