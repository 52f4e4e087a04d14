"""Published tables as data: every cell of a paper with its figure, its source and the command that plays it.

A paper is a TOML file. A cell needs a name, and a command or recorded runs. Its networks, splits and inputs stand in a
Python file of the same name beside it::

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
    target = "accuracy=0.97"
    published = 87
    source = "Table 1, C = 0.1"
    tolerance = 20
    sweep = ["lr=0.05,0.1,0.2"]
    minutes = 12

    [[cells]]
    name = "the authors' own code"
    runs = "runs/authors_seed*"
    published = "98.1 %"

Keys of the file: ``title``, ``citation`` and ``note`` (a sentence below the table), the tables ``words`` and
``defaults``, and the lists ``before`` and ``cells``.

Keys of a cell:

- ``name``: name of the row, unique in the file and without a comma.
- ``command``: METHOD and flags of a run, as behind ``python -m fedkern.run``, but without seed, output and data folder,
  which ``seeds``, ``--out`` and ``--data-root`` give. ``{NAME}`` is a text of ``words``, ``{before}`` the run folder of
  ``before`` with the same seed. The path in ``FILE.py:NAME`` and ``FILE.toml`` starts at the folder of this file, that
  in ``package:NAME/FOLDER`` in an installed package. If either is missing, the cell has no data here.
- ``runs``: instead of ``command``, finished runs, one for each seed: a folder, a pattern such as ``runs/mine*``, or a
  list of them. Paths start at the folder of the TOML file. If none is there, the cell has no data here.
- ``published``: the paper's value. A text with a percent sign (``"41.5 %"``) is a percentage, and a number has the
  figure's own unit (``0.415``). Of a share, such as an accuracy, a number above 1 is a percentage too (``41.5``). A row
  without a value (a baseline, or a variant of ours) has no verdict.
- ``figure``: the published figure. A final figure of a run (``accuracy``, ``ood_accuracy``, ``dice``), the best
  evaluated round's (``best_accuracy``), or ``rounds``, communication rounds to ``target`` on the curve of the best
  values so far, interpolated between evaluated rounds, as McMahan et al. count them. By default ``rounds`` with a
  target, and otherwise the run's main figure, which has to be a share if a value is published.
- ``target``: ``FIGURE=VALUE``, only for ``rounds``.
- ``tolerance``: the largest half width of an interval that is narrow enough for "reproduced", written like
  ``published``, so that it is in points where that is a percentage (below 0.1 only with its sign). By default two
  points of a share, and 5 % of another published value.
- ``smaller``: what is smaller than in the paper. The verdict is then whether cell and baseline are ordered as in the
  paper.
- ``baseline``: name of the cell to compare with, paired by seed.
- ``table``: number or name of the paper's table, by default 1.
- ``source``: place of the value, such as ``Table 1, row 2``.
- ``seeds``: number of seeds from 0 on, or a list, by default 3.
- ``sweep``: list of ``NAME=VALUE,VALUE``, a setting or a method option. All points run with the first seed, the best
  point with all seeds.
- ``select``: what makes a point best: ``figure`` (default), the cell's own, as in papers that tune on the test set, or
  ``validation``, the main figure on the validation set.
- ``before``: name of an entry of ``before``, which has ``name``, ``command`` and ``minutes``.
- ``minutes``: estimate for all runs of the cell on one core, without those of ``before``.
"""

import dataclasses
import importlib.util
import math
import re
import shlex
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkern.comparison.cells import read_seeds, read_sweep
from fedkern.comparison.seed_statistics import Target
from fedkern.errors import UserError, first_of, format_value, suggest_name
from fedkern.files.filesystem import expand, read_text
from fedkern.tasks.figure_names import scale

PAPERS = Path(__file__).parent / "papers"
"""Folder of the papers that fedkern ships."""
PAPERS_PACKAGE = f"{__package__}.papers"
EXAMPLE = Path(__file__).with_name("example.toml")
"""A file to start from."""
ROUNDS = "rounds"
"""The figure that counts rounds up to a target."""
BEST = "best_"
"""Prefix of the best value of a figure over all evaluated rounds."""
_PATTERN = {*"*?["}
_SELECT = ("figure", "validation")
_TABLES = {"title": str, "citation": str, "note": str, "words": dict, "defaults": dict, "before": list, "cells": list}
_OF_BEFORE = ("name", "command", "minutes")
_OF_COMMANDS = ("command", "seeds", "sweep", "select", "before", "minutes")
"""Keys of cells that are played. A cell of recorded runs does not take them."""


class NotHere(UserError):
    """A code file, a package or the runs of a cell that are not on this machine."""


@dataclass(frozen=True)
class PublishedCell:
    """A cell of a paper's table. The attributes are the keys of the file.

    ``figure`` is "" for a run's main figure. ``published`` and ``tolerance`` are in the figure's own unit.
    """

    name: str
    command: str = ""
    runs: tuple[str, ...] = ()
    published: float | None = None
    figure: str = ""
    target: str = ""
    tolerance: float | None = None
    smaller: str = ""
    baseline: str = ""
    table: str = "1"
    source: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: tuple[str, ...] = ()
    select: str = "figure"
    before: str = ""
    minutes: float = 0.0

    @property
    def goal(self) -> Target | None:
        return Target.read(self.target) if self.target else None

    @property
    def is_share(self) -> bool:
        return not self.figure or scale(self.figure)[1] == "%"


