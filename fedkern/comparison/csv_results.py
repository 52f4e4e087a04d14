"""Results in a CSV file, turned into recorded runs: one for each method and seed."""

import csv
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from fedkern.comparison.cells import folder_name
from fedkern.errors import UserError, first_of, suggest_name
from fedkern.files import atomic
from fedkern.files.filesystem import read_text, report_unreadable
from fedkern.foreign_runs.recorded_run import COSTS, check_record
from fedkern.foreign_runs.recording import record
from fedkern.tasks.figure_names import direction

_KEYS = ("method", "seed", "round")
_SHOWN = 6
"""Mistakes that a message names."""


def read_columns(words: Iterable[str]) -> dict[str, str]:
    """Read ``NAME=COLUMN,NAME``, where NAME alone is the column of that name, or raise UserError."""
    columns: dict[str, str] = {}
    for word in (part for text in words for part in text.split(",")):
        name, equals, column = (part.strip() for part in word.partition("="))
        if not name or not (column or not equals):
            raise UserError(f'--columns needs the form NAME=COLUMN,NAME=COLUMN, got "{word}".')
        if name in columns:
            raise UserError(f'--columns gives "{name}" twice: name one column.')
        columns[name] = column or name
    return columns


@dataclass
class CsvResults:
    """Results of a CSV file by method and seed, with the figures and costs of every round.

    Attributes:
        columns: names of columns by what they hold: ``seed``, perhaps ``method``, ``round`` and costs of a round
            (``seconds``, ``bytes_up``, ``bytes_down``), and figures. Without ``round``, a row is a finished run.
        percent: figures whose numbers are percentages. Numbers with a percent sign need no mention.
        method: name of the method if no column has it.
    """

    path: Path
    columns: Mapping[str, str]
    percent: Collection[str] = ()
    method: str = ""
    runs: dict[tuple[str, int], dict[int, dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the file, or raise UserError with the lines of all mistakes."""
        self.figures = [name for name in self.columns if name not in (*_KEYS, *COSTS)]
        self._lines: dict[tuple[str, int, int], int] = {}
        with report_unreadable(self.path):
            text = read_text(self.path, "utf-8-sig")
        reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=text.partition("\n")[0].count), strict=True)
        mistakes = []
        try:
            header = [name.strip() for name in next(reader, [])]
            self._check_columns(header)
            for row in filter(any, reader):
                if len(row) == len(header):
                    texts = {name: row[header.index(column)].strip() for name, column in self.columns.items()}
                    mistakes += [f"line {reader.line_num}: {text}" for text in self._add(texts, reader.line_num)]
                else:
                    lengths = f"it has {len(row)} values, and the first line has {len(header)}"
                    mistakes.append(f"line {reader.line_num}: {lengths}")
        except csv.Error as error:
            mistakes.append(f"line {reader.line_num}: {error}")
        if not mistakes:
            mistakes = [] if self.runs else ["no line of results is below the names of the columns"]
            for (method, seed), rounds in self.runs.items():
                if not any(self.figures[0] in values for values in rounds.values()):
                    mistakes.append(f"no line of {method}, seed {seed}, has the main figure, {self.figures[0]}")
            mistakes += filter(None, map(self._doubt_percent, self.percent))
        if mistakes:
            raise UserError(f"{self.path} cannot be imported: {first_of(mistakes, _SHOWN, '; ')}.")

    def _check_columns(self, header: list[str]) -> None:
        mistakes = []
        for name, column in self.columns.items():
            if (count := header.count(column)) != 1:
                problem = f"{count} columns" if count else "no column"
                hint = suggest_name(column, header).strip()
                mistakes.append(f'{problem} "{column}" for {name}{f" ({hint})" if hint else ""}')
        if mistakes:
            swapped = [
                f" The column comes second: {column}={name}."
                for name, column in self.columns.items()
                if name in header and column not in header and (column in (*_KEYS, *COSTS) or direction(column, {}))
            ]
            listed = f"its columns are {', '.join(header)}.{''.join(swapped[:1])}"
            raise UserError(f"{self.path} has {'; '.join(mistakes)}: {listed}")
        way = f"--columns NAME=COLUMN,... says which of the columns {', '.join(header)} hold what"
        if "seed" not in self.columns:
            raise UserError(f"No column holds the seed, by which runs are paired: {way}.")
        if ("method" in self.columns) == bool(self.method):
            raise UserError("The method is a column, method=COLUMN, or --method NAME: give one of the two.")
        if not self.figures:
            raise UserError(f"No column holds a figure, such as accuracy=COLUMN: {way}.")
        if unknown := [name for name in self.percent if name not in self.figures]:
            way = " Name the figure, not its column." * (unknown[0] in header)
            raise UserError(f"--percent {unknown[0]}: it is none of the figures {', '.join(self.figures)}.{way}")

    def _add(self, texts: Mapping[str, str], line: int) -> Iterable[str]:
        """Add a row's results, or yield what is wrong with them."""
        method, values = texts.get("method", self.method), dict[str, float]()
        numbers = {} if "round" in texts else {"round": 1}
        if not (method and method.isprintable()):
            yield "the method must be a text of one line"
        for name, text in texts.items():
            try:
                if name in ("seed", "round"):
                    if not re.fullmatch(r"\d+(\.0*)?", text, re.ASCII):
                        raise ValueError(f'{name} must be a whole number from 0 on, not "{text}"')
                    numbers[name] = int(text.partition(".")[0])
                elif name != "method" and text:
                    values[name] = self._read_number(name, text)
            except ValueError as error:
                yield str(error)
        if numbers.keys() >= {"seed", "round"}:
            key = method, numbers["seed"], numbers["round"]
            if (line_before := self._lines.setdefault(key, line)) != line:
                way = "" if "round" in texts else ", unless a column of rounds is named, round=COLUMN"
                yield f"method, seed{' and round' * (not way)} are those of line {line_before}{way}"
            self.runs.setdefault(key[:2], {})[key[2]] = values

    def _read_number(self, name: str, text: str) -> float:
        try:
            exact = Decimal(text.rstrip("% "))
            number = float(exact.scaleb(-2) if text.endswith("%") or name in self.percent else exact)
        except (ArithmeticError, ValueError):
            raise ValueError(f'{name} must be a number, not "{text}"') from None
        try:
            check_record({"round": 0, name: number if math.isfinite(number) else None}, -1)
        except ValueError as error:
            is_percentage = name in self.figures and 1 < number <= 100
            raise ValueError(f"{error}{f' (a percentage: --percent {name})' * is_percentage}") from None
        return number

    def _doubt_percent(self, figure: str) -> str:
        """Return a sentence if all percentages of a figure that should be high are at most 1, as fractions are."""
        values = [row.get(figure, 0.0) for rounds in self.runs.values() for row in rounds.values()]
        is_doubtful = any(value > 0 for value in values) and not any(value > 0.01 for value in values)
        if direction(figure, {}) != "max" or not is_doubtful:
            return ""
        return f"no {figure} is above 1 %: leave out --percent {figure}, and write small percentages as 0.5 %"

    def write(self, out: Path, *, better: str = "", framework: str = "own code") -> list[Path]:
        """Record the runs in folders of the new folder ``out``, or write nothing.

        Args:
            better: ``"max"`` or ``"min"``, needed if fedkern does not know the main figure, which is the first one.
            framework: name of the program that made the results.

        Returns:
            The folders of the runs.
        """
        main = self.figures[0]
        if not (better := better or direction(main, {}) or ""):
            raise UserError(f"Nothing says whether a low {main} is a good one: give --better max or --better min.")
        if out.exists() or out.is_symlink():
            raise UserError(f"{out} is there already: name a new folder with --out.")
        names = {key: folder_name([key[0], f"seed={key[1]}"]) for key in sorted(self.runs)}
        with atomic.new_folder(out, "import") as part:
            for (method, seed), name in names.items():
                with record(
                    part / name, method=method, seed=seed, framework=framework, main=main, better=better
                ) as run:
                    run.durable = False
                    for number, values in sorted(self.runs[method, seed].items()):
                        run.round(number, **{"seconds": math.nan, **values})
        return [out / name for name in names.values()]
