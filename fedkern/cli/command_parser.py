"""Parsers of the commands that have flags of their own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedkern.cli.flags import Parser, add_repeatable
from fedkern.cli.front_page import COMMANDS, PROGRAM
from fedkern.errors import UserError, nearest


def command_parser(command: str, description: str = "") -> Parser:
    """A parser without flags; the description is by default that of the front page."""
    return Parser(f"{PROGRAM} {command}", description or f"{COMMANDS[command][:1].upper()}{COMMANDS[command][1:]}.")


def add_data(parser: Parser, options: str) -> None:
    """Adds the flags of another data set than the run's own; ``options`` is the help of ``--data-option``."""
    parser.add_argument("--data", metavar="NAME", help="another data set than the run's own")
    parser.add_argument("--data-root", metavar="DIR", help="where the data files are")
    parser.add_argument("--cache", metavar="DIR", help="folder that keeps the decoded images; by default the run's "
                                                      "own data are read from that of the run")  # fmt: skip
    add_repeatable(parser, "--data-option", "key=value", f"{options}; repeatable")


def add_code(parser: Parser, *, data: bool) -> None:
    """Adds the flags that name the code of a stored run again, and with ``data`` that of another data set."""
    own = "code that registers the run's method or network"
    text = "an option of the run again, where it names code that may run; repeatable"
    add_repeatable(parser, "--method-option", "key=value", text)
    text = f"{own}{', or that other data set' if data else ''}; repeatable"
    add_repeatable(parser, "--plugin", "FILE.py|MODULE", text)


def add_common(parser: Parser, printed: str) -> None:
    """Adds ``--help``, and ``--json``, which prints what ``printed`` names."""
    parser.add_argument("--json", action="store_true", help=f"print {printed} as JSON")
    parser.add_argument("-h", "--help", action="store_true", help="show this help and exit")


def read(parser: Parser, command: str, words: Sequence[str]) -> argparse.Namespace:
    """Reads the words of a command, among them its own name.

    Raises:
        UserError: an unknown flag, or one without its value.
    """
    at = words.index(command)
    found, rest = parser.parse_known_args([*words[:at], *words[at + 1 :]])
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        given = rest[0].partition("=")[0]
        raise UserError(f'{PROGRAM} {command} does not take "{given}".{nearest(given, known)} See --help.')
    return found
