"""Clocks, and turns of implementations, for the measurements of :func:`harness.compare`."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

SAMPLE_SECONDS = 2e-3  # a timing sample repeats a shorter call until it lasts about this long
MAX_CALLS = 100  # of a sample on a GPU, whose events are all kept until its end
LONGEST_DELAY = 2e-3  # seconds; calls that take the host longer leave gaps that hardly count
CYCLES = 2e9  # of a GPU's clock in a second, or a little more
Run = Callable[[], Any]


class Clock(Protocol):
    """Timer of calls on one kind of device."""

    def sample(self, run: Run, count: int) -> float:
        """Return seconds per call over ``count`` calls."""
        ...

    def wall(self, run: Run, count: int) -> float | None:
        """Return wall seconds per call over ``count`` calls in a row, or None where :meth:`sample` returns the same."""
        ...


class CpuClock:
    """Wall time of calls in a row, with caches as the earlier calls left them."""

    def sample(self, run: Run, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count

    def wall(self, run: Run, count: int) -> float | None:
        return None


class ThreadClock(CpuClock):
    """Processor time of the calling thread: of a busy machine's time slices only those of this thread."""

    def sample(self, run: Run, count: int) -> float:
        start = time.thread_time()
        for _ in range(count):
            run()
        return (time.thread_time() - start) / count


class CudaClock:
    """Time between two events around each call, other memory read into the L2 cache before it.

    The host's share is wall time.  (A cache that is overwritten is full of lines that are still to be written, which
    the call would wait for.)

    The device is kept busy while the host enqueues a call, so that the events measure its kernels and not the gaps
    between them: half as long again as the first call of a sample took the host, at most :data:`LONGEST_DELAY`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(max(2 * size, 1 << 26) // 4, device=device)

    def sample(self, run: Run, count: int) -> float:
        count = min(count, MAX_CALLS)
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        run()
        delay = int(min(1.5 * (time.perf_counter() - begin), LONGEST_DELAY) * CYCLES)
        for start, end in marks:
            self._flush.sum()
            torch.cuda._sleep(delay)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3

    def wall(self, run: Run, count: int) -> float | None:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / count


def clock(device: torch.device, *, one_thread: bool = False) -> Clock:
    """Return the clock of a device.

    ``one_thread`` where all work is the caller's and others may keep the processor busy.
    """
    if device.type == "cuda":
        return CudaClock(device)
    return ThreadClock() if one_thread else CpuClock()


def interleave(
    runs: dict[str, Run], pairs: int, clock: Clock, *, longest: float, fewest: int = 15
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Let implementations take turns, in which the first changes from pair to pair.

    Args:
        pairs: how many samples of each.
        longest: seconds after which no further pair starts once there are ``fewest``.

    Returns:
        ``sample`` and ``wall`` of each.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        run()
        seconds = max(clock.sample(run, 1), clock.wall(run, 1) or 0.0)
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(seconds, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    walls: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    begin = time.perf_counter()
    for pair in range(pairs):
        turn = pair % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clock.sample(runs[name], repeats[name]))
            wall = clock.wall(runs[name], repeats[name])
            if wall is not None:
                walls[name].append(wall)
        if pair + 1 >= fewest and time.perf_counter() - begin > longest:
            break
    return samples, walls


def scatter(values: list[float]) -> float:
    """Return the interquartile range over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
