"""Reading CSV files, and the image classification data set that is listed in one."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkern.data.images.image_files import hidden
from fedkern.data.labels.label_sets import COLUMN as SETS
from fedkern.data.labels.label_sets import check_several, label_sets
from fedkern.data.labels.spelling import MISSING, classes_of, filled, number, unified
from fedkern.data.sources.found_files import read_file
from fedkern.data.sources.listing import SPLITS, Listing, Reading, to_source
from fedkern.data.types import Source
from fedkern.errors import UserError, nearest
from fedkern.files.filesystem import expand
from fedkern.files.inputs import standing
from fedkern.tasks import TASKS, task_of

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MARK = re.compile(r"(?i)sep=([,;\t])(?=\n)")
"""First line of a file that tells Excel the separator."""
PATIENT = ("subject_id", "patient_id", "patient id", "patientid", "patient")
"""Names of the patient column, as in the tables of MIMIC-CXR, NIH's ChestX-ray14 and others."""
CLIENT = ("client", "site", "hospital", "institution")
"""Names of the column that names the client of every row; the first one with a value counts."""
CLIENT_COLUMN = "client_column"
"""The option that names this column."""
_READ_AS = {"patient": PATIENT[0], CLIENT_COLUMN: CLIENT[0]}
"""Under which name a chosen column is read, where that is not the option's own name."""
SHOWN = 200
"""Most characters of a value in a message: a text in the place of a file name may be a whole report."""
AUTO = "auto"
"""Value of the option ``patient`` that finds the column by its name; an empty value reads no column as patients."""
LOOKED_AT = 50
"""Most rows that tell the separator."""


@dataclass(frozen=True)
class Table:
    """A CSV file.

    Attributes:
        names: the columns, those included that the user chose.
        rows: the stripped values of every row by column name.
        lines: line number of every row in the file.
        chosen: the columns that the user chose, by option, see `read_table`.
        nameless: whether no column names patients, whatever the columns are called.
        notices: sentences for the user on values that are not read as they are written; methods add theirs.
    """

    path: Path
    names: Sequence[str]
    rows: Sequence[dict[str, str]]
    lines: Sequence[int]
    chosen: Mapping[str, str] = field(default_factory=dict)
    nameless: bool = False
    notices: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[str]:
        """The values of a column, ``""`` in every row if the column is missing."""
        return [row.get(name, "") for row in self.rows]

    def require(self, column: str, data: str) -> None:
        """Raises UserError where the table has no such column, or a row has no value there."""
        if column not in self.names:
            raise UserError(
                f'data set "{data}": {self.path} has no column "{column}"; beside it the columns split, client and '
                f"patient_id are read; name the column to take for it with --data-option {column}=COLUMN."
                f"{nearest(column, self.names)}"
            )
        for row, line in zip(self.rows, self.lines, strict=True):
            if not row.get(column):
                raise UserError(
                    f'data set "{data}": {self.path}, line {line}, has no {self.chosen.get(column, column)} (NA, NULL, '
                    "None and nan count as empty)"
                )

    def only(self, rows: Sequence[int]) -> Table:
        """The table reduced to ``rows``."""
        return replace(self, rows=[self.rows[row] for row in rows], lines=[self.lines[row] for row in rows])

    def files(self, name: str, data: str) -> list[Path]:
        """Paths of the files in a column; relative names are relative to the CSV file's folder.

        Raises:
            UserError: a file that is missing or not a regular file; the message names the line.
        """
        values = self.column(name)
        paths = [self.path.parent / value for value in values]
        for path, value, line in zip(paths, values, self.lines, strict=True):
            if what := standing(path):
                shown = path if len(value) <= SHOWN else self.path.parent / f"{' '.join(value[:SHOWN].split())}..."
                slashes = value.replace("\\", "/")
                hint = f"; names of folders end with / and not with \\: write {slashes}" if slashes != value else ""
                raise UserError(f'data set "{data}": the file {shown} of {self.path}, line {line}, is {what}{hint}')
        return paths

    def names_of(self, name: str) -> tuple[str, ...]:
        """Names of the column's files in the data set, normalised: ``./a.png`` and ``a.png`` are one image."""
        return tuple(normpath(value) for value in self.column(name))

    def called(self, option: str, column: str) -> str:
        """Words for a column that was read for an option."""
        return f'column "{self.chosen.get(option, column)}" of {self.path.name}'

    def classes(self, labels: Sequence[str], order: str = "") -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        """The classes of ``labels``, which stand in the label column, and every row's class, see `classes_of`."""
        classes, numbers, told = classes_of(labels, f"The {self.called('label', 'label')}", order)
        self.notices.extend(told)
        return classes, numbers

    def listed(self, data: str) -> dict[str, Any]:
        """What the table says of every row beside its image and label: attributes of a `Listing`."""
        named = {}
        for option, names in (("patient", () if self.nameless else PATIENT), (CLIENT_COLUMN, CLIENT)):
            column = next((name for name in names if any(self.column(name))), None)
            if column is not None:
                words = self.called(option, column)
                values, told = unified(self.column(column), f"The {words}")
                named[option] = values, f"the {words}"
                self.notices.extend(told)
        clients, named_by = named.get(CLIENT_COLUMN, ([""] * len(self.rows), ""))
        return {
            "splits": self.splits(data),
            "clients": clients,
            "patients": named["patient"][0] if "patient" in named else None,
            "named_by": named_by,
            "lines": self.lines,
            "notices": self.notices,
        }

    def splits(self, data: str) -> list[str]:
        """The column ``split`` as train, validation or test; ``""`` everywhere if it is missing or empty.

        Raises:
            UserError: a value that is none of train, validation (val), test.
        """
        values = [unicodedata.normalize("NFKC", value).strip().lower() for value in self.column("split")]
        if not any(values):
            return values
        for value, line in zip(values, self.lines, strict=True):
            if value not in SPLITS:
                raise UserError(
                    f'data set "{data}": {self.path}, line {line}, has the split "{value}", expected train, validation '
                    "or test"
                )
        return [SPLITS[value] for value in values]


