"""Files of data sets, plain or gzip-compressed, and tables of image files, from a CSV file or a tree of folders."""

from __future__ import annotations

import csv
import gzip
import io
import re
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from os.path import normpath
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fedkern.data.images.image_files import is_hidden
from fedkern.data.labels.spelling import classes_of, clean_cell, describe_missing, unify_spelling
from fedkern.data.sources.listing import SPLITS, Labels, Listing
from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import describe_file_kind, expand, open_regular
from fedkern.tasks import task_of

MAX_CONTENT_BYTES = 1 << 32
"""Most bytes from a ``.gz`` file, whatever its header announces."""


def find_folder(root: str | Path | None, data: str, subfolders: Sequence[str], files: Sequence[str]) -> Path:
    """Return the first ``root/subfolder``, or ``root``, with any of ``files``, plain or ``.gz``.

    Subfolders come first: MNIST and Fashion-MNIST share file names, so a flat ``root`` is the weaker hint.
    """
    folder = need_root(root, data, files[0])
    for candidate in (*(folder / name for name in subfolders), folder):
        if any(find_file(candidate, name) for name in files):
            return candidate
    looked = ", ".join(["DIR", *(f"DIR/{name}" for name in subfolders)])
    raise UserError(
        f'data set "{data}": no file {files[0]} (or {files[0]}.gz) found under {folder} (looked in {looked})'
    )


def need_root(root: str | Path | None, data: str, example: str) -> Path:
    """Return ``root`` as an existing folder, or raise UserError."""
    if root is None:
        raise UserError(
            f'data set "{data}" is read from files such as {example}: name their folder with --data-root DIR'
        )
    folder = expand(root)
    if not folder.is_dir():
        raise UserError(f'data set "{data}": the data root {folder} is not a folder')
    return folder


