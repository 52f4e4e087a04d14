"""Turns benchmarks/results/*.json into tables and floors.

python -m benchmarks.report             # results/README.md and the tables of docs/ops.md
python -m benchmarks.report --check     # exit code 1 if README.md or docs/ops.md are not what the results say, but for
                                        # the marks of rows measured with another compiled core
python -m benchmarks.report --floors    # floors.toml from the recorded ratios
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import gate, sources
from benchmarks.comparisons import COPY, RESULTS, Comparison, Recorded, processor, read_results, slug

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "ops.md"
# Source hashes as the present csrc/ makes them, see sources.hashes ("": nobody knows).
Cores = Mapping[str, str]
# Before a number, and behind a row's name, with what they say.
SCATTERS, OUTDATED = "~", "†"
MEANING = {
    SCATTERS: f"`{SCATTERS}`: times scatter by more than {100 * gate.NOISY:.0f} % (interquartile range over median).",
    OUTDATED: f"{OUTDATED}: measured with other kernels than the present `csrc/`'s, or with some not noted.",
}
TITLE = "README.md"
# A line "<!-- measured: kl_div, dual_kl -->", and everything up to the line "<!-- end -->", is written by this program.
SECTION = re.compile(r"(<!-- measured: ([\w, ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine_line(recorded: Recorded) -> str:
    """Where and when, with versions and the forced backend."""
    info = recorded.machine
    place = (
        f"{info['gpu']}, CUDA {info.get('cuda', '?')}" if info.get("gpu") else f"{info['cpu']}, {info['cores']} cores"
    )
    versions = [
        f"{name} {info[name]}" for name in ("python", "torch", "triton", "liger_kernel", "numpy") if name in info
    ]
    forced = f", {info['backend']} forced" if info.get("backend") else ""
    return f"{place}, {info['isa']}{forced}; {', '.join(versions)}; {dates(recorded)}"


def dates(recorded: Recorded) -> str:
    """The day or days of the rows; rows of earlier forms do not say theirs."""
    days = sorted(row.time[:10] for row in recorded.rows)
    if not days[0]:
        return ("up to " if days[-1] else "") + (days[-1] or str(recorded.machine["time"])[:10])
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def outdated(row: Comparison, cores: Cores) -> bool:
    """Whether a row's time is not that of the present kernels."""
    compiled = row.backend not in ("reference", "triton")
    name = sources.family(row.group) if row.sources else ""
    present = cores[sources.key(sources.module(row.backend), name)]
    return bool(present) and compiled and (row.sources or row.core) != present


def case(row: Comparison, cores: Cores) -> str:
    """What was measured, with the mark of an outdated core."""
    return row.case + (f" {OUTDATED}" if outdated(row, cores) else "")


def meanings(rows: Sequence[Comparison], cores: Cores) -> list[str]:
    """A line for every sign that the rows' tables have."""
    signs = {SCATTERS} if any(gate.noisy(row, name) for row in rows for name in row.speedup) else set()
    signs |= {OUTDATED} if any(outdated(row, cores) for row in rows) else set()
    return [line for sign, line in MEANING.items() if sign in signs]


