"""Plugins on the command line, loaded before the other words are read, which may name registered things."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedkern.errors import UserError, make_printable
from fedkern.files.filesystem import expand, read_text
from fedkern.usercode import plugins


def load_plugins(words: Sequence[str]) -> None:
    """Load the plugins of installed packages, of ``--plugin``, of the ``--config`` file and of the ``--resume`` run."""
    plugins.load_installed(_warn)
    for name in flag_values(words, "--plugin"):
        if not name.strip():
            raise UserError("--plugin is given without a value: give it one, or leave the flag out.")
        plugins.load(name)
    for name in flag_values(words, "--data"):
        from fedkern.data.dataset_registry import open_code  # here, since the front page is printed without torch

        open_code(name)
    for file in flag_values(words, "--config"):
        plugins.load_given(_read_plugin_names(expand(file)))
    for folder in flag_values(words, "--resume"):
        from fedkern.settings.config import load_plugins

        load_plugins(expand(folder))


def flag_values(words: Sequence[str], flag: str) -> Iterator[str]:
    """Yield the values of a flag, in words that no parser has read yet."""
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            yield words[i + 1]
        elif word.startswith(f"{flag}="):
            yield word.partition("=")[2]


def _read_plugin_names(path: Path) -> dict[str, str]:
    """Return the plugins in a settings file, none if it is missing or damaged, which its reader reports later."""
    from fedkern.settings.config import read_settings

    try:
        table = read_settings(read_text(path, "utf-8-sig"), source=str(path))
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return dict(table.get("plugins", {}))


def _warn(text: str) -> None:
    print(f"warning: {make_printable(text)}", file=sys.stderr)
