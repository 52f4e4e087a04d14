"""Measured sizes from which Triton serves instead of the CUDA core: the entry of every GPU, and their file.

``python -m benchmarks.gpu.thresholds`` writes crossovers.json from recorded times; dispatch.py decides by it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedkern import files

FILE = Path(__file__).with_name("crossovers.json")


class Times(NamedTuple):
    """Seconds of one call by both backends.

    Attributes:
        size: bytes of the call's first tensor.
    """

    size: int
    cuda: float
    triton: float


@dataclass(frozen=True)
class Entry:
    """What was measured on one GPU.

    Attributes:
        gpu: the name that torch gives it.
        capability: its compute capability.
        versions: of the packages that measured.
        time: when the last time was measured, as an ISO date with time.
        thresholds: by operator, bytes of a call's first tensor from which Triton serves; None: never.
        times: by operator, what its threshold follows from.
    """

    gpu: str
    capability: tuple[int, int]
    versions: Mapping[str, str]
    time: str
    thresholds: Mapping[str, int | None]
    times: Mapping[str, Sequence[Times]] = field(repr=False)

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 of the thresholds."""
        return hashlib.sha256(json.dumps(sorted(self.thresholds.items())).encode()).hexdigest()[:16]


def serving(gpu: str, capability: tuple[int, int]) -> Entry | None:
    """The entry of the GPU's name, else the latest of its major compute capability, else None."""
    entries = read_entries(FILE)
    alike = [entry for entry in entries if entry.capability[0] == capability[0]]
    named = [entry for entry in entries if entry.gpu == gpu]
    return max(named or alike, key=lambda entry: entry.time, default=None)


def write_entries(entries: Sequence[Entry], path: Path) -> None:
    """Writes the file, completely or not at all."""
    each = []
    for entry in entries:
        head = asdict(entry)
        times = head.pop("times")
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in times.items())
        each.append(f'{json.dumps(head)[:-1]}, "times": {{\n{lines}\n }}}}')
    text = "[" + ",".join(f"\n {one}" for one in each) + "]\n"
    files.replace(path, lambda temporary: temporary.write_text(text))
    read_entries.cache_clear()


@functools.cache
def read_entries(path: Path) -> tuple[Entry, ...]:
    """Reads the file, once in a process; TypeError or ValueError where it is none of :func:`write_entries`."""
    entries = json.loads(path.read_text())
    if not isinstance(entries, list):
        raise ValueError("it is no list of GPUs")
    return tuple(_entry(**each) for each in entries)


def _entry(capability: list[int], times: dict[str, list[list[float]]], **rest: Any) -> Entry:
    named = {name: tuple(Times(int(size), *seconds) for size, *seconds in rows) for name, rows in times.items()}
    return Entry(capability=(capability[0], capability[1]), times=named, **rest)
