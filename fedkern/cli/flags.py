"""The flags of a run, derived from :class:`fedkern.settings.config.RunConfig`, so that a setting is declared once."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from inspect import get_annotations
from typing import Any

from fedkern.cli import extensions
from fedkern.cli.front_page import PROGRAM, front_page
from fedkern.cli.parser import RUN_FLAGS, TRACKERS, Parser, add_arguments, key_values, read_run
from fedkern.cli.request import Request, one_shot
from fedkern.data import COMMON_OPTIONS, DATASETS
from fedkern.errors import UserError
from fedkern.methods import METHODS, method_registry
from fedkern.settings.config import RunConfig
from fedkern.settings.defaults import default_data, defaults
from fedkern.typed_option import Option, as_typed, flag
from fedkern.usercode.named_code import absolute

METAVARS = {
    "data_root": "DIR", "cache": "DIR", "partition": "SPEC", "clients": "N", "rounds": "R", "local_epochs": "E",
    "local_steps": "S", "held_out_client": "NAME|K", "seed": "S", "lr_steps": "E,...", "aggregator": "RULE",
    "server_rule": "RULE", "init": "FILE|DIR", "stop_at": "FIGURE>=V", "boxes": "FILE", "detector": "PATH_OR_NAME",
    "detector_cache": "DIR", "compress": "HOW", "choose": "HOW", "asynchronous": "POLICY",
}  # fmt: skip

# Options of the data sets that have a flag of their own; all others are given by --data-option.
DATA_FLAGS: dict[str, Option] = {
    **COMMON_OPTIONS,
    "max_image_pixels": DATASETS["folder"].options["max_image_pixels"],
    "client_column": DATASETS["csv"].options["client_column"],
}


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


def make_parser(argv: Sequence[str]) -> Parser:
    """Return the parser of a run, with the defaults of the method and the data set that ``argv`` names."""
    method = next((word for word in argv if word in METHODS), None)
    data_names = map(absolute, extensions.flag_values(argv, "--data"))
    data = next((name for name in data_names if name in DATASETS), default_data(method or ""))
    parser = _parser(method, data)
    parser.methods, parser.owners = [*METHODS], method_registry.option_owners
    if method is not None:
        parser.begin(f"{PROGRAM} {method} [flags]\n\n{_method_options(method, data)}")
    return parser


def parse_run(argv: Sequence[str], *around: Parser) -> Request:
    parser = make_parser(argv)
    values = read_run(parser, argv, *around)
    if values.help:
        return Request("help", help=front_page() if values.method is None else parser.format_help())
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
    single = ("resume", *TRACKERS, "profile", "quiet", "json")
    if request.flower is not None and any(getattr(request, name) for name in single):
        raise UserError(
            "--flower writes a project and runs nothing: leave out --resume, displays, trackers and --profile."
        )
    if request.resume and (request.config or (request.out and request.out.resolve() != request.resume.resolve())):
        raise UserError("--resume continues with the stored settings: leave out --config and --out.")
