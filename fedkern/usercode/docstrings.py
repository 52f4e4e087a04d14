"""Docstrings that fedkern shows to the user, also where ``python -OO`` has stripped them."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any


def docstring(thing: Any) -> str:
    """The docstring of a function or class, read from its source under ``-OO``; empty where there is none."""
    if thing.__doc__ or sys.flags.optimize < 2:
        return inspect.cleandoc(thing.__doc__ or "")
    try:
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        return ast.get_docstring(defined) or ""  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError, SyntaxError):  # no source: nobody can say whether there was one
        return str(thing.__name__)
