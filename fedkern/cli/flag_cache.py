"""File in the user's cache folder by which a command prints help, and refuses unknown flags, without importing torch.

The file is JSON: the flags and the help of all commands and methods, after a digest of the code that declares them.
Plugins and other user-defined code may add to them, so that a command with such code does without the file.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

from fedkern import __version__
from fedkern.cli.extensions import flag_values
from fedkern.cli.front_page import COMMANDS
from fedkern.cli.parser import Parser, find_command, read_command, read_run
from fedkern.errors import UserError
from fedkern.files.filesystem import cache_folder, read_text, replace
from fedkern.process.launcher import JOB
from fedkern.usercode.plugins import GROUP


def consult(words: Sequence[str]) -> tuple[object, Callable[[], None]]:
    """Return what the words print without torch, None if they need torch, and a function that writes a missing file.

    Raises:
        UserError: an unknown flag or method.
    """
    if not _is_built_in(words):
        return None, lambda: None
    code, tables = _digest(), None
    with suppress(OSError, ValueError, UserError):
        digest, _, text = read_text(_path()).partition("\n")
        tables = json.loads(text) if digest == _digest(code + text) else None
    if tables is None:
        return None, lambda: _write(code)
    name = find_command(words)
    parser = Parser("" if name == "run" else name)
    entries, parser.rest, page = tables["parsers"][name]
    for names, nargs, metavar, choices in entries:
        value = {"action": "store_true"} if nargs == 0 else {"nargs": nargs, "metavar": metavar, "choices": choices}
        parser.add_argument(*names, **value)
    parser.methods, parser.owners = tables["methods"], lambda: tables["owners"]
    values = read_command(parser, words) if parser.command else read_run(parser, words)
    answer = None
    if values.help and parser.command:
        answer = page
    elif values.help and values.method and not values.data:  # the data set decides on defaults
        answer = next((tables["methods"][word] for word in words if word in tables["methods"]), page)
    elif name == "list":
        answer = tables["list"]["json" if values.json else "text"]
    return answer, lambda: None


def _is_built_in(words: Sequence[str]) -> bool:
    """Return whether no user-defined code may add methods or options, and no other process has a say."""
    code = [value for flag in ("--plugin", "--config", "--resume") for value in flag_values(words, flag)]
    if code or any(":" in value for value in flag_values(words, "--data")):
        return False
    with suppress(Exception):  # damaged metadata of any package
        return not ("torch" in sys.modules or JOB in os.environ or metadata.entry_points(group=GROUP))
    return False


def _write(code: str) -> None:
    """Write the file, unless ``code`` has changed while it was imported or the folder cannot be written."""
    from fedkern.cli import command_parser, flags
    from fedkern.cli.commands import list as listing
    from fedkern.methods import METHODS, method_registry

    with suppress(Exception):  # the command itself has no need of the file
        parsers = {name: command_parser.make_parser(name) for name in COMMANDS} | {"run": flags.make_parser([])}
        tables = {
            "parsers": {
                name: (_entries(parser), parser.rest, parser.format_help()) for name, parser in parsers.items()
            },
            "methods": {method: flags.make_parser([method]).format_help() for method in METHODS},
            "owners": method_registry.option_owners(),
            "list": {"json": listing.catalogue(), "text": listing.describe()},
        }
        text = json.dumps(tables)
        if _digest() == code:
            _path().parent.mkdir(parents=True, exist_ok=True)
            replace(_path(), lambda part: part.write_text(f"{_digest(code + text)}\n{text}", "utf-8"), durable=False)


def _entries(parser: Parser) -> list[object]:
    return [
        (entry.option_strings or [entry.dest], entry.nargs, entry.metavar, entry.choices and [*entry.choices])
        for entry in parser._actions
    ]


def _path() -> Path:
    return cache_folder("flags") / "flags.json"


def _digest(text: str = "") -> str:
    """Return the digest of a text, or of fedkern's code and the versions of fedkern and Python."""
    digest = blake2b(text.encode())
    if not text:
        digest.update(f"{__version__} {sys.version} {sys.flags.optimize}".encode())
        for file in sorted(filter(Path.is_file, Path(__file__).parents[1].rglob("*.py"))):  # no editor's lock
            content = file.read_bytes()
            digest.update(f"{file} {len(content)} ".encode() + content)
    return digest.hexdigest()
