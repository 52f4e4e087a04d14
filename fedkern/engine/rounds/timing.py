"""Seconds that a run has worked, over all its resumptions, and by phase."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Timing:
    """The clock of a run.

    Attributes:
        phases: seconds by phase, summed over the run.
    """

    def __init__(self) -> None:
        self._before, self._started = 0.0, time.perf_counter()
        self.phases: dict[str, float] = {}

    def begin(self) -> None:
        """Begin to count."""
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of work on this run."""
        return self._before + time.perf_counter() - self._started

    def add(self, phases: Mapping[str, float]) -> None:
        """Add seconds of phases."""
        for name, value in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + value

    def restore(self, seconds: float, phases: Mapping[str, float]) -> None:
        """Goes on from a checkpoint."""
        self._before, self.phases = seconds, dict(phases)