def find_file(folder: Path, name: str) -> Path | None:
    """Return ``folder/name`` or ``folder/name.gz``, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_file(path: Path, prefix: str) -> str:
    """Return a text file, UTF-8 or UTF-16 with a byte-order mark, with line ends ``\\n``.

    UserError messages begin with ``prefix``.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        reason = "it holds zero bytes, as UTF-32 does and UTF-16 without a byte-order mark" if "\0" in text else ""
    except OSError as error:
        raise UserError(f"{prefix}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line, byte = 1 + error.object.count(b"\n", 0, error.start), error.object[error.start]
        reason = f"line {line} has the byte 0x{byte:02X}, which is not {error.encoding.upper()}"
    if content.startswith(b"PK\x03\x04"):
        reason = "it is a workbook (xlsx, ods) or another zip archive"
    if reason:
        raise UserError(f'{prefix}: cannot read {path}: {reason}; save it as UTF-8 text, in Excel as "CSV UTF-8"')
    return io.StringIO(text, newline=None).getvalue()


def read_bytes(
    folder: Path, name: str, data: str, due: Callable[[bytes, Path], int], header: int = 0
) -> tuple[bytes, Path]:
    """Return a file's decompressed content and path, see :func:`gunzip` for ``due`` and ``header``."""
    path = find_file(folder, name)
    if path is None:
        raise UserError(f'data set "{data}": the file {folder / name} (or {name}.gz) is missing')
    try:
        with open_regular(path) as file:
            if path.suffix != ".gz":
                return file.read(), path
            return gunzip(file, lambda head: due(head, path), header), path
    except OSError as error:
        raise UserError(f'data set "{data}": cannot read {path}: {error.strerror or error}') from error
    except ValueError as error:
        raise UserError(f'data set "{data}": {path} is not a complete gzip file ({error}); fetch it again') from error


def gunzip(file: BinaryIO, due: Callable[[bytes], int], header: int) -> bytes:
    """Return the content of a gzip file (RFC 1952, one or several members), checked to its last byte.

    Decompression stops at a limit, else a small file could fill the memory: ``due`` maps the first ``header`` bytes of
    the content to its largest size.
    """
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            content = unzipped.read(header)
            if len(content) == header:
                limit = min(due(content), MAX_CONTENT_BYTES)
                content += unzipped.read(max(0, limit + 1 - header))
                if len(content) > limit:
                    raise ValueError(f"it holds more than the {limit:,} bytes that are due")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None
    if not file.tell():
        raise ValueError("it is empty")
    return content


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MARK = re.compile(r"(?i)sep=([,;\t])(?=\n)")
"""First line that tells Excel the separator."""
PATIENT = ("subject_id", "patient_id", "patient id", "patientid", "patient")
"""Names of the patient column, as in MIMIC-CXR, NIH's ChestX-ray14 and others."""
CLIENT = ("client", "site", "hospital", "institution")
"""Names of the client column; the first one with a value counts."""
_READ_AS = {"patient": PATIENT[0], "client_column": CLIENT[0]}
"""Column name that replaces the option's name."""
SHOWN = 200
"""Most characters of a value in a message, as a misplaced text may be a whole report."""
AUTO = "auto"
"""Value of the option ``patient`` that finds the column by name; an empty value reads none."""
MAX_SNIFFED = 50
"""Most rows that decide the separator."""


@dataclass(frozen=True)
class Table:
    """Table with a row for every image.

    Attributes:
        path: the CSV file, or the folder of the tree; file names are relative to the folder.
        rows: stripped values by column name, at least one row.
        lines: line numbers; empty for a tree.
        chosen: user-chosen columns by column read, see `open_table`.
        notices: sentences for the user; methods append theirs.
    """

    data: str
    path: Path
    rows: Sequence[dict[str, str]]
    lines: Sequence[int] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[str]:
        return [row.get(name, "") for row in self.rows]

    def require(self, *columns: str) -> None:
        """Raise UserError for a missing column, or an empty cell of a CSV file."""
        for column in columns:
            if column not in self.rows[0]:
                raise UserError(
                    f'data set "{self.data}": {self.path} has no column "{column}"; beside it the columns split, '
                    "client and patient_id are read; name the column to take for it with --data-option "
                    f"{column}=COLUMN.{suggest_name(column, self.rows[0])}"
                )
            for row, line in zip(self.rows, self.lines, strict=False):
                if not row.get(column):
                    raise UserError(
                        f'data set "{self.data}": {self.path}, line {line}, has no {self.chosen.get(column, column)} '
                        "(NA, NULL, None and nan count as empty)"
                    )

    def files(self, name: str) -> list[Path]:
        """Return the files of a column, or raise UserError for a missing or special file."""
        values, folder = self.column(name), self.path.parent if self.lines else self.path
        paths = [folder / value for value in values]
        # A tree has no lines, and its files exist.
        for path, value, line in zip(paths, values, self.lines, strict=False):
            if flaw := describe_file_kind(path):
                file = path if len(value) <= SHOWN else folder / f"{' '.join(value[:SHOWN].split())}..."
                slashes = value.replace("\\", "/")
                hint = f"; names of folders end with / and not with \\: write {slashes}" if slashes != value else ""
                raise UserError(f'data set "{self.data}": the file {file} of {self.path}, line {line}, is {flaw}{hint}')
        return paths

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return the column's normalised names: ``./a.png`` and ``a.png`` are one image."""
        return tuple(normpath(value) for value in self.column(name))

    def name_column(self, column: str) -> str:
        named = f'column "{self.chosen.get(column, column)}" of {self.path.name}'
        return named if self.lines else f"layout of {self.path}"

    def classes(self, labels: Sequence[str], order: str = "") -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        """Return class names and every row's class, see `classes_of`."""
        classes, numbers, notices = classes_of(labels, f"The {self.name_column('label')}", order)
        self.notices.extend(notices)
        return classes, numbers

    def listing(self, image: str, labels: Labels, texts: Sequence[str] | None = None, task: str = AUTO) -> Listing:
        """Return the images in a column with labels and all other columns."""
        paths, splits, owners = self.files(image), self.splits(), {}
        for names in (PATIENT, CLIENT):
            column = next((name for name in names if any(self.column(name))), None)
            if column is not None:
                values, notices = unify_spelling(self.column(column), f"The {self.name_column(column)}")
                owners[names] = values, f"the {self.name_column(column)}"
                self.notices.extend(notices)
        clients, named_by = owners.get(CLIENT, ([""] * len(self.rows), ""))
        return Listing(
            paths, self.names_of(image), labels, splits, clients, texts=texts,
            patients=owners[PATIENT][0] if PATIENT in owners else None, named_by=named_by,
            own_tests=bool(named_by) and not self.lines and "test" in splits, lines=self.lines, notices=self.notices,
            task=task_of(labels, texts, said=task),
        )  # fmt: skip

    def splits(self) -> list[str]:
        """Return the column ``split`` as train, validation or test, ``""`` everywhere if missing."""
        values = [unicodedata.normalize("NFKC", value).strip().lower() for value in self.column("split")]
        if not any(values):
            return values
        for value, line in zip(values, self.lines, strict=False):
            if value not in SPLITS:
                raise UserError(
                    f'data set "{self.data}": {self.path}, line {line}, has the split "{value}", expected train, '
                    "validation or test"
                )
        return [SPLITS[value] for value in values]


def open_table(
    root: str | Path | None,
    data: str,
    columns: tuple[str, ...],
    chosen: Mapping[str, str],
    *,
    tree: Callable[[Path, str], Table] | None = None,
    layout: str = "auto",
) -> Table:
    """Read the CSV file ``root``, the only CSV file in the folder ``root`` or, if there is none, its folders.

    Besides the data set's ``columns``, these are read; missing values are empty, and equal numbers one value.

    - ``split``: train, validation (val) or test.
    - ``client`` (or another of `CLIENT`): the client of a training image; these clients are the default partition,
      ``attribute``.
    - ``patient_id`` (or another of `PATIENT`): a patient's images are held out together and go to one client, unless
      ``client`` decides otherwise.

    ``chosen`` has columns to read instead, by option (``text``, ``patient``, ``client_column``); empty names choose
    nothing, but an empty ``patient`` reads no column.  ``tree`` makes a table of a folder and its layout.
    """
    if root is None:
        raise UserError(
            f'data set "{data}" is read from a CSV file with the columns {",".join(columns)}: name it with --data-root'
        )
    path = expand(root)
    if not path.is_file() and not path.is_dir():
        raise UserError(f'data set "{data}": the data root {path} is neither a CSV file nor a folder')
    tables = [path] if path.is_file() else csv_files(path)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables[:4])
        raise UserError(f'data set "{data}": {path} holds several CSV files ({names}): name one with --data-root')
    if tables:
        if layout != "auto":
            raise UserError(
                f'data set "{data}": the option layout is for folders, and {tables[0]} lists the images; leave it out'
            )
        return _read_csv(tables[0], data, chosen)
    if tree is None:
        raise UserError(f'data set "{data}": {root} holds no CSV file')
    for option, column in chosen.items():
        if column and column != AUTO:
            raise UserError(
                f'data set "{data}": the option {option} names the column "{column}" of a CSV file, and {root} holds '
                "none; leave it out, or name the file with --data-root"
            )
    return tree(path, layout)


