"""Listeners that hand a run's figures to trackers, and the base class of user-defined listeners (docs/listeners.md)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkern.listeners.events import Listener, Listeners, RunInfo
    from fedkern.listeners.mlflow import MLflow
    from fedkern.listeners.tensorboard import TensorBoard
    from fedkern.listeners.wandb import WandB

__all__ = ["Listener", "Listeners", "MLflow", "RunInfo", "TensorBoard", "WandB"]

_LAZY = {
    **dict.fromkeys(("Listener", "Listeners", "RunInfo"), "fedkern.listeners.events"),
    "MLflow": "fedkern.listeners.mlflow",
    "TensorBoard": "fedkern.listeners.tensorboard",
    "WandB": "fedkern.listeners.wandb",
}
"""Names that are imported on first use, with their modules."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
