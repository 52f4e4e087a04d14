"""fedkern: fast kernels for federated learning, and five published methods built on them.

``fedkern.ops`` holds the operators and ``fedkern.methods`` the methods.  :func:`fedkern.simulate` runs a method, as the
command ``fedkern`` does, and :func:`fedkern.load` opens the folder of a run.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkern.api import History, Run, load, simulate
    from fedkern.data import FederatedData
    from fedkern.errors import UserError

try:
    __version__ = metadata.version("fedkern")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["FederatedData", "History", "Run", "UserError", "__version__", "load", "simulate"]

_ROOMS = {
    **dict.fromkeys(("History", "Run", "load", "simulate"), "fedkern.api"),
    "FederatedData": "fedkern.data",
    "UserError": "fedkern.errors",
}
"""Module of each name, imported when the name is used: torch takes a second to load."""


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'fedkern' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
