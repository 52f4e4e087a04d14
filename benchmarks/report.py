"""Turn benchmarks/results/*.json into the tables of benchmarks/results/README.md.

    python -m benchmarks.report             # writes the page
    python -m benchmarks.report --check     # exit code 1 where the page is not what the results say

A row stands on a page as long as its operator is built from the csrc/ that it measured.  A commit that changes a
family's kernels records its rows anew or loses them.  Whole rounds, most of whose time is torch's, are as old as the
date over their table says.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import gate, sources
from benchmarks.comparisons import RESULTS, Comparison, Recorded, processor, read_results

# Source hashes as the present csrc/ makes them, see sources.hashes ("": unknown).
Cores = Mapping[str, str]
SCATTERS = "~"  # before a number
TITLE = "README.md"


def present(row: Comparison, cores: Cores) -> bool:
    """Return whether a row's figures are those of the present kernels, or of a whole run."""
    current = cores[sources.key(sources.module(row.backend), sources.family(row.group))]
    compiled = row.backend not in ("reference", "triton")
    return bool(row.startup_seconds) or not compiled or not current or row.sources == current


def left_out(count: int) -> list[str]:
    """Return a line that counts the omitted rows, and a blank one, or nothing where all rows are shown."""
    if not count:
        return []
    rows = f"{count} row{'s' if count > 1 else ''}"
    return [f"{rows} left out, not recorded with the present kernels.", ""]


def machine_line(recorded: Recorded) -> str:
    """Return place and time of the measurement, with versions and the forced backend."""
    info = recorded.machine
    place = (
        f"{info['gpu']}, CUDA {info.get('cuda', '?')}" if info.get("gpu") else f"{info['cpu']}, {info['cores']} cores"
    )
    versions = [
        f"{name} {info[name]}" for name in ("python", "torch", "triton", "liger_kernel", "numpy") if name in info
    ]
    forced = f", {info['backend']} forced" if info.get("backend") else ""
    measured = dates(recorded) + (f" at commit {info['commit']}" if info.get("commit") else "")
    return f"{place}, {info['isa']}{forced}; {', '.join(versions)}; {measured}"


def dates(recorded: Recorded) -> str:
    """Return the day or days of the rows."""
    days = sorted(row.time[:10] for row in recorded.rows)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def baselines(rows: Sequence[Comparison]) -> list[str]:
    """Return all implementations but ours, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.speedup))


def families(rows: Sequence[Comparison]) -> list[list[Comparison]]:
    """Group rows that share baselines: each family makes a table without empty columns."""
    groups: list[list[Comparison]] = []
    for row in rows:
        related = [family for family in groups if set(baselines(family)) & set(row.speedup)]
        merged = [member for family in related for member in family] + [row]
        groups = [family for family in groups if family not in related] + [merged]
    return sorted(groups, key=lambda family: min(rows.index(row) for row in family))


def duration(seconds: float) -> str:
    """Return a duration with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def memory(count: int) -> str:
    """Return megabytes."""
    return f"{_digits(count / 1e6)} MB"


def _digits(value: float) -> str:
    if value < 0.05:
        return "0"
    return f"{value:.{max(0, min(2, 2 - math.floor(math.log10(value))))}f}"


def noisy(row: Comparison, baseline: str) -> bool:
    """Return whether a row's times, the baseline's or ours, scatter too much for their ratio."""
    return max(row.scatter[baseline], row.scatter[row.ours]) > gate.NOISY


def ratio(row: Comparison, name: str) -> str:
    """Return a speed-up, bold where ours is slower, marked where times scatter."""
    if name not in row.speedup:
        return "–"
    value = row.speedup[name]
    text = f"{value:.2f}×" if value < 10 else f"{value:.0f}×"
    text = f"**{text}**" if value < 1 else text
    return SCATTERS + text if noisy(row, name) else text


def our_time(row: Comparison) -> str:
    """Return our median time, marked where it scatters."""
    return (SCATTERS if row.scatter[row.ours] > gate.NOISY else "") + duration(row.seconds[row.ours])


