"""The commit that fedkern's code is of."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def commit(package: Path = PACKAGE) -> str:
    """Return the short hash that setup.py noted in an installed package, or that of the checkout around ``package``.

    Returns:
        The hash, with "-dirty" where files differ from the commit; "" where nobody knows.
    """
    with contextlib.suppress(OSError):
        return (package / "commit.txt").read_text().strip()
    if not (package.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--match="]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
