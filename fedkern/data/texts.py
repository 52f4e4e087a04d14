"""Cleaning up captions and radiology reports."""

from __future__ import annotations

import re

SECTIONS = ("impression", "findings")
# "Findings:" at the beginning of a line, "FINDINGS:" anywhere (some tables have lost the line breaks); reports have
# other sections between and after those that are wanted.
_HEADER = re.compile(r"(?m)(?:^[ \t]*([A-Z][A-Za-z /,&()-]{2,60})|\b([A-Z][A-Z /&()-]{3,60})):")
_NUMBERED = re.compile(r"(?:^|(?<=\s))\d+[.)](?=\s)")
_BLANKED = re.compile(r"_{2,}")  # what MIMIC's de-identification leaves


def sections(report: str) -> dict[str, str]:
    """The sections of a report by their header in lower case; empty where it has none like ``FINDINGS:``."""
    headers = list(_HEADER.finditer(report))
    bounds = [header.start() for header in headers] + [len(report)]
    found: dict[str, str] = {}
    for header, end in zip(headers, bounds[1:], strict=True):
        name = (header.group(1) or header.group(2)).strip().lower()
        found[name] = f"{found.get(name, '')} {report[header.end() : end]}".strip()
    return found


def impression_and_findings(report: str) -> str:
    """The sections impression and findings of a report, in this order; all of it where it has neither."""
    parts = sections(report)
    wanted = [parts[name] for name in SECTIONS if parts.get(name)]
    return " ".join(wanted) if wanted else report


def clean(text: str, longest: int) -> str:
    r"""Lower-cased ``\w+`` tokens, at most ``longest`` of them (method notes 3.8).

    The numbers of a numbered list and the blanks of de-identified reports are left out.
    """
    words = re.findall(r"\w+", _NUMBERED.sub(" ", _BLANKED.sub(" ", text)).lower())
    return " ".join(words[:longest])


def length(text: str) -> int:
    """Number of tokens of a cleaned text."""
    return len(text.split())
