"""What a run tells while it works: warnings, notices, and which of its figures may be told."""

from __future__ import annotations

from collections.abc import Callable

from fedkern.privacy.disclosure import Disclosure


class Notices:
    """Warnings and notices of a run.

    Attributes:
        warnings: texts by name; every name is told once.
        disclosure: what of the run may be told.
        on_notice: called with the text of every notice; None: nobody listens.
    """

    def __init__(self, disclosure: Disclosure, on_notice: Callable[[str], None] | None = None) -> None:
        self.disclosure, self.on_notice = disclosure, on_notice
        self.warnings: dict[str, str] = {}

    def warn(self, name: str, text: str) -> None:
        """Add a warning, unless there is one of that name."""
        self.warnings.setdefault(name, text)

    def notice(self, text: str) -> None:
        """Pass a notice on."""
        if self.on_notice is not None:
            self.on_notice(text)