def contestants(rows: Sequence[Comparison]) -> list[str]:
    """Everyone but us, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.speedup))


def families(rows: Sequence[Comparison]) -> list[list[Comparison]]:
    """Rows that share contestants, together: each family makes a table without empty columns."""
    found: list[list[Comparison]] = []
    for row in rows:
        related = [family for family in found if set(contestants(family)) & set(row.speedup)]
        merged = [one for family in related for one in family] + [row]
        found = [family for family in found if family not in related] + [merged]
    return sorted(found, key=lambda family: min(rows.index(row) for row in family))


def against(names: Sequence[str]) -> list[str]:
    """Heads of the columns of speed-ups."""
    return [f"against `{name}`" if "_" in name else f"against {name}" for name in names]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def memory(count: int) -> str:
    """Megabytes."""
    return f"{_digits(count / 1e6)} MB"


def _digits(value: float) -> str:
    if value < 0.05:
        return "0"
    return f"{value:.{max(0, min(2, 2 - math.floor(math.log10(value))))}f}"


def ratio(row: Comparison, name: str) -> str:
    """A speed-up; bold where we lose, marked where times scatter, with the promise where it is not kept."""
    if name not in row.speedup:
        return "–"
    value = row.speedup[name]
    text = f"{value:.2f}×" if value < 10 else f"{value:.0f}×"
    text = f"**{text}**" if value < 1 else text
    text = SCATTERS + text if gate.noisy(row, name) else text
    broken = row.broken_promises()
    return f"{text} (promised {broken[name]:g}×)" if name in broken and not row.loaded else text


def copied(row: Comparison) -> str:
    """Our bytes/s over a copy's, with the promise where it is not kept."""
    if row.copy_fraction is None:
        return "–"
    promise = row.broken_promises().get(COPY)
    return f"{100 * row.copy_fraction:.0f} %" + (
        f" (promised {100 * promise:.0f} %)" if promise and not row.loaded else ""
    )


def our_time(row: Comparison) -> str:
    """Our median time, marked where it scatters."""
    return (SCATTERS if row.scatter[row.ours] > gate.NOISY else "") + duration(row.seconds[row.ours])


def overhead(row: Comparison) -> str:
    """What a call costs beside its kernel, with the promise where it is not kept."""
    if row.overhead is None:
        return "–"
    text = duration(max(row.overhead, 0.0))
    return f"**{text}** (promised {duration(row.at_most or 0.0)})" if row.too_much_overhead else text


