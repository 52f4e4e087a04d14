"""Published tables as data: every cell of a paper with its figure, its source and the command that plays it.

A paper is a TOML file. Its networks, splits and inputs stand in a Python file of the same name beside it::

    title = "FedAvg's first table"
    citation = "McMahan et al., AISTATS 2017, arXiv 1602.05629"

    [words]                                  # texts that commands share, written {mnist} there
    mnist = "--data mcmahan2017.py:mnist --clients 100"

    [defaults]                               # keys of all cells that do not say otherwise
    table = "1"
    seeds = 3

    [[before]]                               # runs that cells need, such as teachers; no row of the table
    name = "teachers"
    command = "ensemble {mnist}"
    minutes = 4

    [[cells]]
    name = "2NN, IID, B = 10"
    command = "fedavg {mnist} --model mcmahan2017.py:TwoNN --batch-size 10"
    figure = "rounds"
    target = "accuracy=0.97"
    published = 87
    source = "Table 1, C = 0.1"
    scale = "paper"
    tolerance = 20
    sweep = ["lr=0.05,0.1,0.2"]
    minutes = 12

Keys of the file: ``title``, ``citation`` and ``note`` (a sentence below the table), the tables ``words`` and
``defaults``, and the lists ``before`` and ``cells``.

Keys of a cell:

- ``table``: number or name of the paper's table.
- ``name``: name of the row, unique in the file and without a comma.
- ``command``: METHOD and flags of a run, as behind ``python -m fedkern.run``, but without seed, output and data folder,
  which ``seeds``, ``--out`` and ``--data-root`` give. ``{NAME}`` is a text of ``words``, ``{before}`` the run folder of
  ``before`` with the same seed. The path in ``FILE.py:NAME`` starts at the folder of the TOML file, that in
  ``package:NAME/FOLDER`` in an installed package. If either is missing, the cell has no data here.
- ``figure``: the published figure. A final figure of a run (``accuracy``, ``ood_accuracy``, ``dice``), or ``rounds``,
  communication rounds to ``target`` on the curve of the best values so far, interpolated between evaluated rounds, as
  McMahan et al. count them.
- ``target``: ``FIGURE=VALUE``, only for ``rounds``.
- ``published``: the paper's value in the figure's own unit, 0.415 for an accuracy of 41.5 %. A row without one (a
  baseline, or a variant of ours) has no verdict.
- ``source``: place of the value, such as ``Table 1, row 2``.
- ``baseline``: name of the cell to compare with, paired by seed.
- ``scale``: ``paper`` (default), or ``smaller``, where ``smaller`` says what was reduced, and the verdict is whether
  cell and baseline are ordered as in the paper.
- ``tolerance``: at ``scale = "paper"``, the largest half width of an interval that is narrow enough for "reproduced",
  in the unit of ``published``.
- ``seeds``: number of seeds from 0 on, or a list, by default 3.
- ``sweep``: list of ``NAME=VALUE,VALUE``, a setting or a method option. All points run with the first seed, the best
  point with all seeds.
- ``select``: what makes a point best: ``figure`` (default), the cell's own, as in papers that tune on the test set, or
  ``validation``, the main figure on the validation set.
- ``before``: name of an entry of ``before``, which has ``name``, ``command`` and ``minutes``.
- ``minutes``: estimate for all runs of the cell on one core, without those of ``before``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedkern.comparison.cells import read_seeds, read_sweep
from fedkern.comparison.seed_statistics import Target
from fedkern.errors import UserError, first_of, format_value, suggest_name
from fedkern.files.filesystem import expand
from fedkern.files.inputs import read_text
from fedkern.tasks.figure_names import check_reachable

PAPERS = Path(__file__).parent / "papers"
"""Folder of the papers that fedkern ships."""
PAPERS_PACKAGE = f"{__package__}.papers"
ROUNDS = "rounds"
"""The only figure that is not a run's final figure: rounds up to a target."""
_CHOICES = {"scale": ("paper", "smaller"), "select": ("figure", "validation")}
_TABLES = {"title": str, "citation": str, "note": str, "words": dict, "defaults": dict, "before": list, "cells": list}


class NotHere(UserError):
    """A code file or a package of a cell that is not on this machine."""


