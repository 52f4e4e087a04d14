"""Errors for the user: each message is one sentence."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable

WORD, MESSAGE, TRACEBACK = 1000, 4000, 32_000
"""Most characters shown of a word, a message and a traceback: a name from a file can have any length."""


RAISED = (Exception, SystemExit, GeneratorExit)
"""What other people's code may raise by mistake; a KeyboardInterrupt is the user's own."""


class UserError(Exception):
    """A mistake in the input (flag, path, file, value), not in fedkern.

    The message is one sentence that says what is wrong and what to do, made :func:`printable`.  The command line prints
    the message on standard error and exits with ``exit_code``; a library caller sees an ordinary exception.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class OtherFormat(UserError):
    """A stored file whose format has another number than this version of fedkern reads; see :func:`other_format`."""


def other_format(path: object, found: object, read: int) -> OtherFormat:
    """The error for a file that names the format ``found`` (None: names none) where the format ``read`` is read."""
    named = "no format number" if found is None else f"format {found!r}"
    return OtherFormat(
        f"{path} has {named}, and this version of fedkern reads format {read}: use the version that wrote it, or make "
        "it again."
    )


class RunFailed(UserError):
    """A run that failed without a result to keep, although every input was valid; exit code 1."""

    exit_code = 1


class CodeFailed(RunFailed):
    """Code of a method raised what would otherwise be taken for an error of fedkern or the machine.

    Attributes:
        traceback: traceback of the exception, as text.
    """

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__(f"{where} failed: {described(error)}; the traceback names the file to mend.")
        self.traceback = traced(error)
        self.__cause__ = error


class ClientFailed(RunFailed):
    """A client's part of a method raised an exception.

    Attributes:
        client: number of the client.
        what: the exception, in one line.
        traceback: traceback of the exception, as text.
    """

    def __init__(self, client: int, what: str, traceback: str = "", when: str = "", label: str = "") -> None:
        way = "mend the method, or leave such clients out with --on-error skip"
        super().__init__(f"Client {label or client} failed{f' {when}' if when else ''}: {what}; {way}.")
        self.client, self.what, self.traceback = client, printable(what), printable(traceback, TRACEBACK)

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        return ClientFailed, (self.client, self.what, self.traceback)

    def at(self, when: str, label: str = "") -> ClientFailed:
        """The same error with ``when``, the round, and ``label``, the client's number and name, in the message."""
        return ClientFailed(self.client, self.what, self.traceback, when, label)


def described(error: BaseException) -> str:
    """An exception in one line of bounded length: its type and its text, which may itself raise."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its text cannot be shown"
    name = type(error).__name__
    return printable(f"{name}: {text}" if text else name).rstrip(".")


def shows(error: BaseException) -> bool:
    """Whether an exception has a text, and one of bounded length."""
    try:
        return len(str(error)) <= MESSAGE
    except Exception:
        return False


def traced(error: BaseException) -> str:
    """The traceback of an exception, as text of bounded length."""
    return printable("".join(traceback.format_exception(error)), TRACEBACK)


def printable(text: str, most: int = MESSAGE) -> str:
    """Makes a message safe for a terminal: cuts the middle out of long words and messages, escapes control characters.

    Line ends and tabs are kept.  A text of more than ``most`` characters is a long message.
    """
    if len(text) > WORD:
        text = re.sub(rf"\S{{{WORD + 1},}}", lambda word: _cut(word[0], WORD), text)
        text = _cut(text, most)
    return _escaped(text, "\n\t")


def printable_name(text: str, most: int) -> str:
    """A name as one line of at most ``most`` characters: escapes control characters and line ends, cuts the middle."""
    return _cut(_escaped(text), most)


def _escaped(text: str, kept: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, most: int) -> str:
    """Shortens ``text`` to ``most`` characters: three quarters from the beginning, "...", one quarter from the end."""
    tail = most // 4
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[-tail:]}"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Returns ``' Did you mean "x"?'`` for the candidate most like ``word``, or an empty string when none is close."""
    if len(word) > WORD:
        return ""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
