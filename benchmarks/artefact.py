"""Table of docs/artefact.md: command, data, machine, versions, day and time behind every table and chart."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparisons
from benchmarks.page import Page, table
from benchmarks.recorded import UNRECORDED
from benchmarks.sources import FAMILIES
from benchmarks.studies.run import read_study
from fedkern.report.tables import human_time

FOLDER, UNKNOWN = Path(__file__).parent, "not recorded"
EMBEDDED = ("captions", "colordigits", "digits")
"""Data sets that need no files."""
OPERATORS = [group for group in FAMILIES if group not in ("flower", "guest")]


def data_of(study: str) -> str:
    """Return the data sets that the cells of a study name, after a colon those of a file."""
    paper = read_study(study)
    text = " ".join([*paper.phrases.values(), *(cell.command for cell in paper.cells)])
    return ", ".join(sorted({name.rpartition(":")[2] for name in re.findall(r"--data (\S+)", text)}))


def list_sources() -> Iterable[tuple[str, list[Path], str, Sequence[str]]]:
    """Yield the command, result files, data and products of every program in artefact.toml."""
    content = tomllib.loads((FOLDER / "artefact.toml").read_text())
    for study, made in content["studies"].items():
        data = data_of(study)
        root = " --data-root DIR" if {*data.split(", ")} - {*EMBEDDED} else ""
        path = FOLDER / "studies" / "results" / f"{study}.json"
        yield f"python -m benchmarks.studies.run {study}{root}", [path], data, made
    for command, program in content["programs"].items():
        patterns = dict.fromkeys(text.replace("OPERATOR", name) for text in program["files"] for name in OPERATORS)
        paths = [path for text in patterns for path in sorted(FOLDER.glob(f"{text}.json"))]
        yield command, paths, program["data"], program["makes"]


def describe(content: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the machine, the versions and the days with commits of a result file."""
    machine, rows = content.get("machine"), content.get("rows", ())
    if machine is None:
        versions = content.get("versions", {})
        builds = [(row.get("date", ""), row["fedkern"].rpartition(" ")[2]) for row in rows if row.get("fedkern")]
        builds = builds or [("", versions.get("commit", UNKNOWN))]
        days = sorted({day for day, _ in builds if day})
        commits = [f"`{name}`" for name in dict.fromkeys(name for _, name in builds) if name != UNRECORDED]
        when = " to ".join(dict.fromkeys(days[:1] + days[-1:]))
        torch = f"torch {versions['torch']}" if "torch" in versions else UNKNOWN
        return UNKNOWN, torch, ", ".join(filter(None, (when, *commits))) or UNKNOWN
    day = str(machine.get("date") or machine["time"][:10])
    commit = "" if machine["commit"] == UNRECORDED else f", `{machine['commit']}`"
    return comparisons.name_machine(machine), f"torch {machine['torch']}", f"{day}{commit}"


def seconds_of(content: Mapping[str, Any]) -> float:
    """Return the seconds of all runs behind a result file, 0 where they are not recorded."""
    if "cases" in content:
        return sum(sum(values) for case in content["cases"] for values in case["seconds"].values())
    if "folder" in content:
        return sum(row.get("seconds") or 0 for row in content["rows"])
    return sum(entry.get("processor_seconds", 0) for entry in content.values() if isinstance(entry, dict))


def list_artefacts(pages: Sequence[Page], charts: Sequence[str]) -> Sequence[str]:
    """Return the table for these pages and file names of charts. AssertionError for one that nothing here makes."""
    places = {name: page.path for page in pages for name in page.tables} | {
        name: f"docs/charts/{name}" for name in charts
    }
    places["options"] = "docs/methods/README.md"
    rows, missing = [], {*places}
    for command, paths, data, made in list_sources():
        missing -= {*made}
        contents = [json.loads(path.read_text()) for path in paths]
        facts = [list(dict.fromkeys(column)) for column in zip(*map(describe, contents), strict=True)] or [["–"]] * 3
        seconds = [*map(seconds_of, contents)]
        links = [f"[{name}]({os.path.relpath(places[name], 'docs')})" if name in places else name for name in made]
        rows.append([", ".join(links), f"`{command}`", data, *("; ".join(fact) for fact in facts),
                     "–" if not paths else human_time(sum(seconds)) if all(seconds) else UNKNOWN])  # fmt: skip
    assert not missing, f"nothing in benchmarks/artefact.toml makes {sorted(missing)}"
    header = ["table or chart", "command", "data", "machine", "versions", "day, commit", "time of the runs"]
    return table(header, rows).split("\n")
