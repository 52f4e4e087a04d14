"""Keep the figures on the methods' pages equal to benchmarks/results.

    python -m benchmarks.pages            # writes the figures of README.md and docs/, tables and charts
    python -m benchmarks.pages --check    # exit code 1 where a page says something else, or a result by hand

Results stand between ``<!-- figures: NAME -->`` and ``<!-- end -->``, which `benchmarks.page_figures` writes.  Their
tables are files in docs/tables, which the page links and the site shows in place of the link.  Only README.md has
tables in its text.  Charts are in docs/charts (`benchmarks.charts`).  A number
with the unit of a result (per cent, points, nats, times as fast, seconds, megabytes) anywhere else makes `--check`
fail, but for sentences about published results.  Code (fenced blocks and words in backquotes) and addresses of
links are not looked at.
"""

import argparse
import csv
import io
import os
import re
import sys
from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path

from benchmarks.charts import Drawing, all_charts
from benchmarks.page import Page
from benchmarks.page_figures import PAGES

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"(<!-- figures: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HIDDEN = re.compile(r"```.*?```|`[^`\n]*(?:\n[^`\n]+)?`|\]\([^)\s]*\)|<!-- .*? -->", re.DOTALL)
_WORDS = "half|one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|fifty|hundred|thousand|a few"
_UNITS = r"%|×(?!\d)|(?:per\s?cent|points?|nats?|times\s+as|MB|GB|ms|µs|s|seconds?|hours?|minutes?)\b"
RESULT = re.compile(
    rf"\d[\d.,]*\s*(?:{_UNITS})|\d\s*±|\b(?:{_WORDS})\b(?:\s+(?:and|to|or|an?|{_WORDS})\b)*\s+(?:{_UNITS})",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.:!?])\s+(?=[A-Z*`\[])|\n\n|\n(?=[|*#])")


def section(page: Page, name: str) -> tuple[list[str], dict[str, str]]:
    """Return the lines of a section on a page, and the CSV files of its tables by path."""
    lines: list[str] = []
    files: dict[str, str] = {}
    block: list[str] = []
    stem = "methods" if page.path.endswith("/README.md") else Path(page.path).stem.lower()
    for line in [*page.tables[name](), ""]:
        if line.startswith("|") and page.path != "README.md":  # whose readers want to see them at once
            block.append(line)
            continue
        if block:
            words = [stem, *name.split()[name.startswith(f"{stem} ") :], *[str(len(files) + 1)] * bool(files)]
            path = f"docs/tables/{'-'.join(words)}.csv"
            files[path] = as_csv(block)
            lines.append(f"[Table: {name}]({os.path.relpath(path, Path(page.path).parent)})")
            block = []
        lines.append(line)
    return lines[:-1], files


def as_csv(block: Sequence[str]) -> str:
    """Return the lines of a Markdown table as CSV, whose cells keep their markup."""
    text = io.StringIO()
    rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block)
    csv.writer(text, lineterminator="\n").writerows(row for row in rows if not re.fullmatch(r"[-:|]+", "|".join(row)))
    return text.getvalue()


def tables(page: Page) -> dict[str, str]:
    """Return the CSV files of a page by path."""
    return {path: text for name in page.tables for path, text in section(page, name)[1].items()}


def fill(text: str, page: Page) -> str:
    """Return the page's text with its generated sections written anew."""
    return SECTION.sub(lambda m: m[1] + "\n".join(["", *section(page, m[2])[0], ""]) + "\n" + m[3], text)


def faults(text: str, page: Page, root: Path = ROOT) -> list[str]:
    """Return the faults of a page: sections that differ from the results, and results outside of them."""
    sentences = []
    written = {match[2] for match in SECTION.finditer(text)}
    sentences += [f'the section "{name}" is not on it' for name in page.tables if name not in written]
    unknown = written - set(page.tables)
    sentences += [f'nothing makes the section "{name}"' for name in sorted(unknown)]
    if unknown:
        return [f"{page.path}: {line}" for line in sentences]
    pairs = [(text, fill(text, page))]
    pairs += [((root / path).read_text() if (root / path).exists() else "", new) for path, new in tables(page).items()]
    for old, new in pairs:
        lines = zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
        differing = ((before, after) for before, after in lines if before != after)
        sentences += [f'"{before.strip()}" should be "{after.strip()}"' for before, after in islice(differing, 1)]
    sentences += [f'a result outside of the generated sections: "{where}"' for where in unbound(text, page)]
    return [f"{page.path}: {line}" for line in sentences]


def stale_charts(root: Path = ROOT) -> list[Drawing]:
    """Return the charts whose files are missing or show other results."""
    return [c for c in all_charts() if not (root / c.path).exists() or c.mark not in (root / c.path).read_text()]


def unbound(text: str, page: Page) -> list[str]:
    """Return the results that stand outside of the generated sections."""
    if page.part:
        start = text.index(f"## {page.part}\n")
        end = text.find("\n## ", start + 1)
        text = text[start : end if end >= 0 else len(text)]
    blank = HIDDEN.sub(lambda m: _blank(m[0]), SECTION.sub(lambda m: _blank(m[0]), text))
    sentences = [sentence for sentence in SENTENCE.split(blank) if "published" not in sentence.lower()]
    return [" ".join(sentence[max(0, match.start() - 30) : match.end() + 40].split())
            for sentence in sentences for match in RESULT.finditer(sentence)]  # fmt: skip


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a page is not up to date")
    args = parser.parse_args(arguments)
    made = {ROOT / path for page in PAGES for path in tables(page)}
    stale = sorted(set((ROOT / "docs" / "tables").glob("*.csv")) - made)
    if not args.check:
        for path in stale:
            path.unlink()
    wrong = [f"{path}: nothing makes it" for path in stale if args.check]
    for page in PAGES:
        path = ROOT / page.path
        text = path.read_text()
        if not args.check and not {m[2] for m in SECTION.finditer(text)} - set(page.tables):
            text = fill(text, page)
            path.write_text(text)
            for name, content in tables(page).items():
                (ROOT / name).write_text(content)
        wrong += faults(text, page)
    for chart in stale_charts():
        if args.check:
            wrong.append(f"{chart.path} does not show the recorded results")
        else:
            (ROOT / chart.path).write_text(chart.draw())
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
