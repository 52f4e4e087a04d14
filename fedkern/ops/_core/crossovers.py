"""Measured sizes from which Triton serves instead of the CUDA core: the entry of every GPU, and their file.

``python -m benchmarks.gpu.thresholds`` writes crossovers.json from recorded times; dispatch.py decides by it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedkern import files
from fedkern.inputs import open_regular, parse_json
from fedkern.ops._core.loading import tell

FILE = Path(__file__).with_name("crossovers.json")
FORMAT = 1
LARGEST = 4 << 20  # most bytes of a file that is read


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
    entries, problem = shipped()
    if problem:
        tell(problem)
    alike = [entry for entry in entries if entry.capability[0] == capability[0]]
    named = [entry for entry in entries if entry.gpu == gpu]
    return max(named or alike, key=lambda entry: entry.time, default=None)


def shipped() -> tuple[tuple[Entry, ...], str]:
    """The entries of :data:`FILE`, which is read once, and why it is ignored, as a sentence ("" if it is not)."""
    return _shipped(FILE)


@functools.cache
def _shipped(path: Path) -> tuple[tuple[Entry, ...], str]:
    try:
        return read_entries(path), ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return (), (
            f"{path} is ignored ({reason}), so that estimates choose between CUDA and Triton: put the file back, or "
            "install fedkern again."
        )


def write_entries(entries: Sequence[Entry], path: Path) -> None:
    """Writes the file, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    each = []
    for entry in entries:
        head = asdict(entry)
        times = head.pop("times")
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in times.items())
        each.append(f'{json.dumps(head)[:-1]}, "times": {{\n{lines}\n }}}}')
    text = f'{{"format": {FORMAT}, "entries": [' + ",".join(f"\n {one}" for one in each) + "]}\n"
    files.replace(path, lambda temporary: temporary.write_text(text))


def read_entries(path: Path) -> tuple[Entry, ...]:
    """Reads the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has another form; the message is a clause that says why.
    """
    with open_regular(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    try:
        found = parse_json(content.decode())
    except ValueError:
        raise ValueError("it is no JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is no table of format {FORMAT}")
    try:
        return tuple(_entry(each) for each in found["entries"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("it lacks what a table has, or has something else in its place") from None


def _entry(given: Any) -> Entry:
    major, minor = given["capability"]
    return Entry(
        gpu=_text(given["gpu"]),
        capability=(_size(major), _size(minor)),
        versions={_text(name): _text(version) for name, version in given["versions"].items()},
        time=_text(given["time"]),
        thresholds={_text(name): None if size is None else _size(size) for name, size in given["thresholds"].items()},
        times={
            _text(name): tuple(Times(_size(size), _seconds(cuda), _seconds(triton)) for size, cuda, triton in rows)
            for name, rows in given["times"].items()
        },
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError
    return float(value)
