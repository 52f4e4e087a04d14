"""Output for people: progress, tables and pictures of a run, and the state of the installation.

The modules are imported on first use, as importing matplotlib alone takes half a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkern.report.pictures import write_pictures

__all__ = ["write_pictures"]


def __getattr__(name: str) -> Any:
    if name == "write_pictures":
        from fedkern.report.pictures import write_pictures

        return write_pictures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
