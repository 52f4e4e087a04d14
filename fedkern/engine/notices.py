"""Warnings and notices of a run, and which figures may be disclosed."""

from __future__ import annotations

from collections.abc import Callable

from fedkern.privacy.disclosure import Disclosure


class Notices:
    """Warnings and notices of a run.

    Attributes:
        warnings: texts by name; the first of each name counts.
        on_notice: called with the text of every notice, or None.
    """

    def __init__(self, disclosure: Disclosure, on_notice: Callable[[str], None] | None = None) -> None:
        self.disclosure, self.on_notice = disclosure, on_notice
        self.warnings: dict[str, str] = {}

    def warn(self, name: str, text: str) -> None:
        self.warnings.setdefault(name, text)

    def notice(self, text: str) -> None:
        if self.on_notice is not None:
            self.on_notice(text)