def find_table(root: str | Path | None, data: str, columns: tuple[str, ...]) -> Path | None:
    """Finds the CSV file: ``root`` itself or the only CSV file in the folder ``root``; None if the folder holds none.

    Raises:
        UserError: no root given, root does not exist, or the folder holds several CSV files.
    """
    wanted = ",".join(columns)
    if root is None:
        raise UserError(
            f'data set "{data}" is read from a CSV file with the columns {wanted}: name it with --data-root'
        )
    path = expand(root)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f'data set "{data}": the data root {path} is neither a CSV file nor a folder')
    tables = (one for one in path.iterdir() if one.suffix.lower() == ".csv" and not hidden(one.name))
    found = sorted(one for one in tables if one.is_file())
    if len(found) > 1:
        names = ", ".join(one.name for one in found[:4])
        raise UserError(f'data set "{data}": {path} holds several CSV files ({names}): name one with --data-root')
    return found[0] if found else None


def check_unchosen(data: str, chosen: Mapping[str, str], root: str | Path | None) -> None:
    """Raises UserError where the user chose a column, though the data are no CSV file."""
    for option, column in chosen.items():
        if column and column != AUTO:
            raise UserError(
                f'data set "{data}": the option {option} names the column "{column}" of a CSV file, and {root} holds '
                "none; leave it out, or name the file with --data-root"
            )


def read_table(path: Path, data: str, columns: tuple[str, ...], chosen: Mapping[str, str]) -> Table:
    """Reads a CSV file with a header (separated by comma, semicolon or tab).

    Args:
        columns: the required columns, filled in every row.
        chosen: columns of the file by what they hold: the name of a column that the data set reads, such as ``text``,
            ``patient`` or ``client_column``.  The values of a chosen column are read in the place of that column's.
            Empty names choose nothing; an empty ``patient``, which is `AUTO` by default, reads no column as patients.

    Raises:
        UserError: the file is unreadable or has no row, a required or chosen column is missing or a column occurs
            twice, a required value is empty, a chosen column is empty, or a row has more values than there are columns.
    """
    names, rows, lines, notices = parsed(path, f'data set "{data}"')
    options = {"patient": AUTO, **chosen}
    given = {option: column.strip().lower() for option, column in options.items() if column}
    if given.get("patient") == AUTO:
        del given["patient"]
    rows = _in_place(rows, names, given, path, data)
    known = (*names, *(_READ_AS.get(option, option) for option in given))
    table = Table(path, known, rows, lines, given, nameless=not options["patient"], notices=notices)
    for column in columns:
        table.require(column, data)
    if not rows:
        raise UserError(f'data set "{data}": {path} lists no image')
    return table


def _in_place(
    rows: list[dict[str, str]], names: Sequence[str], chosen: Mapping[str, str], path: Path, data: str
) -> list[dict[str, str]]:
    """The rows with the values of chosen columns under the names that the data set reads."""
    taken: dict[str, str] = {}
    for option, column in chosen.items():
        if not column or column not in names:
            there = ", ".join(name for name in names if name)
            raise UserError(
                f'data set "{data}": the option {option} names the column "{column}", which {path} does not have; it '
                f"has {there}.{nearest(column, names)}"
            )
        if rows and not any(row.get(column) for row in rows):
            raise UserError(
                f'data set "{data}": the option {option} names the column "{column}" of {path}, which is empty'
            )
        taken[_READ_AS.get(option, option)] = column
    if not taken:
        return rows
    return [{**row, **{name: row.get(column, "") for name, column in taken.items()}} for row in rows]