def table(rows: Sequence[Comparison]) -> list[str]:
    """Return all measurements of one operator, or of one family of its rows."""
    names = baselines(rows)
    walls = any(row.wall_seconds for row in rows)
    heads = ["size", "run on", "time", *(["wall time"] if walls else []), *(f"against {name}" for name in names)]
    heads += ["model bytes", "of a copy", "peak memory", "theirs"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [row.case, row.where, our_time(row)]
        if walls:
            cells.append(duration(row.wall_seconds[row.ours]) if row.ours in row.wall_seconds else "–")
        cells += [ratio(row, name) for name in names]
        cells.append(f"{_digits(row.bandwidth)} GB/s" if row.model_bytes else "–")
        cells.append("–" if row.copy_fraction is None else f"{100 * row.copy_fraction:.0f} %")
        peak = row.peak_bytes
        cells.append(memory(peak[row.ours]) if row.ours in peak else "–")
        peaks = [memory(peak[name]) for name in names if name in peak]
        cells.append(" / ".join(peaks) if peaks else "–")
        lines.append("| " + " | ".join(cells) + " |")
    noted: dict[str, list[str]] = {}
    for row in rows:
        noted.setdefault(row.note, []).append(f"{row.case} ({row.where})")
    notes = [f"* {', '.join(cases)}: {note}" for note, cases in noted.items() if note]
    absent = dict.fromkeys(f"* {name} is not in the table: {why}" for row in rows for name, why in row.missing.items())
    return [*lines, *([""] if notes or absent else []), *notes, *absent]


def whole_runs(rows: Sequence[Comparison]) -> list[str]:
    """Return a line per program of the rows that are whole runs, with their further measurements.

    None without any.
    """
    rows = [row for row in rows if row.startup_seconds]
    if not rows:
        return []
    lines = ["| size | run on | program | a round | the first | start-up | peak memory | accuracy |"]
    lines.append("|---|---|---|" + "---:|" * 5)
    for row in rows:
        for name in (row.ours, *(name for name in row.seconds if name != row.ours)):
            peak = memory(row.peak_bytes[name]) if name in row.peak_bytes else "–"
            cells = [row.case, row.where, name, duration(row.seconds[name]), duration(row.first_seconds[name])]
            cells += [duration(row.startup_seconds[name]), peak, f"{100 * row.accuracy[name]:.1f} %"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, list[Recorded]], cores: Cores) -> str:
    """Return the text of results/README.md."""
    all_rows = [row for files in results.values() for recorded in files for row in recorded.rows]
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.report` from the JSON files here, which `pytest benchmarks --record` writes:",
        "one per operator and machine (processor, cores, ISA level, forced backend), so that recording on one leaves",
        "the others' results alone.",
        "",
        "Calls take turns in one process; a speed-up is the median over pairs of a baseline's time over ours, bold if",
        'below 1. "Of a copy" sets our time against copying as many bytes as the operator must move. "Peak memory" is',
        'what a call takes at most beyond its inputs, gradients included, "theirs" in the order of the columns before.',
        f"`{SCATTERS}`: times scatter by more than {100 * gate.NOISY:.0f} % (interquartile range over median).",
        "",
        *left_out(sum(not present(row, cores) for row in all_rows)),
    ]
    # Operators of one family, recorded alike, share a section, and a table where their baselines are the same.
    sections: dict[tuple[str, str], dict[tuple[str, ...], list[Comparison]]] = {}
    for group, files in results.items():
        for recorded in files:
            rows = [row for row in recorded.rows if present(row, cores)]
            if not rows:
                continue
            forced = recorded.machine.get("backend")
            name = sources.family(group) or group
            title = f"{name} on {processor(recorded.machine)}" + (f", {forced} forced" if forced else "")
            tables = sections.setdefault((title, machine_line(Recorded(recorded.machine, rows, recorded.name))), {})
            for family in families(rows):
                named = [row if group == name else replace(row, case=f"{group} {row.case}") for row in family]
                tables.setdefault(tuple(baselines(family)), []).extend(named)
    for (title, machine), tables in sections.items():
        lines += [f"## {title}", "", machine, ""]
        for rows in tables.values():
            lines += [*table(rows), ""]
            lines += [*table_lines, ""] if (table_lines := whole_runs(rows)) else []
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the recorded results")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is not up to date")
    options = parser.parse_args(arguments)
    results = read_results(options.results)
    if not results:
        print(f"{options.results} holds no results; pytest benchmarks --record makes them", file=sys.stderr)
        return 2
    path, text = options.results / TITLE, page(results, sources.hashes(sources.CSRC))
    if options.check:
        if path.exists() and path.read_text() == text:
            return 0
        print(f"{path} is not what the results say: run python -m benchmarks.report", file=sys.stderr)
        return 1
    path.write_text(text)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
