"""Keeps the figures on the methods' pages what benchmarks/results says.

    python -m benchmarks.pages            # writes tables and figures of README.md and docs/*.md anew
    python -m benchmarks.pages --check    # exit code 1 where a page says something else, or has an unknown number

Every number on a page is one of three, or `--check` fails (`benchmarks.page_figures` lists them, page by page):

* part of a table between ``<!-- figures: NAME -->`` and ``<!-- end -->``, which is written from the results;
* a figure in a sentence: the sentence's words with ``{}`` for every figure, and what stands there;
* a setting, a year, an arXiv id: a phrase that the page's list of settings holds.

Code (fenced blocks and words in backquotes) and addresses of links are not looked at.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"(<!-- figures: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = r"[−-]?\d(?:[\d,]*\d)?(?:\.\d+)?(?: ± \d+(?:\.\d+)?)?"
HIDDEN = re.compile(r"```.*?```|`[^`\n]*(?:\n[^`\n]+)?`|\]\([^)\s]*\)|<!-- .*? -->", re.DOTALL)
_WORDS = "half|one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|fifty|hundred|thousand|a few"
SPELLED = re.compile(
    rf"\b(?:{_WORDS})\b(?:\s+(?:and|to|or|an?|{_WORDS})\b)*\s+(?:per\s?cent|points?|nats?|times|MB|hours?|minutes?)\b",
    re.IGNORECASE,
)
"""A result in words, which no figure could be compared with."""


@dataclass(frozen=True)
class Said:
    """A sentence, or a part of one, with figures.

    Attributes:
        words: with ``{}`` for every figure; where lines break does not matter.
        figures: what stands there, as text.
    """

    words: str
    figures: tuple[str, ...]

    @property
    def pattern(self) -> re.Pattern[str]:
        parts = [re.sub(r"(?:\\ |\s)+", r"\\s+", re.escape(part)) for part in self.words.split("{}")]
        return re.compile(f"({NUMBER})".join(parts))


def said(words: str, *figures: str) -> Said:
    """A sentence of a page and its figures.

    Raises:
        ValueError: there are not as many figures as ``{}``.
    """
    if words.count("{}") != len(figures):
        raise ValueError(f'"{words}" has {words.count("{}")} places and {len(figures)} figures')
    return Said(words, figures)


@dataclass(frozen=True)
class Page:
    """What vouches for a page's numbers.

    Attributes:
        path: from the repository's root.
        tables: makes the lines of every generated section, by name.
        sentences: those with figures.
        settings: phrases with numbers that are no results, as regular expressions.
        part: heading of the only section that is looked at; empty: the whole page.
    """

    path: str
    tables: Mapping[str, Callable[[], Sequence[str]]]
    sentences: Sequence[Said]
    settings: Sequence[str]
    part: str = ""


def fill(text: str, page: Page) -> str:
    """The page's text with its generated sections and its sentences' figures written anew."""
    text = SECTION.sub(lambda m: m[1] + "\n".join(["", *page.tables[m[2]](), ""]) + "\n" + m[3], text)
    for sentence in page.sentences:
        text = sentence.pattern.sub(lambda m, figures=sentence.figures: _placed(m, figures), text)
    return text


def _placed(match: re.Match[str], figures: Sequence[str]) -> str:
    whole, start = match[0], match.start()
    for i in range(len(figures), 0, -1):
        first, last = match.start(i) - start, match.end(i) - start
        whole = whole[:first] + figures[i - 1] + whole[last:]
    return whole


def faults(text: str, page: Page) -> list[str]:
    """What is wrong with a page: sections and figures that are not the results', sentences and numbers without any."""
    found = []
    written = {match[2] for match in SECTION.finditer(text)}
    found += [f'the section "{name}" is not on it' for name in page.tables if name not in written]
    unknown = written - set(page.tables)
    found += [f'nothing makes the section "{name}"' for name in sorted(unknown)]
    if unknown:
        return [f"{page.path}: {line}" for line in found]
    found += [f'no sentence says "{one.words}"' for one in page.sentences if not one.pattern.search(text)]
    for old, new in zip(text.splitlines(), fill(text, page).splitlines(), strict=False):
        if old != new:
            found.append(f'"{old.strip()}" should be "{new.strip()}"')
            break
    found += [f'nothing vouches for the number in "{where}"' for where in unbound(text, page)]
    return [f"{page.path}: {line}" for line in found]


def unbound(text: str, page: Page) -> list[str]:
    """Where a number stands that is neither generated, nor a sentence's figure, nor a setting."""
    if page.part:
        start = text.index(f"## {page.part}\n")
        end = text.find("\n## ", start + 1)
        text = text[start : end if end >= 0 else len(text)]
    blank = SECTION.sub(lambda m: _blank(m[0]), text)
    blank = HIDDEN.sub(lambda m: _blank(m[0]), blank)
    for sentence in page.sentences:
        for match in sentence.pattern.finditer(text):
            for i in range(1, len(sentence.figures) + 1):
                blank = blank[: match.start(i)] + _blank(match[i]) + blank[match.end(i) :]
    for phrase in page.settings:
        blank = re.sub(phrase.replace(" ", r"\s+"), lambda m: _blank(m[0]), blank)
    places = [match.start() for expression in (r"\d[\d.,]*", SPELLED) for match in re.finditer(expression, blank)]
    return [" ".join(text[max(0, at - 30) : at + 40].split()) for at in sorted(places)]


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from benchmarks.page_figures import PAGES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a page is not up to date")
    given = parser.parse_args(arguments)
    wrong = []
    for page in PAGES:
        path = ROOT / page.path
        text = path.read_text()
        if not given.check and not {m[2] for m in SECTION.finditer(text)} - set(page.tables):
            text = fill(text, page)
            path.write_text(text)
        wrong += faults(text, page)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
