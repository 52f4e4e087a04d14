"""Packages that fedkern uses where they are installed, and asks for where they are not."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedkern.errors import UserError


def needed(sentence: str, *modules: str) -> Any:
    """The first of the modules, all of which are imported.

    Raises:
        UserError: a module is not installed; ``sentence`` says what needs the modules, and how to install them.
    """
    try:
        found = [import_module(name) for name in modules]
    except ImportError:
        raise UserError(sentence) from None
    return found[0]


def pandas() -> Any:
    """The module pandas; raises UserError where it is not installed."""
    return needed("to_pandas needs pandas: pip install pandas.", "pandas")


def transformers(what: str) -> Any:
    """The module transformers; raises UserError, which names ``what`` needs it, where it is not installed."""
    return needed(f"{what} needs transformers: install it with pip install 'fedkern[foundation]'", "transformers")