@dataclass(frozen=True)
class Before:
    """Runs that cells need, one for every seed of the cell."""

    name: str
    command: str
    minutes: float = 0.0


@dataclass(frozen=True)
class PublishedCell:
    """A cell of a paper's table. The attributes are the keys of the file."""

    table: str
    name: str
    command: str
    figure: str
    source: str = ""
    published: float | None = None
    target: str = ""
    baseline: str = ""
    scale: str = "paper"
    smaller: str = ""
    tolerance: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: tuple[str, ...] = ()
    select: str = "figure"
    before: str = ""
    minutes: float = 0.0

    @property
    def goal(self) -> Target | None:
        return Target.read(self.target) if self.target else None

    def check(self) -> None:
        for key, choices in _CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                raise UserError(f'{key} must be {" or ".join(choices)}, not "{value}".{suggest_name(value, choices)}')
        read_sweep(self.sweep)
        if (self.figure == ROUNDS) != bool(self.target):
            raise UserError(f'the figure "{ROUNDS}" and a target go together: give both, or leave both out.')
        if self.goal is None and self.published is not None:
            check_reachable("published", self.figure, self.published, falls=False)
        if (self.scale == "smaller") != bool(self.smaller):
            raise UserError('scale = "smaller" and smaller go together: say what was made smaller.')
        if self.scale == "paper" and self.published is not None and self.tolerance is None:
            raise UserError("a published value at the paper's scale needs a tolerance.")


@dataclass(frozen=True)
class Paper:
    name: str
    folder: Path
    cells: tuple[PublishedCell, ...]
    befores: Mapping[str, Before]
    phrases: Mapping[str, str]
    title: str = ""
    citation: str = ""
    note: str = ""

    def text(self, command: str) -> str:
        for name, phrase in self.phrases.items():
            command = command.replace(f"{{{name}}}", phrase)
        return command

    def words(self, command: str, before: Path | None = None) -> list[str]:
        """Return the words of a command, with the run folder ``before`` and the local paths of code and folders.

        Raises NotHere if a code file or a package is missing.
        """
        try:
            words = shlex.split(self.text(command))
        except ValueError as error:
            raise UserError(f"{self.name}: the command {command} cannot be read: {error}.") from None
        words = [self._locate_word(word.replace("{before}", str(before)) if before else word) for word in words]
        if open_word := next((word for word in words if re.search(r"\{[a-z_0-9]+\}", word)), None):
            raise UserError(f'{self.name}: "{open_word}" stands for nothing: give the name a text in words.')
        return words

    def _locate_word(self, word: str) -> str:
        head, equals, code = word.rpartition("=")
        if code.startswith("package:"):
            return f"{head}{equals}{_folder_of_package(code)}"
        match = re.fullmatch(r"(?P<file>[^:]+\.py)(:(?P<name>\w+))?", code)
        if match is None or Path(match["file"]).is_absolute():
            return word
        if self.folder == PAPERS and "/" not in match["file"] and match["name"]:  # the same wherever it is installed
            return f"{head}{equals}{PAPERS_PACKAGE}.{match['file'].removesuffix('.py')}:{match['name']}"
        path = (self.folder / match["file"]).resolve()
        if not path.is_file():
            raise NotHere(f"{match['file']} is not beside {self.name}.toml.")
        return f"{head}{equals}{path}{code.removeprefix(match['file'])}"

    def find(self, name: str) -> PublishedCell:
        for cell in self.cells:
            if cell.name == name:
                return cell
        cell_names = [cell.name for cell in self.cells]
        way = suggest_name(name, cell_names) or f" Its cells are {first_of(cell_names, 8)}."
        raise UserError(f'{self.name} has no cell "{name}".{way}')


def _folder_of_package(word: str) -> Path:
    """Return the folder of ``package:NAME/FOLDER`` without running the package's code."""
    match = re.fullmatch(r"package:(\w+)/([^/].*)", word)
    if match is None or ".." in Path(match[2]).parts:
        raise UserError(f'"{word}" must be package:NAME/FOLDER: the name of a module, and a folder in it without "..".')
    spec = importlib.util.find_spec(match[1])
    if spec is None or not spec.submodule_search_locations:
        raise NotHere(f"the package {match[1]} is missing: pip install {match[1].replace('_', '-')}")
    folder = Path(spec.submodule_search_locations[0]) / match[2]
    if not folder.is_dir():
        raise NotHere(f"the package {match[1]} has no folder {match[2]}: pip install -U {match[1].replace('_', '-')}")
    return folder


