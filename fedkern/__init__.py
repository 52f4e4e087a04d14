"""fedkern: fast kernels for federated learning, and five published methods built on them.

``fedkern.ops`` holds the operators and ``fedkern.methods`` the methods. :func:`fedkern.simulate` runs a method, as the
command ``fedkern`` does. :func:`fedkern.load` opens the folder of a run, and :func:`fedkern.compare` compares methods
over seeds. The decorators for plugins (docs/plugins.md) are here too.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkern.acceleration import accelerate, plain
    from fedkern.api import History, Run, load, simulate
    from fedkern.comparison.compared import Comparison, compare
    from fedkern.data import FederatedData, register_data
    from fedkern.engine.parts.part import Part, Stop
    from fedkern.engine.setup.order import register_filter, register_part
    from fedkern.engine.uploads.filters import Filter
    from fedkern.errors import UserError
    from fedkern.foreign_runs.recording import hash_labels, record
    from fedkern.methods import option, register, register_aggregator, register_metric
    from fedkern.models import register_model
    from fedkern.privacy.guarantee import About

try:
    __version__ = metadata.version("fedkern")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "About", "Comparison", "FederatedData", "Filter", "History", "Part", "Run", "Stop", "UserError", "__version__",
    "accelerate", "compare", "hash_labels", "load", "option", "plain", "record", "register", "register_aggregator",
    "register_data", "register_filter", "register_metric", "register_model", "register_part", "simulate",
]  # fmt: skip

_LAZY = {
    **dict.fromkeys(("History", "Run", "load", "simulate"), "fedkern.api"),
    **dict.fromkeys(("Comparison", "compare"), "fedkern.comparison.compared"),
    **dict.fromkeys(("hash_labels", "record"), "fedkern.foreign_runs.recording"),
    **dict.fromkeys(("FederatedData", "register_data"), "fedkern.data"),
    **dict.fromkeys(("accelerate", "plain"), "fedkern.acceleration"),
    **dict.fromkeys(("option", "register", "register_aggregator", "register_metric"), "fedkern.methods"),
    **dict.fromkeys(("Part", "Stop"), "fedkern.engine.parts.part"),
    **dict.fromkeys(("register_filter", "register_part"), "fedkern.engine.setup.order"),
    "About": "fedkern.privacy.guarantee",
    "Filter": "fedkern.engine.uploads.filters",
    "UserError": "fedkern.errors",
    "register_model": "fedkern.models",
}
"""Names that are imported on first use, with their modules, because torch takes a second to load."""


def __getattr__(name: str) -> Any:
    if name == "listeners":  # a package, so that fedkern.listeners.WandB needs no import of its own
        return import_module("fedkern.listeners")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "UserError":
        import_module("fedkern.files.filesystem").check_working_folder()
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