_KEYS = tuple(key_field.name for key_field in dataclasses.fields(PublishedCell))


@dataclass(frozen=True)
class Paper:
    """A file of cells. ``mistakes`` are sentences on what is wrong, without the file's name."""

    path: Path
    cells: tuple[PublishedCell, ...] = ()
    befores: Mapping[str, PublishedCell] = dataclasses.field(default_factory=dict)
    phrases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = ""
    citation: str = ""
    note: str = ""
    mistakes: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def folder(self) -> Path:
        return self.path.parent

    def refuse(self, mistakes: Sequence[str]) -> None:
        """Raise UserError with all mistakes, if there are any."""
        if len(mistakes) > 1:
            numbered = " ".join(f"({number}) {text}" for number, text in enumerate(mistakes, 1))
            raise UserError(f"{self.path} has {len(mistakes)} mistakes: {numbered}")
        for text in mistakes:
            raise UserError(f"{self.path}: {text}")

    def find_runs(self, cell: PublishedCell) -> list[Path]:
        """Return the folders of a cell's recorded runs, or raise NotHere."""
        folders = []
        for pattern in cell.runs:
            path = expand(pattern)
            base = Path(path.anchor) if path.is_absolute() else self.folder
            paths = sorted(base.glob(str(path.relative_to(path.anchor)))) if _PATTERN & {*pattern} else [base / path]
            if not (found := [folder for folder in paths if folder.is_dir()]):
                raise NotHere(f"there is no folder {self.folder / path}.")
            folders += found
        return folders

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
            raise UserError(f"the command {command} cannot be read: {error}.") from None
        words = [self._locate_word(word.replace("{before}", str(before)) if before else word) for word in words]
        if open_word := next((word for word in words if re.search(r"\{[a-z_0-9]+\}", word)), None):
            raise UserError(f'"{open_word}" stands for nothing: give the name a text in words.')
        return words

    def _locate_word(self, word: str) -> str:
        head, equals, code = word.rpartition("=")
        if code.startswith("package:"):
            return f"{head}{equals}{_folder_of_package(code)}"
        match = re.fullmatch(r"(?P<file>[^:]+\.(py|toml))(:(?P<name>\w+))?", code)
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


def list_papers() -> list[str]:
    return sorted(path.stem for path in PAPERS.glob("*.toml"))


def read_paper(name: str) -> Paper:
    """Read a paper that fedkern ships, or a file, or raise UserError with all its mistakes."""
    paper = load_paper(name)
    paper.refuse(paper.mistakes)
    return paper


def load_paper(name: str) -> Paper:
    """Read a paper that fedkern ships, or a file, with its mistakes. Wrong keys of cells are left out."""
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
    return _paper(path.resolve(), table)


def _paper(path: Path, table: dict[str, Any]) -> Paper:
    mistakes = [*_unknown_keys(table, _TABLES).values()]
    for key, kind in _TABLES.items():
        if not isinstance(table.setdefault(key, kind()), kind):
            mistakes.append(f"{key} must be {'a list of tables' if kind is list else 'a table or a text'}.")
            table[key] = kind()
    words = table["words"].items()
    mistakes += [f"{name} in words must be a text." for name, text in words if not isinstance(text, str)]
    if not table["cells"]:
        mistakes.append("there is no cell: write [[cells]].")
    befores, wrong_befores = _read_cells("entry of before", _OF_BEFORE, table["before"], {}, mistakes)
    cells, wrong = _read_cells("cell", _KEYS, table["cells"], table["defaults"], mistakes)
    compared = {cell.baseline for cell in cells.values()}
    for name, cell in cells.items():
        text, base = "", cells.get(cell.baseline)
        if cell.baseline and base is None:
            text = f'there is no cell "{cell.baseline}" for its baseline.{suggest_name(cell.baseline, cells)}'
        elif base is not None and base.figure != cell.figure and not wrong & {name, base.name}:
            figures = [figure or "the run's main one" for figure in (cell.figure, base.figure)]
            text = f"its figure is {figures[0]}, but that of its baseline is {figures[1]}: give both the same figure."
        elif cell.before and cell.before not in befores:
            text = f'there is no entry "{cell.before}" of before.{suggest_name(cell.before, befores)}'
        elif cell.smaller and cell.published is not None and not cell.baseline and name not in compared:
            text = "at a smaller scale it needs a baseline, by which cells are ordered."
        mistakes += [f'cell "{name}": {text}'] if text else []
    # Wrong cells too, for the mistakes of their commands.
    usable = {"", *befores} - wrong_befores
    right = [cell for cell in cells.values() if cell.name and (cell.command or cell.runs) and cell.before in usable]
    texts = {key: table[key] for key in ("title", "citation", "note")}
    return Paper(path, tuple(right), befores, {name: str(text) for name, text in words}, **texts, mistakes=mistakes)


