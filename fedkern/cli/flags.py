"""The flags, derived from :class:`fedkern.settings.config.RunConfig`, so that a setting is declared once."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from inspect import get_annotations
from pathlib import Path
from typing import Any, NoReturn

from fedkern.cli import extensions
from fedkern.cli.front_page import COMMANDS, PROGRAM, USAGE, front_page
from fedkern.cli.request import Request, one_shot
from fedkern.data import COMMON_OPTIONS, DATASETS
from fedkern.errors import UserError, suggest_name
from fedkern.methods import METHODS, method_registry
from fedkern.settings.config import RunConfig
from fedkern.settings.defaults import default_data, defaults
from fedkern.typed_option import Option, as_typed, flag
from fedkern.usercode.named_code import absolute

FOLDERS = ("config", "out", "resume", "flower", "data_root", "cache", "teachers", "init")
"""Flags that name a folder or a file. An empty value would mean the current folder, or none."""
METAVARS = {
    "data_root": "DIR", "cache": "DIR", "partition": "SPEC", "clients": "N", "rounds": "R", "local_epochs": "E",
    "local_steps": "S", "held_out_client": "NAME|K", "seed": "S", "lr_steps": "E,...", "aggregator": "RULE",
    "server_rule": "RULE", "init": "FILE|DIR", "stop_at": "FIGURE>=V", "boxes": "FILE", "detector": "PATH_OR_NAME",
    "detector_cache": "DIR", "compress": "HOW", "asynchronous": "POLICY",
}  # fmt: skip

# Options of the data sets that have a flag of their own; all others are given by --data-option.
DATA_FLAGS: dict[str, Option] = {
    **COMMON_OPTIONS,
    "max_image_pixels": DATASETS["folder"].options["max_image_pixels"],
    "client_column": DATASETS["csv"].options["client_column"],
}
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
    "profile": ("", "write a trace of one round into the run folder, for chrome://tracing"),
    "predictions": ("", "write the final network's class and probabilities of every test image to predictions.csv"),
    "report": ("", "write report.html at the end, one file to read in a browser"),
    "quiet": ("", "print nothing but the run folder at the end"),
    "json": ("", "print only the summary, as JSON"),
}
"""Flags of a run that are not settings, as `add_arguments` takes them."""
TRACKERS = ("tensorboard", "wandb")


class Parser(argparse.ArgumentParser):
    """An argument parser of a command or a run that raises :class:`UserError` instead of exiting.

    Attributes:
        command: name of the command, "" for a run.
        folder_of: what has to be in the folders that the command needs.
        rest: words that are none of its flags, None if such words are errors.
    """

    def __init__(self, command: str = "") -> None:
        super().__init__(
            f"{PROGRAM} {command}".strip(), allow_abbrev=False, add_help=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        )  # fmt: skip
        self.command, self.folder_of = command, ""
        self.rest: list[str] | None = None

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


def _describe(option: Option, default: object, *, choices: bool = False) -> str:
    parts = [option.help]
    if option.range and (choices or option.choices is None):
        parts.append(option.range)
    if default is not None:
        parts.append(f"default {as_typed(default)}")
    return "; ".join(parts)


def _metavar(name: str, type_: type, choices: Iterable[object] | None) -> str:
    if choices:
        return "|".join(map(str, choices))
    return METAVARS.get(name) or {int: "N", float: "F", bool: "true|false"}.get(type_, "NAME")


def _data_help(name: str, option: Option) -> str:
    only = "" if name in COMMON_OPTIONS else ", ".join(k for k, v in DATASETS.items() if name in v.options) + ": "
    default = "" if option.default == "" else f"; default {option.default}"
    return f"{only}{option.help}{default}".replace("%", "%%")


def _other_data_options() -> str:
    named = {name: ", ".join(key for key in info.options if key not in DATA_FLAGS) for name, info in DATASETS.items()}
    return "; ".join(f"{keys} ({name})" for name, keys in named.items() if keys)


def _parser(method: str | None, data: str) -> Parser:
    parser = Parser()
    # The parser keeps values as strings; options convert them, with messages that name the flag and the allowed range.
    method_group = parser.add_argument_group("method")
    method_group.add_argument("method", nargs="?", metavar="METHOD", help="one of " + ", ".join(sorted(METHODS)))
    base = defaults(method or "", data)
    for title, settings in _sections().items():
        group = parser.add_argument_group(title)
        for setting in settings:
            name, default = setting.field, base.get(setting.field, setting.default)
            metavar = _metavar(name, setting.type, setting.choices)
            help_text = _describe(setting, default).replace("%", "%%")
            if name == "rounds" and one_shot(method):
                help_text = argparse.SUPPRESS  # accepted but hidden, so that giving it raises an error of its own
            switch_words: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.type is bool else {}
            group.add_argument(flag(name), dest=name, metavar=metavar, help=help_text, **switch_words)
        if title == "data":
            for name, option in DATA_FLAGS.items():
                metavar = _metavar(name, type(option.default), option.choices)
                group.add_argument(flag(name), dest=f"data:{name}", metavar=metavar, help=_data_help(name, option))
            text = f"an option of one data set: {_other_data_options()}"
            add_arguments(group, {"data_option": ("key=value", text, [])})
    group = parser.add_argument_group("run")
    add_arguments(group, RUN_FLAGS)
    group.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    return parser


def _sections() -> dict[str, list[Option]]:
    """Return the settings by section, named by its file."""
    declared = {entry.field: entry for entry in RunConfig.list_options() if entry.field != "method"}
    sections = {
        section.__module__.rpartition(".")[2]: [declared[name] for name in get_annotations(section) if name in declared]
        for section in reversed(RunConfig.__mro__)
    }
    return {title: settings for title, settings in sections.items() if settings}


def _method_options(method: str, data: str) -> str:
    kind = METHODS[method]
    declared = kind.Options.list_options()
    if not declared:
        return f"{method}: {kind.description}\nIt has no options of its own."
    base = kind.Options.parse(defaults(method, data).get("options", {}), method=method).to_dict()
    lines = [f"{method}: {kind.description}", "", "method options (--method-option key=value):"]
    width = max(len(entry.name) for entry in declared) + 2
    for option in declared:
        text = _describe(option, base[option.name], choices=True)
        lines += textwrap.wrap(
            text, 108, initial_indent="  " + option.name.ljust(width), subsequent_indent=" " * (width + 2)
        )
    return "\n".join(lines)


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


def _named_data(argv: Sequence[str], method: str | None) -> str:
    named = extensions.flag_values(argv, "--data")
    return next((name for value in named if (name := absolute(value)) in DATASETS), default_data(method or ""))


def _unknown(word: str, method: str | None, *parsers: Parser) -> UserError:
    if not word.startswith("-"):
        hint = f"; {PROGRAM} compare {method} {word} plays both" if word in METHODS and word != method else ""
        return UserError(f'Unexpected word "{word}": one METHOD is expected, and values follow their flag{hint}.')
    token = word.partition("=")[0]
    option = token.lstrip("-").replace("-", "_")
    if method is not None and option in method_registry.option_names(method):
        return UserError(f"{token} is an option of {method}: write --method-option {option}=VALUE.")
    flags = [name for parser in parsers for action in parser._actions for name in action.option_strings]
    hint = suggest_name(token, flags)
    see = f"{PROGRAM} {method or 'METHOD'}" if len(parsers) == 1 else parsers[-1].prog
    return UserError(f'Unknown flag "{token}".{hint}{method_registry.hint_owners(option)} See {see} --help.')


def parse_run(argv: Sequence[str], *around: Parser) -> Request:
    named = next((word for word in argv if word in METHODS), None)
    data = _named_data(argv, named)
    parser = _parser(named, data)
    values, extra_words = parser.parse_known_args(list(argv))
    command = next((word for word in (values.method, *extra_words) if word in COMMANDS), None)
    if command is not None:  # with such a word first, another parser reads the command
        raise UserError(f"Name {command} first, then its flags: {PROGRAM} {USAGE[command]}.")
    method, unknown = values.method, [word for word in extra_words if word.startswith("-")]
    # Unknown flags first: argparse may have taken the value of such a flag for the method.
    if not unknown and not values.help and method not in (None, *METHODS):
        raise method_registry.unknown_method(method, [*METHODS, *COMMANDS, "--resume"])
    for word in [*unknown, *extra_words]:
        raise _unknown(word, named, parser, *around)
    check_filled({name: getattr(values, name) for name in (*FOLDERS, "wandb")})
    if values.help:
        if method is None:
            return Request("help", help=front_page())
        if named is not None:
            parser.begin(f"{PROGRAM} {named} [flags]\n\n{_method_options(named, data)}")
        return Request("help", method=method, help=parser.format_help())

    names = [entry.field for entry in RunConfig.list_options() if entry.field != "method"]
    request = as_request(vars(values), names, "resume" if values.resume else "run")
    _check(request)
    return request


def as_request(values: dict[str, Any], settings: Iterable[str], command: str) -> Request:
    """Return the request of flags' values: ``settings`` of a run, fields of a request, and other arguments."""
    read = RunConfig.read({name: value for name in settings if (value := values.pop(name, None)) is not None})
    # Other data than the run's are named as they are typed.
    other_data = {"data": values.pop("data")} if "data" in values else {}
    named = {name: value for name in DATA_FLAGS if (value := values.pop(f"data:{name}", None)) is not None}
    pairs = key_values(values.pop("data_option", ()), "data_option")
    if twice := [key for key in pairs if key in named]:
        raise UserError(f'The data option "{twice[0]}" is given twice.')
    fields = {field.name: values.pop(field.name) for field in dataclasses.fields(Request) if field.name in values}
    options, plugins = (tuple(values.pop(name, ())) for name in ("method_option", "plugin"))
    return Request(
        **{**fields, "command": command, "help": ""}, settings={**other_data, **read}, options=options, plugins=plugins,
        data_options={**named, **pairs}, arguments=values,
    )  # fmt: skip


def _check(request: Request) -> None:
    if request.own_data and request.flower is None:
        raise UserError("--own-data is for nodes of Flower: give --flower DIR too.")
    if request.flower is not None and (
        request.resume or request.tensorboard or request.wandb or request.profile or request.quiet or request.json
    ):
        raise UserError(
            "--flower writes a project and runs nothing: leave out --resume, displays, trackers and --profile."
        )
    if request.command == "resume":
        if request.config or (request.out and request.out.resolve() != (request.resume or Path()).resolve()):
            raise UserError("--resume continues with the stored settings: leave out --config and --out.")
    elif request.method is None and request.config is None:
        raise UserError(f"Which method? For example: {PROGRAM} fedgid (all of them: {PROGRAM} list).")


def as_word(value: object) -> str:
    return shlex.quote(as_typed(value))
