"""Trace of one round: the time that every operator took, to view in a browser."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fedkern import atomic

FILE = "profile.json.gz"


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Traces what runs inside, and writes a gzipped trace to ``path`` for chrome://tracing or ui.perfetto.dev.

    Raises:
        UserError: the file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library prints when it begins and ends
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as seen:
        yield
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(plain))
        atomic.write_bytes(path, gzip.compress(plain.read_bytes(), 6))