def _read_cells(
    word: str, keys: Sequence[str], tables: Sequence[object], defaults: Mapping[str, object], mistakes: list[str]
) -> tuple[dict[str, PublishedCell], set[str]]:
    """Return entries by name and the names of wrong ones, made of their right keys, and add what is wrong."""
    cells: dict[str, PublishedCell] = {}
    wrong: set[str] = set()
    for number, table in enumerate(tables, 1):
        if not isinstance(table, Mapping):
            mistakes.append(f"{word} {number} must be a table.")
            continue
        common = {key: value for key, value in defaults.items() if "runs" not in table or key not in _OF_COMMANDS}
        cell, errors = _read_cell({**common, **table}, keys)
        label = f'{word} "{cell.name}"' if cell.name else f"{word} {number}"
        if cell.name in cells:
            errors["name"] = "this name is there twice: give every cell a name of its own."
        cells[cell.name or label] = cell
        for key, text in errors.items():
            sentence = f"{'defaults' if key in common.keys() - table.keys() else label}: {text}"
            mistakes += [sentence] if sentence not in mistakes else []
            wrong.add(cell.name or label)
    return cells, wrong


def _read_cell(table: Mapping[str, object], keys: Sequence[str]) -> tuple[PublishedCell, dict[str, str]]:
    """Return a cell of the right keys, and what is wrong by key."""
    errors, values = _unknown_keys(table, keys), dict[str, Any](name="", figure=ROUNDS if "target" in table else "")
    for key in [key for key in keys if key in table]:
        try:
            values[key] = _value(key, table[key])
        except UserError as error:
            errors[key] = str(error)
    cell = PublishedCell(**values)
    percentages = [key for key in ("published", "tolerance") if key in values and isinstance(table[key], str)]
    if cell.published is not None:
        published, tolerance = _in_own_unit(cell, cell.published, percentages)
        cell = dataclasses.replace(cell, published=published, tolerance=tolerance)
        if cell.is_share and not 0 <= published <= 1:
            errors["published"] = "published must be a fraction from 0 to 1, or a percentage up to 100."
        plain = values.get("tolerance", tolerance)
        if "tolerance" not in percentages and tolerance < min(plain, 0.001):  # divided, and probably a fraction
            errors["tolerance"] = (
                f'tolerance = {plain:g} counts in points beside a percentage: write "{100 * plain:g} %" or '
                f'"{plain:g} %", as meant.'
            )
    if "name" not in table:
        errors["name"] = "name is missing."
    if not table.keys() & {"command", "runs"}:
        errors["command"] = "command is missing" + (', or runs = "FOLDER".' if "runs" in keys else ".")
    if "runs" in table:
        errors |= {key: f"recorded runs have no {key}: leave it out." for key in _OF_COMMANDS if key in table}
    if cell.figure == ROUNDS:
        errors |= {key: f'{key} must be a number of rounds, not "{table[key]}".' for key in percentages}
    if (cell.figure == ROUNDS) != ("target" in table):
        errors["target"] = f'the figure "{ROUNDS}" and a target go together: give both, or leave both out.'
    return cell, errors


def _in_own_unit(cell: PublishedCell, published: float, percentages: Sequence[str]) -> tuple[float, float]:
    """Return published value and tolerance in the figure's own unit.

    ``percentages`` are those that were written with a percent sign.
    """
    in_percent = "published" in percentages or (cell.is_share and published > 1)
    published = published / 100 if in_percent else published
    if cell.tolerance is None:
        return published, 0.02 if cell.is_share else 0.05 * abs(published)
    return published, cell.tolerance / 100 if in_percent or "tolerance" in percentages else cell.tolerance


def _unknown_keys(table: Iterable[str], known: Collection[str]) -> dict[str, str]:
    hints = {key: suggest_name(key, known) or f" The keys are {', '.join(known)}." for key in table if key not in known}
    return {key: f'there is no key "{key}".{hint}' for key, hint in hints.items()}


def _value(key: str, value: Any) -> object:
    if key == "seeds":
        return read_seeds(value)
    if key in ("sweep", "runs"):
        texts = [value] if key == "runs" and isinstance(value, str) else value
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
            raise UserError(f"{key} must be a list of texts, not {format_value(value)}.")
        return tuple(texts) if key == "runs" or read_sweep(texts) else ()
    if key in ("published", "tolerance", "minutes"):
        percentage = re.fullmatch(r"\s*(\d+\.?\d*)\s*%\s*", str(value)) if key != "minutes" else None
        number = float(percentage[1]) if percentage else value
        if isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number):
            return float(number)
        way = "" if key == "minutes" else ', or a percentage such as "41.5 %"'
        raise UserError(f"{key} must be a number{way}, not {format_value(value)}.")
    if key == "table" and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key} must be a text, not {format_value(value)}.")
    if key == "target":
        Target.read(value)
    if key == "name" and ("," in value or not value.strip()):
        raise UserError("a name must have a letter and no comma, which parts names in --cells.")
    if key == "select" and value not in _SELECT:
        raise UserError(f'select must be {" or ".join(_SELECT)}, not "{value}".{suggest_name(value, _SELECT)}')
    return value
