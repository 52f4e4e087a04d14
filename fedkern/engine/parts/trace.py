"""Trace of one round (``--profile``)."""

import gzip
import os
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fedkern.engine.parts.part import Part, Record, RunPart, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.run_folder import TRACE
from fedkern.files import atomic


@register_part("trace")
class Trace(RunPart):
    """Part that traces the second communication round of the process, or the only one, into a gzipped file.

    The file opens in chrome://tracing or ui.perfetto.dev. All clients of the round work in the server's process.
    """

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._wait = 1  # communication rounds to play before the traced one
        self._running: profile | None = None

    @classmethod
    def build(cls, run: RunObjects) -> Part | None:
        return cls(run) if run.request.profile else None

    def before_round(self, record: Record) -> None:
        if record.entry.one_off:
            return
        if self._wait == 0 or (record.last and self._wait > 0):
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library prints at its start
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._running.start()
            record.in_server_process = True
        self._wait -= 1

    def round_end(self, record: Record) -> None:
        if self._running is None:
            return
        seen, self._running = self._running, None
        seen.stop()
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(plain))
            atomic.write_bytes(self._run.out / TRACE, gzip.compress(plain.read_bytes(), 6))

    def close(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None
