"""Peak speed of this processor, measured on request and cached; the speed of a run is compared with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional

from fedkern.engine.network import cpu_threads
from fedkern.engine.store import atomic
from fedkern.errors import UserError
from fedkern.inputs import read_json
from fedkern.ops._core.processor import processor

SIDE = 1024
"""Rows and columns of the square matrices that are multiplied."""
BATCH, CHANNELS, PIXELS = 16, 128, 28
"""Images, channels, and height and width of the 3x3 convolution's input."""
COPIED_BYTES = 256 << 20
SECONDS = 0.5
"""Seconds for which each measurement is repeated; the fastest repetition counts."""


@dataclass(frozen=True)
class Rates:
    """Speeds that a number of threads reaches.

    Attributes:
        fp32, bf16: floating-point operations per second of a large matrix product or convolution.
        copied: bytes per second that a large copy reads and writes.
    """

    fp32: float
    bf16: float
    copied: float


@dataclass(frozen=True)
class Peak:
    """A measurement of a processor.

    Attributes:
        processor: the processor's name.
        torch: PyTorch's version.
        measured: the day, as YYYY-MM-DD.
        threads: the rates by number of threads.
    """

    processor: str
    torch: str
    measured: str
    threads: Mapping[int, Rates]


def file() -> Path | None:
    """Path for this processor's measurements, which may not exist; None where the user has no home folder."""
    return processor().cache_file("peaks")


def measure(counts: Sequence[int]) -> Iterator[tuple[int, Rates]]:
    """Measures for each number of threads, three seconds each."""
    for count in counts:
        with cpu_threads(count):
            fp32, bf16 = (_flops_per_second(dtype) for dtype in (torch.float32, torch.bfloat16))
            source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
            target = torch.empty_like(source)
            copied = 2 * COPIED_BYTES / _fastest(lambda a=source, b=target: b.copy_(a))  # type: ignore[misc]
        yield count, Rates(fp32, bf16, copied)


def _flops_per_second(dtype: torch.dtype) -> float:
    """Rate of a large matrix product or a large convolution; two libraries compute them, and the faster one counts."""
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    images = torch.ones(BATCH, CHANNELS, PIXELS, PIXELS, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return max(
            2 * SIDE**3 / _fastest(lambda: torch.mm(a, b, out=product)),
            2 * 9 * images.numel() * CHANNELS / _fastest(lambda: functional.conv2d(images, weight, padding=1)),
        )


def _fastest(do: Callable[[], object]) -> float:
    """Seconds of the fastest call.  Calls are repeated for SECONDS, at least three times."""
    do()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return min(times)


def keep(rates: Mapping[int, Rates]) -> Path:
    """Writes measurements of this processor to the user's cache folder.

    Raises:
        UserError: there is no home folder, or the file cannot be written.
    """
    path = file()
    if path is None:
        raise UserError("There is no home folder to keep the measurement in: set FEDKERN_CACHE_DIR to a folder.")
    found = Peak(processor().name, torch.__version__, datetime.now(UTC).strftime("%Y-%m-%d"), rates)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.unwritable(path, error) from None
    atomic.write_bytes(path, (json.dumps(asdict(found), indent=1) + "\n").encode())
    return path


def read() -> Peak | None:
    """The measurement of this processor; None where there is none, or the file holds something else."""
    path = file()
    if path is None or not path.exists():
        return None
    try:
        told = read_json(path)
        threads = {int(count): Rates(**{k: float(v) for k, v in one.items()}) for count, one in told["threads"].items()}
        found = Peak(str(told["processor"]), str(told["torch"]), str(told["measured"]), threads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.processor == processor().name else None


def of_a_run(workers: int, client_threads: int, precision: str) -> float | None:
    """Peak floating-point operations per second of all ``workers`` together; None where it was not measured."""
    found = read()
    rates = None if found is None else found.threads.get(workers * client_threads)
    return None if rates is None else getattr(rates, precision)