def parsed(path: Path, what: str) -> tuple[list[str], list[dict[str, str]], list[int], list[str]]:
    """The column names in lower case, the rows, their line numbers, and a sentence where cells count as empty.

    ``what`` begins the message of an error.
    """
    text, where = read_file(path, what), f"{what}: {path}"
    if marked := _MARK.match(text):
        text = text[marked.end() :]
    separator = marked[1] if marked else _separator(text)
    lists = _filled(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), where)
    names = [name.strip().lower() for name in next(lists, (0, []))[1]]
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f'{where} has {names.count(name)} columns "{name}", expected one')
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    missing: Counter[str] = Counter()
    for line, values in lists:
        missing.update(value for cell in values if (value := cell.strip()) in MISSING)
        cells = [filled(value) for value in values]
        if any(cells[len(names) :]):
            raise UserError(
                f"{where}, line {line}, has {len(cells)} values for {len(names)} columns; quote texts that hold "
                f"{SEPARATORS[separator]}"
            )
        cells += [""] * (len(names) - len(cells))
        rows.append({name: value for name, value in zip(names, cells, strict=False) if name})
        lines.append(line)
    listed = ", ".join(f"{value} ({count})" for value, count in missing.most_common())
    return names, rows, lines, [f"Cells of {path.name} that count as empty: {listed}."] if missing else []


def _separator(text: str) -> str:
    """The separator by which most of the first rows have as many values as there are columns, and that makes most."""

    def fit(separator: str) -> tuple[bool, float, int]:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        counts: list[int] = []
        with suppress(csv.Error):  # a field without an end: the rows before it tell
            for values in islice(filter(None, rows), LOOKED_AT):
                counts.append(len(values))
        header, *rest = counts or [0]
        return header > 1, sum(count == header for count in rest), header

    return max(SEPARATORS, key=fit)


def _filled(reader: Any, where: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that hold a value, each with its line; raises UserError where a row is no CSV."""
    begin = 1
    try:
        for values in reader:
            if any(map(str.strip, values)):
                yield reader.line_num, values
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}, line {begin}, begins a row that is not CSV ({error}): close its quotation marks, or shorten "
            f"texts of more than {csv.field_size_limit():,} characters"
        ) from None


def _one_class(table: Table, task: str, order: str) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    table.require("label", "csv")
    return table.classes(table.column("label"), order)


def _several(table: Table, task: str, order: str) -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    column = table.chosen.get(SETS, SETS)
    where = f"the column {column} of {table.path}"
    classes, labels, told = label_sets(table.column(SETS), where, "csv", order)
    check_several(
        labels.sum(1).tolist(), task, f'data set "csv": {where}', f"give --data-option label={column}",
        "give --data-option task=multilabel",
    )  # fmt: skip
    table.notices.extend(told)
    return classes, labels


CELLS: dict[str, Callable[[Table, str, str], tuple[tuple[str, ...], npt.NDArray[Any]]]] = {
    "class": _one_class,
    "labels": _several,
}
"""What reads the classes and every row's labels, by the kind of labels (`fedkern.tasks.Task.target`)."""
COLUMNS = {"class": "label", "labels": SETS}
CSV_TASKS = (AUTO, *(name for name, task in TASKS.items() if task.target in CELLS))


def open_csv(root: str | Path | None, reading: Reading, task: str, order: str, **chosen: str) -> Source:
    """Reads a CSV file with the columns ``path``, ``label`` and optionally ``split``, ``client`` and ``patient_id``.

    Instead of ``label``, one class an image, the file may have ``labels``: names joined by ``|``, or nothing.  An image
    then has several labels or none.  Where both columns are there, ``label`` counts, unless ``task`` is one of several
    labels.

    ``split`` is train, validation (val) or test.  ``client`` (or another column of `CLIENT`) names the client that
    holds a training image; these clients are the default partition, ``attribute``.  All images with the same
    ``patient_id`` (or another column of `PATIENT`) are held out together and go to one client, unless ``client``
    decides otherwise.  Classes are sorted, as numbers if all of them are numbers.  Cells such as ``NA`` count as empty
    (`fedkern.data.labels.spelling.MISSING`), and equal numbers as one value.

    Args:
        root: the CSV file, or a folder with that one CSV file; paths in the file are relative to its folder.
        reading: how files become images.
        task: one of `CSV_TASKS`.
        order: the classes in their order, joined by ``|``; empty: they are sorted.
        **chosen: columns of the file, see `read_table`.

    Raises:
        UserError: anything wrong with the file or an image it names.
    """
    path = find_table(root, "csv", ("path", "label"))
    if path is None:
        raise UserError(f'data set "csv": {root} holds no CSV file')
    table, said = read_table(path, "csv", ("path",), chosen), TASKS.get(task)
    sets = chosen.get(SETS) or (SETS in table.names and "label" not in table.names)
    target = said.target if said else "labels" if sets and not chosen.get("label") else "class"
    if any(chosen.get(column) for kind, column in COLUMNS.items() if kind != target):
        given = " and ".join(
            name for name, value in {"task": said, **chosen}.items() if value and name in ("task", "label", SETS)
        )
        raise UserError(
            f'data set "csv": leave out one of the options {given}: label is for one class an image, {SETS} for several'
        )
    classes, labels = CELLS[target](table, task, order)
    kind = task_of(labels, said=task)
    kind.check_classes(classes, bool(order) or None not in map(number, classes))
    listing = Listing(table.files("path", "csv"), table.names_of("path"), labels, task=kind, **table.listed("csv"))
    return to_source("csv", listing, classes, reading)
