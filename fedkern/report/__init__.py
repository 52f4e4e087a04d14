"""What a run shows: progress, tables, pictures, and the state of the installation.

The modules are imported where they are used: matplotlib alone takes half a second.
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