def table(rows: Sequence[Comparison], cores: Cores) -> list[str]:
    """All that was measured of one operator, or of one family of its rows."""
    names = contestants(rows)
    walls = any(row.wall_seconds for row in rows)
    overheads = any(row.overhead is not None for row in rows)
    heads = ["size", "run on", "time", *(["wall time"] if walls else []), *against(names)]
    heads += ["overhead"] if overheads else []
    heads += ["model bytes", "of a copy", "peak memory", "theirs"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [case(row, cores), row.where, our_time(row)]
        if walls:
            cells.append(duration(row.wall_seconds[row.ours]) if row.ours in row.wall_seconds else "–")
        cells += [ratio(row, name) for name in names]
        cells += [overhead(row)] if overheads else []
        cells.append(f"{_digits(row.bandwidth)} GB/s" if row.model_bytes else "–")
        cells.append(copied(row))
        peak = row.peak_bytes
        cells.append(memory(peak[row.ours]) if row.ours in peak else "–")
        others = [memory(peak[name]) for name in names if name in peak]
        cells.append(" / ".join(others) if others else "–")
        lines.append("| " + " | ".join(cells) + " |")
    notes = dict.fromkeys(f"* {row.case} ({row.where}): {row.note}" for row in rows if row.note)
    absent = dict.fromkeys(f"* {name} is not in the table: {why}" for row in rows for name, why in row.missing.items())
    return [*lines, *([""] if notes or absent else []), *notes, *absent]


def whole_runs(rows: Sequence[Comparison]) -> list[str]:
    """A line per contestant of the rows that are whole runs, with what else was measured of them; none without any."""
    rows = [row for row in rows if row.startup_seconds]
    if not rows:
        return []
    lines = ["| size | run on | contestant | a round | the first | start-up | peak memory | accuracy |"]
    lines.append("|---|---|---|" + "---:|" * 5)
    for row in rows:
        for name in (row.ours, *(name for name in row.seconds if name != row.ours)):
            peak = memory(row.peak_bytes[name]) if name in row.peak_bytes else "–"
            cells = [row.case, row.where, name, duration(row.seconds[name]), duration(row.first_seconds[name])]
            cells += [duration(row.startup_seconds[name]), peak, f"{100 * row.accuracy[name]:.1f} %"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def in_short(rows: Sequence[Comparison]) -> list[Comparison]:
    """What a reader wants first: one thread (or the GPU), nothing else running."""
    return [row for row in rows if not row.loaded and (row.threads == 1 or row.device != "cpu")]


def short_table(rows: Sequence[Comparison], cores: Cores) -> list[str]:
    """The rows of :func:`in_short` without their memory."""
    rows = in_short(rows)
    names = contestants(rows)
    overheads = any(row.overhead is not None for row in rows)
    lines = ["| size | time | " + " | ".join(against(names)) + (" | overhead |" if overheads else " | of a copy |")]
    lines.append("|---|" + "---:|" * (len(names) + 2))
    for row in rows:
        cells = [case(row, cores), our_time(row), *(ratio(row, name) for name in names)]
        cells.append(overhead(row) if overheads else copied(row))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, list[Recorded]], cores: Cores) -> str:
    """results/README.md; ``cores`` as in all tables."""
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.report` from the JSON files here, which `pytest benchmarks --record` writes:",
        "one per operator and machine (processor, cores, ISA level, forced backend), so that recording on one leaves",
        "the others' results alone.",
        "",
        "Contestants take turns in one process; a speed-up is the median over pairs of their time over ours, bold if",
        'below 1. "Of a copy" sets our time against copying as many bytes as the operator must move. "Peak memory" is',
        'what a call takes at most beyond its inputs, gradients included, "theirs" in the order of the columns before.',
        '"Loaded" means that one other process was spinning.',
        "",
        *MEANING.values(),
    ]
    for group, files in results.items():
        for recorded in files:
            forced = recorded.machine.get("backend")
            lines += ["", f"## {group} on {processor(recorded.machine)}" + (f", {forced} forced" if forced else ""), ""]
            lines.append(machine_line(recorded))
            for family in families(recorded.rows):
                lines += ["", *table(family, cores)]
                lines += ["", *told] if (told := whole_runs(family)) else []
    return "\n".join(lines) + "\n"


def unmarked(text: str) -> str:
    """``text`` without the marks of outdated cores: a change of ``csrc/`` makes them due, and no table wrong."""
    return text.replace(f"\n{MEANING[OUTDATED]}\n", "").replace(f" {OUTDATED}", "")


def fill(text: str, results: dict[str, list[Recorded]], cores: Cores) -> str:
    """``text`` with the sections between markers written anew, from those of their operators that are recorded."""

    def section(match: re.Match[str]) -> str:
        lines: list[str] = []
        shown: list[Comparison] = []
        for group in (name.strip() for name in match[2].split(",")):
            for recorded in results.get(group, []):
                lines += [f"`{group}` on {machine_line(recorded)}:", ""]
                shown += in_short(recorded.rows)
                for family in families(recorded.rows):
                    lines += [*short_table(family, cores), ""]
        lines += [part for line in meanings(shown, cores) for part in (line, "")]
        return match[1] + "\n" + "\n".join(lines or ["Not recorded yet.", ""]) + "\n" + match[3]

    return SECTION.sub(section, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="page whose marked sections are filled")
    parser.add_argument("--floors", nargs="?", type=Path, const=gate.FLOORS, help="write floors.toml, and nothing else")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the tables are not up to date")
    options = parser.parse_args(arguments)
    results = read_results(options.results)
    if not results:
        print(f"{options.results} holds no results; pytest benchmarks --record makes them", file=sys.stderr)
        return 2
    if options.floors:
        every = [recorded for files in results.values() for recorded in files]
        floors = gate.make_floors((slug(recorded.machine), recorded.machine, recorded.rows) for recorded in every)
        gate.write_floors(floors, options.floors)
        short = sum(row.short for row in floors.rows)
        print(f"wrote {options.floors}: {len(floors.rows)} rows, {short} of them in the short gate")
        return 0
    cores = sources.hashes(ROOT / "csrc")
    texts = {options.results / TITLE: page(results, cores)}
    if options.docs.exists():
        texts[options.docs] = fill(options.docs.read_text(), results, cores)
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if options.check:
        stale = [path for path in stale if not path.exists() or unmarked(path.read_text()) != unmarked(texts[path])]
        for path in stale:
            print(f"{path} is not what the results say: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path])
    print(f"wrote {options.results / TITLE}" + (f", the tables of {options.docs}" if options.docs in texts else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
