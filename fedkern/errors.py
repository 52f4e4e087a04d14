"""What a user can get wrong, said in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

WORD, MESSAGE = 1000, 4000
"""Characters of a word, and of a whole message, that are shown; a name from a file may have any number of them."""


class UserError(Exception):
    """A mistake in the input (flag, path, file, value), not in fedkern.

    The message is one sentence that names the thing and the way out, made :func:`printable`.  The command line prints
    it on standard error and exits with ``exit_code``; a library caller sees an ordinary exception.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class RunFailed(UserError):
    """A run that has come to nothing that could be kept, though every input was one that it takes; exit code 1."""

    exit_code = 1


class ClientFailed(RunFailed):
    """A client's part of a method raised an exception.

    Attributes:
        client: its number.
        what: the exception, in a line.
        traceback: where it was raised.
    """

    def __init__(self, client: int, what: str, traceback: str = "", when: str = "") -> None:
        way = "mend the method, or leave such clients out with --on-error skip"
        super().__init__(f"Client {client} failed{f' {when}' if when else ''}: {what}; {way}.")
        self.client, self.what, self.traceback = client, printable(what), traceback

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        return ClientFailed, (self.client, self.what, self.traceback)

    def at(self, when: str) -> ClientFailed:
        """The same with the round in the sentence."""
        return ClientFailed(self.client, self.what, self.traceback, when)


def printable(text: str) -> str:
    """A message as a terminal can take it: long words and long messages without their middle, controls as escapes."""
    if len(text) > WORD:
        text = re.sub(rf"\S{{{WORD + 1},}}", lambda word: _cut(word[0], WORD), text)
        text = _cut(text, MESSAGE)
    return _escaped(text, "\n\t")


def printable_name(text: str, most: int) -> str:
    """A name as one line of at most ``most`` characters: controls and line ends as escapes, without its middle."""
    return _cut(_escaped(text), most)


def _escaped(text: str, kept: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, most: int) -> str:
    """The first three quarters and the last quarter of what is shown of ``text``."""
    tail = most // 4
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[-tail:]}"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Returns ``' Did you mean "x"?'`` for the candidate most like ``word``, or an empty string when none is close."""
    if len(word) > WORD:
        return ""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
