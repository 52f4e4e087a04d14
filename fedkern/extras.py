"""Packages that fedkern uses where they are installed, and asks for where they are not."""

from __future__ import annotations

from typing import Any

from fedkern.errors import UserError


def pandas() -> Any:
    """The module pandas.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pandas as found
    except ImportError:
        raise UserError("to_pandas needs pandas: pip install pandas.") from None
    return found
