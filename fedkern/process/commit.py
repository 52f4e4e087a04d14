"""Commit of fedkern's code."""

import contextlib
import functools
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def commit(package: Path = PACKAGE) -> str:
    """Return the hash noted by setup.py, or else by the checkout around ``package``.

    "-dirty" marks files that differ from the commit; "" is unknown.
    """
    with contextlib.suppress(OSError):
        return (package / "commit.txt").read_text().strip()
    if not (package.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--match="]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
