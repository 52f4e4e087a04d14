"""The tree of commands: the first word names a file of `fedkern.cli.commands`, or all words are those of a run.

A command's file is imported on demand. Its functions are ``add_flags(parser)``, ``play(request)``, which returns the
exit code, and optionally ``check_request(request, parser)``, which checks the values of the flags and returns the
request.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from fedkern.cli import flags
from fedkern.cli.flags import Parser, as_request, check_filled
from fedkern.cli.front_page import COMMANDS
from fedkern.cli.request import Request
from fedkern.errors import UserError, suggest_name
from fedkern.process.standard_streams import print_result

SETTINGS = ("rounds", "data_root", "cache", "workers", "model")
"""Flags that are settings of a run, as is ``data`` unless it names other data than the run's."""
_FILES = {"resume": "run", "import": "import_csv"}
"""Files of commands whose names are other ones."""


def find_command(words: Sequence[str]) -> str:
    """Return the command that the words name, or "run".

    Only ``--json`` and ``--help`` may stand before it. After another flag the word is that flag's value.
    """
    first_word = next((word for word in words if word not in ("--json", "-h", "--help")), "")
    return first_word if first_word in COMMANDS else "run"


def load_command(name: str) -> ModuleType:
    return importlib.import_module(f"fedkern.cli.commands.{_FILES.get(name, name)}")


def parse_words(words: Sequence[str]) -> Request:
    name = find_command(words)
    if name == "run":
        return flags.parse_run(words)
    module, parser, at = load_command(name), Parser(name), words.index(name)
    parser.description = f"{COMMANDS[name][:1].upper()}{COMMANDS[name][1:]}."
    module.add_flags(parser)
    parser.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    arguments, unknown_words = parser.parse_known_args([*words[:at], *words[at + 1 :]])
    if parser.rest is not None:
        parser.rest, arguments.words = unknown_words, tuple(words)
    elif unknown_words:
        names = [word for action in parser._actions for word in action.option_strings]
        flag_name = unknown_words[0].partition("=")[0]
        raise UserError(f'{parser.prog} does not take "{flag_name}".{suggest_name(flag_name, names)} See --help.')
    if arguments.help:
        return Request("help", help=parser.format_help())
    open_ones = [action.dest for action in parser._actions if action.option_strings and action.default is None]
    check_filled({name: getattr(arguments, name) for name in open_ones})
    if parser.folder_of and not getattr(arguments, "folder", getattr(arguments, "folders", None)):
        raise UserError(f"{parser.prog} needs the folder of {parser.folder_of}.")
    settings = SETTINGS if "data_option" in arguments else (*SETTINGS, "data")
    request = as_request(vars(arguments), settings, name)
    checked: Request = getattr(module, "check_request", lambda request, _: request)(request, parser)
    return checked


def play_request(request: Request) -> int:
    if request.command == "help":
        print_result(request.help)
        return 0
    code: int = load_command(request.command).play(request)
    return code
