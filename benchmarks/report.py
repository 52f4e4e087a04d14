"""Turns benchmarks/results/*.json into tables, plots and floors.

python -m benchmarks.report             # results/README.md, a plot per operator and machine, the tables of docs/ops.md
python -m benchmarks.report --check     # exit code 1 if README.md or docs/ops.md are not what the results say
python -m benchmarks.report --floors    # floors.toml from the recorded ratios
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gate
from benchmarks.records import RESULTS, Comparison, Recorded, processor, read_results, slug

DOCS = Path(__file__).parent.parent / "docs" / "ops.md"
TITLE = "README.md"
# A line "<!-- measured: kl_div, dual_kl -->", and everything up to the line "<!-- end -->", is written by this program.
SECTION = re.compile(r"(<!-- measured: ([\w, ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine_line(recorded: Recorded) -> str:
    """Where and when, with versions."""
    info = recorded.machine
    place = (
        f"{info['gpu']}, CUDA {info.get('cuda', '?')}" if info.get("gpu") else f"{info['cpu']}, {info['cores']} cores"
    )
    versions = [
        f"{name} {info[name]}" for name in ("python", "torch", "triton", "liger_kernel", "numpy") if name in info
    ]
    return f"{place}, {info['isa']}; {', '.join(versions)}; {str(info['time'])[:10]}"


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
    """A speed-up; bold where we lose, with the promise where it is not kept."""
    if name not in row.speedup:
        return "–"
    value = row.speedup[name]
    text = f"{value:.2f}×" if value < 10 else f"{value:.0f}×"
    text = f"**{text}**" if value < 1 else text
    broken = row.broken_promises()
    return f"{text} (promised {broken[name]:g}×)" if name in broken and not row.loaded else text


def overhead(row: Comparison) -> str:
    """What a call costs beside its kernel, with the promise where it is not kept."""
    if row.overhead is None:
        return "–"
    text = duration(max(row.overhead, 0.0))
    return f"**{text}** (promised {duration(row.at_most or 0.0)})" if row.too_much_overhead else text


def table(rows: Sequence[Comparison]) -> list[str]:
    """All that was measured of one operator, or of one family of its rows."""
    names = contestants(rows)
    walls = any(row.wall_seconds for row in rows)
    overheads = any(row.overhead is not None for row in rows)
    heads = ["size", "run on", "time", *(["wall time"] if walls else []), *against(names)]
    heads += ["overhead"] if overheads else []
    heads += ["model bytes", "of a copy", "peak memory", "theirs"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        cells = [row.case, row.where, duration(row.seconds[row.ours])]
        if walls:
            cells.append(duration(row.wall_seconds[row.ours]) if row.ours in row.wall_seconds else "–")
        cells += [ratio(row, name) for name in names]
        cells += [overhead(row)] if overheads else []
        cells.append(f"{_digits(row.bandwidth)} GB/s" if row.model_bytes else "–")
        cells.append(f"{100 * row.copy_fraction:.0f} %" if row.copy_fraction is not None else "–")
        peak = row.peak_bytes
        cells.append(memory(peak[row.ours]) if row.ours in peak else "–")
        others = [memory(peak[name]) for name in names if name in peak]
        cells.append(" / ".join(others) if others else "–")
        lines.append("| " + " | ".join(cells) + " |")
    notes = dict.fromkeys(f"* {row.case} ({row.where}): {row.note}" for row in rows if row.note)
    absent = dict.fromkeys(f"* {name} is not in the table: {why}" for row in rows for name, why in row.missing.items())
    return [*lines, *([""] if notes or absent else []), *notes, *absent]


def short_table(rows: Sequence[Comparison]) -> list[str]:
    """What a reader wants first: one thread (or the GPU), nothing else running."""
    rows = [row for row in rows if not row.loaded and (row.threads == 1 or row.device != "cpu")]
    names = contestants(rows)
    lines = ["| size | time | " + " | ".join(against(names)) + " | of a copy |"]
    lines.append("|---|" + "---:|" * (len(names) + 2))
    for row in rows:
        copied = f"{100 * row.copy_fraction:.0f} %" if row.copy_fraction is not None else "–"
        cells = [row.case, duration(row.seconds[row.ours]), *(ratio(row, name) for name in names), copied]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, list[Recorded]]) -> str:
    """results/README.md."""
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.report` from the JSON files here, which `pytest benchmarks --record` writes:",
        "one per operator and processor, so that recording on one kind of machine leaves the others' results alone.",
        "",
        "Contestants take turns in one process; a speed-up is the median over pairs of their time over ours, bold if",
        'below 1. "Of a copy" sets our time against copying as many bytes as the operator must move. "Peak memory" is',
        'what a call takes at most beyond its inputs, gradients included, "theirs" in the order of the columns before.',
        '"Loaded" means that one other process was spinning.',
    ]
    for group, files in results.items():
        for recorded in files:
            lines += ["", f"## {group} on {processor(recorded.machine)}", ""]
            lines += [machine_line(recorded), "", f"![{group}]({recorded.name}.png)"]
            for family in families(recorded.rows):
                lines += ["", *table(family)]
    return "\n".join(lines) + "\n"


def fill(text: str, results: dict[str, list[Recorded]]) -> str:
    """``text`` with the sections between markers written anew, from those of their operators that are recorded."""

    def section(match: re.Match[str]) -> str:
        lines: list[str] = []
        for group in (name.strip() for name in match[2].split(",")):
            for recorded in results.get(group, []):
                lines += [f"`{group}` on {machine_line(recorded)}:", ""]
                for family in families(recorded.rows):
                    lines += [*short_table(family), ""]
        return match[1] + "\n" + "\n".join(lines or ["Not recorded yet.", ""]) + "\n" + match[3]

    return SECTION.sub(section, text)


def plot(recorded: Recorded, path: Path) -> None:
    """Speed-ups as bars on a logarithmic axis, with the quartiles of the pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in recorded.rows if not row.loaded]
    names = contestants(rows)
    height = 0.8 / max(len(names), 1)
    figure, axes = pyplot.subplots(
        figsize=(9, 1.6 + 0.28 * len(rows) * max(len(names), 1) ** 0.7), layout="constrained"
    )
    for k, name in enumerate(names):
        places, values, low, high = [], [], [], []
        for position, row in enumerate(rows):
            if name in row.speedup:
                places.append(position + (k - (len(names) - 1) / 2) * height)
                values.append(row.speedup[name])
                quartiles = row.spread.get(name, [values[-1], values[-1]])
                low.append(max(values[-1] - quartiles[0], 0))
                high.append(max(quartiles[1] - values[-1], 0))
        # From 1, so that losses point to the left.
        widths = [value - 1 for value in values]
        bars = {"xerr": [low, high], "error_kw": {"elinewidth": 0.8, "ecolor": "0.3"}}
        axes.barh(places, widths, 0.92 * height, left=1, label=name, **bars)
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_xscale("log")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if _within(t, rows)]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks], minor=False)
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [f"{row.case}, {row.where}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("times as fast as (median over pairs, quartiles)")
    axes.set_title(f"{rows[0].group}\n{machine_line(recorded)}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _within(tick: float, rows: Sequence[Comparison]) -> bool:
    values = [value for row in rows for value in row.speedup.values()] or [1.0]
    return min(*values, 1.0) / 2 <= tick <= max(*values, 1.0) * 2


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
    texts = {options.results / TITLE: page(results)}
    if options.docs.exists():
        texts[options.docs] = fill(options.docs.read_text(), results)
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path} is not what the results say: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path])
    for files in results.values():
        for recorded in files:
            if any(not row.loaded for row in recorded.rows):
                plot(recorded, options.results / f"{recorded.name}.png")
    print(
        f"wrote {options.results / TITLE}, {sum(map(len, results.values()))} plots"
        + (f", the tables of {options.docs}" if options.docs in texts else "")
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
