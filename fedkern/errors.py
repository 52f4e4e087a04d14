"""What a user can get wrong, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input (flag, path, file, value), not in fedkern.

    The message is one sentence that names the thing and the way out.  The command line prints it on standard error and
    exits with ``exit_code``; a library caller sees an ordinary exception.
    """

    exit_code = 2


class RunFailed(UserError):
    """A run that has come to nothing that could be kept, though every input was one that it takes; exit code 1."""

    exit_code = 1


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Returns ``' Did you mean "x"?'`` for the candidate most like ``word``, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
