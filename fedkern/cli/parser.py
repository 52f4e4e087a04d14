"""Parser of a command or a run, which keeps the words of the command line as they are and needs no torch."""

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from fedkern.cli.front_page import COMMANDS, PROGRAM, USAGE
from fedkern.errors import UserError, hint_owners, suggest_name, unknown_method
from fedkern.typed_option import as_typed, flag

FOLDERS = ("config", "out", "resume", "flower", "data_root", "cache", "teachers", "init")
"""Flags that name a folder or a file. An empty value would mean the current folder, or none."""
RUN_FLAGS: dict[str, tuple[Any, ...]] = {
    "method_option": ("key=value", "an option of the method; repeatable", []),
    "plugin": (
        "FILE.py|MODULE",
        "Python code that registers user-defined methods, data, metrics ... (docs/plugins.md); repeatable",
        [],
    ),
    "config": ("FILE.toml", "settings from a file; flags override it"),
    "out": ("DIR", "run folder; default runs/<method>-<data>-<time>"),
    "resume": ("DIR", "continue the run in this folder"),
    "flower": ("DIR", "write a Flower project for this run instead of running it (docs/flower.md)"),
    "own_data": ("", "with --flower: every node has only its own client's data"),
    "tensorboard": ("", "also write every round's figures as TensorBoard event files"),
    "wandb": ("PROJECT", "also log every round's figures to a project of Weights & Biases"),
    "mlflow": ("EXPERIMENT", "also log every round's figures to an experiment of MLflow"),
    "profile": ("", "write a trace of one round into the run folder, for chrome://tracing"),
    "predictions": ("", "write the final network's class and probabilities of every test image to predictions.csv"),
    "report": ("", "write report.html at the end, one file to read in a browser"),
    "quiet": ("", "print nothing but the run folder at the end"),
    "json": ("", "print only the summary, as JSON"),
}
"""Flags of a run that are not settings, as `add_arguments` takes them."""
TRACKERS = ("tensorboard", "wandb", "mlflow")


class Parser(argparse.ArgumentParser):
    """An argument parser of a command or a run that raises :class:`UserError` instead of exiting.

    Attributes:
        command: name of the command, "" for a run.
        folder_of: what has to be in the folders that the command needs.
        rest: words that are none of its flags, None if such words are errors.
        methods: names of all methods, for a run.
        owners: returns the methods of every method option, for a run.
    """

    def __init__(self, command: str = "") -> None:
        super().__init__(
            f"{PROGRAM} {command}".strip(), allow_abbrev=False, add_help=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        )  # fmt: skip
        self.command, self.folder_of = command, ""
        self.color = False  # help is the same on a terminal, also with Python 3.14
        self.rest: list[str] | None = None
        self.methods: Sequence[str] = ()
        self.owners: Callable[[], Mapping[str, Sequence[str]]] = dict

    def add_folder(self, of: str, help: str = "", metavar: str = "DIR", *, several: bool = False) -> None:
        self.folder_of = of
        name, count = ("folders", "*") if several else ("folder", "?")
        self.add_argument(name, nargs=count, metavar=metavar, help=help or f"folder of {of}")

    def begin(self, text: str) -> None:
        """Start the help with a literal text instead of the usage."""
        self.usage, self.description = argparse.SUPPRESS, text
        self.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110)

    def error(self, message: str) -> NoReturn:
        if lacking := re.fullmatch(r"argument (\S+): expected one argument", message):
            metavar = next(action.metavar for action in self._actions if lacking[1] in action.option_strings)
            raise UserError(f"{lacking[1]} is given without a value: write {lacking[1]} {metavar}.")
        raise UserError(message[:1].upper() + message[1:] + ".")


def add_arguments(group: argparse._ActionsContainer, flags: Mapping[str, tuple[Any, ...]]) -> None:
    """Add flags by name, each with the name of its value ("" for a switch) and its help.

    A third entry is the default, ``[]`` for a repeatable flag.
    """
    for name, (metavar, text, *default) in flags.items():
        kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        if default:
            kind |= {"default": default[0], "action": "append" if default[0] == [] else "store"}
        group.add_argument(flag(name), help=text, **kind)


