"""The tree of commands: the first word names a file of `fedkern.cli.commands`, or all words are those of a run.

A command's file is imported on demand. Its functions are ``add_flags(parser)``, ``play(request)``, which returns the
exit code, and optionally ``check_request(request, parser)``, which checks the values of the flags and returns the
request.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

from fedkern.cli import flags
from fedkern.cli.front_page import COMMANDS
from fedkern.cli.parser import Parser, check_filled, find_command, read_command
from fedkern.cli.request import Request
from fedkern.errors import UserError
from fedkern.process.standard_streams import print_result

SETTINGS = ("rounds", "data_root", "cache", "workers", "model", "choose")
"""Flags that are settings of a run, as is ``data`` unless it names other data than the run's."""
_FILES = {"resume": "run", "import": "import_csv"}
"""Files of commands whose names are other ones."""


def load_command(name: str) -> ModuleType:
    return importlib.import_module(f"fedkern.cli.commands.{_FILES.get(name, name)}")


def make_parser(name: str) -> Parser:
    parser = Parser(name)
    parser.description = f"{COMMANDS[name][:1].upper()}{COMMANDS[name][1:]}."
    load_command(name).add_flags(parser)
    parser.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    return parser


def parse_words(words: Sequence[str]) -> Request:
    name = find_command(words)
    if name == "run":
        return flags.parse_run(words)
    parser = make_parser(name)
    arguments = read_command(parser, words)
    if arguments.help:
        return Request("help", help=parser.format_help())
    open_ones = [action.dest for action in parser._actions if action.option_strings and action.default is None]
    check_filled({name: getattr(arguments, name) for name in open_ones})
    if parser.folder_of and not getattr(arguments, "folder", getattr(arguments, "folders", None)):
        raise UserError(f"{parser.prog} needs the folder of {parser.folder_of}.")
    settings = SETTINGS if "data_option" in arguments else (*SETTINGS, "data")
    request = flags.as_request(vars(arguments), settings, name)
    checked: Request = getattr(load_command(name), "check_request", lambda request, _: request)(request, parser)
    return checked


def play_request(request: Request) -> int:
    if request.command == "help":
        print_result(request.help)
        return 0
    code: int = load_command(request.command).play(request)
    return code
