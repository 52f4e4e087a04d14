"""Seconds of work on a run over all its resumptions, and by phase."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Timing:
    """Clock of a run, with ``phases`` in seconds over the whole run."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, time.perf_counter()
        self.phases: dict[str, float] = {}

    def begin(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def add(self, phases: Mapping[str, float]) -> None:
        for name, value in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + value

    def restore(self, seconds: float, phases: Mapping[str, float]) -> None:
        self._before, self.phases = seconds, dict(phases)