def check_filled(values: Mapping[str, str | None]) -> None:
    """Raise UserError for a flag with an empty value, such as that of an unset shell variable."""
    for name, value in values.items():
        if value is not None and not value.strip():
            raise UserError(f"{flag(name)} is given without a value: give it one, or leave the flag out.")


def key_values(words: Sequence[str], name: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f'{flag(name)} needs the form key=value, got "{word}".')
        plain = key.strip().replace("-", "_")
        if plain in pairs:
            raise UserError(f'The {name.replace("_", " ")} "{plain}" is given twice.')
        pairs[plain] = value.strip()
    return pairs


def find_command(words: Sequence[str]) -> str:
    """Return the command that the words name, or "run".

    Only ``--json`` and ``--help`` may stand before it. After another flag the word is that flag's value.
    """
    first_word = next((word for word in words if word not in ("--json", "-h", "--help")), "")
    return first_word if first_word in COMMANDS else "run"


def read_command(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Return the words of a command's flags, or raise UserError for unknown flags."""
    at = words.index(parser.command)
    arguments, unknown_words = parser.parse_known_args([*words[:at], *words[at + 1 :]])
    if parser.rest is not None:
        parser.rest, arguments.words = unknown_words, tuple(words)
    elif unknown_words:
        names = [word for action in parser._actions for word in action.option_strings]
        flag_name = unknown_words[0].partition("=")[0]
        raise UserError(f'{parser.prog} does not take "{flag_name}".{suggest_name(flag_name, names)} See --help.')
    return arguments


def _unknown(word: str, method: str | None, *parsers: Parser) -> UserError:
    methods = parsers[0].methods
    if not word.startswith("-"):
        hint = f"; {PROGRAM} compare {method} {word} plays both" if word in methods and word != method else ""
        return UserError(f'Unexpected word "{word}": one METHOD is expected, and values follow their flag{hint}.')
    token = word.partition("=")[0]
    option = token.lstrip("-").replace("-", "_")
    owners = parsers[0].owners()
    if method in owners.get(option, ()):
        return UserError(f"{token} is an option of {method}: write --method-option {option}=VALUE.")
    flags = [name for parser in parsers for action in parser._actions for name in action.option_strings]
    hint = suggest_name(token, flags)
    see = f"{PROGRAM} {method or 'METHOD'}" if len(parsers) == 1 else parsers[-1].prog
    return UserError(f'Unknown flag "{token}".{hint}{hint_owners(option, owners)} See {see} --help.')


def read_run(parser: Parser, argv: Sequence[str], *around: Parser) -> argparse.Namespace:
    """Return the words of the flags of a run, or raise UserError for unknown flags and methods."""
    named = next((word for word in argv if word in parser.methods), None)
    values, extra_words = parser.parse_known_args(list(argv))
    command = next((word for word in (values.method, *extra_words) if word in COMMANDS), None)
    if command is not None:  # with such a word first, another parser reads the command
        raise UserError(f"Name {command} first, then its flags: {PROGRAM} {USAGE[command]}.")
    unknown = [word for word in extra_words if word.startswith("-")]
    # Unknown flags first: argparse may have taken the value of such a flag for the method.
    if not unknown and not values.help and values.method not in (None, *parser.methods):
        raise unknown_method(values.method, parser.methods, [*COMMANDS, "--resume"])
    for word in [*unknown, *extra_words]:
        raise _unknown(word, named, parser, *around)
    check_filled({name: getattr(values, name) for name in (*FOLDERS, "wandb", "mlflow")})
    if not (values.help or values.method or values.config or values.resume):
        raise UserError(f"Which method? For example: {PROGRAM} fedgid (all of them: {PROGRAM} list).")
    return values


def as_word(value: object) -> str:
    return shlex.quote(as_typed(value))
