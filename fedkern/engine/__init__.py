"""Engine that runs a method: round loop, local training, checkpoints, records."""

from fedkern.engine.run import run
from fedkern.engine.store.artifacts import read as read_shown
from fedkern.engine.store.extending import extend
from fedkern.engine.store.records import read_metrics, read_summary
from fedkern.interrupts import Terminated
from fedkern.listeners.events import Listener, Listeners, RunInfo
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data

__all__ = [
    "Listener",
    "Listeners",
    "RunConfig",
    "RunInfo",
    "Terminated",
    "extend",
    "load_data",
    "read_metrics",
    "read_shown",
    "read_summary",
    "run",
]