def csv_files(folder: Path) -> list[Path]:
    """Return the CSV files directly in ``folder``, sorted, without hidden ones."""
    named = (path for path in folder.iterdir() if path.suffix.lower() == ".csv" and not is_hidden(path.name))
    return sorted(path for path in named if path.is_file())


def _read_csv(path: Path, data: str, chosen: Mapping[str, str]) -> Table:
    names, rows, lines, notices = parse_table(path, f'data set "{data}"')
    if not rows:
        raise UserError(f'data set "{data}": {path} lists no image')
    choices: dict[str, str] = {}
    for option, text in chosen.items():
        column = text.strip().lower()
        if not text or (option == "patient" and column == AUTO):
            continue
        if not column or column not in names:
            columns = ", ".join(name for name in names if name)
            raise UserError(
                f'data set "{data}": the option {option} names the column "{column}", which {path} does not have; it '
                f"has {columns}.{suggest_name(column, names)}"
            )
        if not any(row.get(column) for row in rows):
            raise UserError(
                f'data set "{data}": the option {option} names the column "{column}" of {path}, which is empty'
            )
        choices[_READ_AS.get(option, option)] = column
    unread = PATIENT if chosen.get("patient") == "" else ()
    sources = {name: name for name in rows[0] if name not in unread} | choices
    rows = [{name: row[column] for name, column in sources.items()} for row in rows]
    return Table(data, path, rows, lines, choices, notices)


def parse_table(path: Path, prefix: str) -> tuple[list[str], list[dict[str, str]], list[int], list[str]]:
    """Return lower-case column names, rows, line numbers, and a notice on missing values."""
    text, where = read_file(path, prefix), f"{prefix}: {path}"
    if marked := _MARK.match(text):
        text = text[marked.end() :]
    separator = marked[1] if marked else _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    filled_rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for values in reader:
            if any(map(str.strip, values)):
                filled_rows.append((reader.line_num, values))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}, line {begin}, begins a row that is not CSV ({error}): close its quotation marks, or shorten "
            f"texts of more than {csv.field_size_limit():,} characters"
        ) from None
    header, *body = filled_rows or [(0, [])]
    names = [name.strip().lower() for name in header[1]]
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f'{where} has {names.count(name)} columns "{name}", expected one')
    rows: list[dict[str, str]] = []
    for line, values in body:
        cells = [clean_cell(value) for value in values]
        if any(cells[len(names) :]):
            raise UserError(
                f"{where}, line {line}, has {len(cells)} values for {len(names)} columns; quote texts that hold "
                f"{SEPARATORS[separator]}"
            )
        cells += [""] * (len(names) - len(cells))
        rows.append({name: value for name, value in zip(names, cells, strict=False) if name})
    notices = describe_missing((cell for _, values in body for cell in values), f"Cells of {path.name}")
    return names, rows, [line for line, _ in body], notices


def _separator(text: str) -> str:
    """Return the separator by which most of the first rows fit the header, and of several the one with most columns."""

    def fit(separator: str) -> tuple[bool, float, int]:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        counts: list[int] = []
        with suppress(csv.Error):  # an unclosed field: the rows before it decide
            for values in islice(filter(None, rows), MAX_SNIFFED):
                counts.append(len(values))
        header, *rows_below = counts or [0]
        return header > 1, sum(count == header for count in rows_below), header

    return max(SEPARATORS, key=fit)
