"""Cleaning of captions and radiology reports."""

from __future__ import annotations

import re

SECTIONS = ("impression", "findings")
# Sections beside `SECTIONS`.  Any other word before a colon ("Lungs:", "LINES AND TUBES:") is part of the text.
OTHERS = (
    "addendum", "attending", "clinical data", "clinical details", "clinical history", "clinical impression",
    "clinical indication", "clinical information", "comment", "comments", "comparison", "comparison exam",
    "comparison film", "comparisons", "conclusion", "conclusions", "dictated by", "dose", "electronically signed by",
    "exam", "exam type", "examination", "history", "indication", "indications", "interpreted by", "medical condition",
    "notification", "notifications", "patient history", "prior studies", "procedure", "provisional findings impression",
    "reason for exam", "reason for examination", "reason for study", "reason for this examination", "recommendation",
    "recommendations", "recommendation(s)", "reference exam", "referring physician", "reviewed by", "signed by",
    "study", "technique", "transcribed by", "type of exam", "type of examination", "wet read",
)  # fmt: skip
_NAME = "|".join(
    [r"(?:(?:additional|final|limited|other|preliminary)[ \t]+)?(?:impressions?|findings?)"]
    + [re.escape(name) for name in sorted(OTHERS, key=len, reverse=True)]
)
_BETWEEN = r"[ \t]*(?:\band\b|\bor\b|[&/,+])[ \t]*"
# "FINDINGS AND IMPRESSION:", "Findings (chest):".  A header may stand anywhere: some tables have lost the line breaks.
_HEADER = re.compile(
    rf"(?im)(?<![a-z0-9])((?:{_NAME})(?:{_BETWEEN}(?:{_NAME}))*)(?:[ \t]*\([^()\n]{{1,40}}\))?"
    r"(?:[ \t]*(:)|[ \t*_]*\r?$)"
)
_ENDS = "\n.;:!?)*_"  # of a line or sentence
_NUMBERED = re.compile(r"(?:^|(?<=\s))\d+[.)](?=\s)")
_BLANKED = re.compile(r"_{2,}")  # what MIMIC's de-identification leaves


def sections(report: str) -> dict[str, str]:
    """The sections of a report by name; a section headed impression and findings together counts as impression.

    A header is a name of `SECTIONS` or `OTHERS` in one of these forms:

    - with a capital first letter and a colon, anywhere;
    - with a small first letter and a colon, where a line or sentence begins;
    - with a capital first letter and without a colon, on a line of its own.
    """
    headers = [header for header in _HEADER.finditer(report) if _heads(header)]
    bounds = [header.start() for header in headers] + [len(report)]
    found: dict[str, str] = {}
    for header, end in zip(headers, bounds[1:], strict=True):
        name = _section(header.group(1).lower())
        found[name] = f"{found.get(name, '')} {report[header.end() : end]}".strip()
    return found


def _heads(header: re.Match[str]) -> bool:
    before, capital = header.string[: header.start()].rstrip(" \t"), header.group(1)[0].isupper()
    if header.group(2):
        return capital or before[-1:] in _ENDS
    return capital and before.rstrip(" \t*_#")[-1:] in "\n"


def _section(header: str) -> str:
    named = {part.split()[-1].removesuffix("s") for part in re.split(_BETWEEN, header) if part not in OTHERS}
    return next((name for name in SECTIONS if name.removesuffix("s") in named), header)


def impression_and_findings(report: str) -> str:
    """The sections impression and findings of a report, in this order; the whole report if it has neither."""
    parts = sections(report)
    wanted = [parts[name] for name in SECTIONS if parts.get(name)]
    return " ".join(wanted) if wanted else report


def clean(text: str, longest: int) -> str:
    r"""Lower-cased ``\w+`` tokens, at most ``longest`` of them (docs/methods/baselines.md, 6.5).

    The numbers of a numbered list and the blanks of de-identified reports are left out.
    """
    words = re.findall(r"\w+", _NUMBERED.sub(" ", _BLANKED.sub(" ", text)).lower())
    return " ".join(words[:longest])


def length(text: str) -> int:
    """Number of tokens of a cleaned text."""
    return len(text.split())