Entry = TypeVar("Entry", Before, PublishedCell)


def list_papers() -> list[str]:
    return sorted(path.stem for path in PAPERS.glob("*.toml"))


def read_paper(name: str) -> Paper:
    path = expand(name) if name.endswith(".toml") else PAPERS / f"{name}.toml"
    if not name.endswith(".toml") and name not in list_papers():
        raise UserError(
            f'There is no paper "{name}": name one of {", ".join(list_papers())}, or a file of your own, FILE.toml.'
            f"{suggest_name(name, list_papers())}"
        )
    try:
        table = tomllib.loads(read_text(path, "utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no TOML ({error})"
        raise UserError(f"The paper {path} cannot be read: {reason}.") from None
    try:
        return _paper(path.resolve(), table)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _paper(path: Path, table: Mapping[str, Any]) -> Paper:
    _check_keys(table, _TABLES)
    for key, kind in _TABLES.items():
        if not isinstance(table.get(key, kind()), kind):
            raise UserError(f"{key} must be {'a list of tables' if kind is list else 'a table or a text'}.")
    defaults = table.get("defaults", {})
    if phrase := next((name for name, text in table.get("words", {}).items() if not isinstance(text, str)), None):
        raise UserError(f"{phrase} in words must be a text.")
    befores = [_entry(Before, entry) for entry in table.get("before", ())]
    cells = [_entry(PublishedCell, {**defaults, **entry}) for entry in table.get("cells", ())]
    if not cells:
        raise UserError("there is no cell: write [[cells]].")
    paper = Paper(
        path.stem, path.parent, tuple(cells), {entry.name: entry for entry in befores}, table.get("words", {}),
        **{key: table.get(key, "") for key in ("title", "citation", "note")},
    )  # fmt: skip
    for entries in ([entry.name for entry in cells], [entry.name for entry in befores]):
        if twice := next((name for name in entries if entries.count(name) > 1), None):
            raise UserError(f'the name "{twice}" is there twice: give every cell a name of its own.')
    for cell in cells:
        if cell.baseline and paper.find(cell.baseline).figure != cell.figure:
            raise UserError(f'cell "{cell.name}": its baseline has another figure, {paper.find(cell.baseline).figure}.')
        if cell.before and cell.before not in paper.befores:
            raise UserError(f'cell "{cell.name}": there is no entry "{cell.before}" of before.')
    compared = {cell.baseline for cell in cells}
    for cell in cells:
        if cell.scale == "smaller" and cell.published is not None and not cell.baseline and cell.name not in compared:
            raise UserError(f'cell "{cell.name}": at a smaller scale it needs a baseline, by which cells are ordered.')
    return paper


def _entry(kind: type[Entry], table: object) -> Entry:
    fields = {key_field.name: key_field for key_field in dataclasses.fields(kind)}
    if not isinstance(table, Mapping):
        raise UserError("a cell must be a table.")
    label = f'cell "{table.get("name", "")}"'
    try:
        _check_keys(table, fields)
        lacking = [key for key, item in fields.items() if item.default is dataclasses.MISSING and key not in table]
        if lacking:
            raise UserError(f"{lacking[0]} is missing.")
        entry = kind(**{key: _value(key, value, fields[key].type) for key, value in table.items()})
        if "," in entry.name or not entry.name.strip():
            raise UserError("a name must have a letter and no comma, which parts names in --cells.")
        if isinstance(entry, PublishedCell):
            entry.check()
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    return entry


def _check_keys(table: Mapping[str, object], known: Mapping[str, object]) -> None:
    for key in table:
        if key not in known:
            raise UserError(f'there is no key "{key}": the keys are {", ".join(known)}.{suggest_name(key, known)}')


def _value(key: str, value: Any, kind: object) -> Any:
    if key == "seeds":
        return read_seeds(value)
    if key == "sweep":
        if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"sweep must be a list of texts NAME=VALUE,VALUE, not {format_value(value)}.")
    if "float" in str(kind):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise UserError(f"{key} must be a number, not {format_value(value)}.")
    if key == "table" and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key} must be a text, not {format_value(value)}.")
    return value
