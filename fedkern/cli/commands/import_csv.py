"""``import FILE.csv``: somebody's results, as recorded runs that `compare` reads beside others."""

import dataclasses
from pathlib import Path

from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.errors import UserError
from fedkern.process.standard_streams import print_result

USAGE = f"""\
{PROGRAM} import FILE.csv --columns NAME=COLUMN,... [flags]    turn a table of results into recorded runs

FILE.csv has one row for each round, or for each finished run. --columns says what its columns hold:
--columns method=algo,seed=seed,round=epoch,accuracy=test_acc makes one run of each method and seed, to be read by
compare and reproduce.
"""


def add_flags(parser: Parser) -> None:
    parser.begin(USAGE)
    parser.add_argument("file", nargs="?", metavar="FILE.csv", help="the results, with the columns' names in line 1")
    add_arguments(parser, {
        "columns": ("NAME=COLUMN,...", "what the columns hold: seed, method, round, figures such as accuracy, and the "
                                       "round's seconds, bytes_up and bytes_down; NAME alone is the column of that "
                                       "name; repeatable", []),
        "percent": ("NAME,NAME", "figures whose numbers are percentages; values such as 41.5 %% need no mention"),
        "method": ("NAME", "the method of all rows, if no column has it"),
        "framework": ("NAME", "the program that made the results, which stands behind the method; default own code"),
        "better": ("max|min", "the better values of the main figure, the first of --columns, if fedkern does not know"),
        "out": ("DIR", "new folder of the runs; default runs/<name of the file>"),
        "json": ("", "print the folders as JSON"),
    })  # fmt: skip


def check_request(request: Request, parser: Parser) -> Request:
    from fedkern.comparison.csv_results import read_columns

    arguments = request.arguments
    if not arguments["file"] or not arguments["columns"]:
        raise UserError(f"{parser.prog} needs FILE.csv and --columns NAME=COLUMN,...: see --help.")
    if arguments["better"] not in (None, "max", "min"):
        raise UserError(f'--better must be max or min, not "{arguments["better"]}".')
    columns = read_columns(arguments["columns"])
    percent = [name.strip() for name in (arguments["percent"] or "").split(",") if name.strip()]
    return dataclasses.replace(request, arguments={**arguments, "columns": columns, "percent": percent})


def play(request: Request) -> int:
    from fedkern.comparison.csv_results import CsvResults
    from fedkern.files.filesystem import expand

    arguments = request.arguments
    path = expand(arguments["file"])
    results = CsvResults(path, arguments["columns"], arguments["percent"], request.method or "")
    out = request.out or Path("runs") / path.stem
    folders = results.write(out, **{name: arguments[name] for name in ("better", "framework") if arguments[name]})
    text = f"{len(folders)} run{'s' * (len(folders) > 1)} from {path} in {out}\ncompare them: {PROGRAM} compare {out}"
    print_result({"folder": str(out), "runs": [str(folder) for folder in folders]} if request.json else text)
    return 0
