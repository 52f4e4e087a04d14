"""Wording of errors for Python and for Flower's run-config.

The command line's ``--batch-size 8`` is ``batch_size=8`` in Python and ``batch-size=8`` in a run-config of Flower.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from fedkern.data import COMMON_OPTIONS, DATASETS
from fedkern.errors import UserError
from fedkern.models import MODELS
from fedkern.settings.config import RunConfig

_WORD = r"""(?:"[^"]*"|'[^']*'|(?:[^\s,;:)]|[,:](?=\S))*[^\s,;:.)])"""
_SAID = re.compile(rf"--[a-z-]+(?: {_WORD})? \(in Python ([^)]*)\)")
_COMPARED = re.compile(rf"compare METHOD (--sweep {_WORD})")
_FLAG = re.compile(rf"(with )?(?<![\w-])--(?!help)([a-z][a-z0-9-]*)(?:([ =])({_WORD}))?")
_TABLES = {"data-option": 'data_options={{"{0}": {1}}}', "sweep": 'sweep={{"{0}": [{1}]}}', "method-option": "{0}={1}"}


@contextmanager
def _reword(words: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        error.args = (words(str(error)),)
        raise


@contextmanager
def python_words() -> Iterator[None]:
    """Name arguments in place of flags in UserErrors (a context or decorator)."""
    with _reword(to_python_words):
        yield


@contextmanager
def key_words() -> Iterator[None]:
    """Name keys of a run-config in place of flags in UserErrors (a context or decorator)."""
    with _reword(lambda sentence: _FLAG.sub(_key, sentence)):
        yield


def to_python_words(sentence: str) -> str:
    return _FLAG.sub(_argument, _COMPARED.sub(r"fedkern.compare(METHOD, \1)", _SAID.sub(r"\1", sentence)))


def _key(match: re.Match[str]) -> str:
    before, flag, gap, word = (part or "" for part in match.groups())
    if flag == "resume":  # of a run that the command line began
        return match[0]
    if flag in _TABLES and "=" in word:
        return f"{before}{flag}.{word}"
    return f"{before}{flag}={_value(word)}" if _is_value(flag, word) else f"{before}{flag}{gap}{word}"


def _argument(match: re.Match[str]) -> str:
    before, flag, gap, word = (part or "" for part in match.groups())
    name, (key, equals, value) = flag.replace("-", "_"), word.partition("=")
    if flag == "resume":  # followed by a folder, or by the end of a clause
        return before + (f"fedkern.load({_value(word)}).resume()" if word else "resume()")
    if is_data_option(name):
        value = _value(word) if _is_value(flag, word) else f"...{gap}{word}"
        return before + _TABLES["data-option"].format(name, value)
    if flag in _TABLES and equals:
        values = value.split(",") if flag == "sweep" else [value]
        return before + _TABLES[flag].format(key, ", ".join(map(_value, values)))
    name = {"data_option": "data_options", "plugin": "plugins", "method_option": "the method option"}.get(name, name)
    if _is_value(flag, word):
        return f"{before}{name}={_value(word)}"
    return f"{before}{name}{'=' if before else ''}{gap}{word}"


def is_data_option(name: str) -> bool:
    """Return whether data sets have an option of this name that is no setting of a run."""
    options = {*COMMON_OPTIONS}.union(*(info.options for info in DATASETS.values()))
    return name in options - {entry.field for entry in RunConfig.list_options()}


def _is_value(flag: str, word: str) -> bool:
    """Return whether the word behind a flag is its value: a number, a placeholder, a path, or a choice."""
    registries: dict[str, Collection[Any]] = {"data": DATASETS, "model": MODELS}
    choices = registries.get(flag) or next(
        (entry.choices for entry in RunConfig.list_options() if entry.label == f"--{flag}"), None
    )
    return word[:1].isdigit() or word[:1].isupper() or bool({*"/=:'\"."} & {*word}) or word in (choices or ())


def _value(word: str) -> str:
    if word in ("true", "false"):
        return word.capitalize()
    plain = re.fullmatch(r"[-+.\d][-+.\deE]*|[A-Z][A-Z_]*|'.*'|\".*\"", word) or word.startswith("...")
    return word if plain else f'"{word}"'
