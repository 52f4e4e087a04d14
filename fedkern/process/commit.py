"""Commit of fedkern's code."""

import contextlib
import functools
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def commit(package: Path = PACKAGE) -> str:
    """Return the hash noted by setup.py, or else by the checkout around ``package``.

    "-dirty" marks files other than recorded results that differ from the commit; "" is unknown.
    """
    with contextlib.suppress(OSError):
        return (package / "commit.txt").read_text().strip()
    if not (package.parent / ".git").exists():
        return ""

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", package.parent, *words], capture_output=True, text=True, check=False)

    with contextlib.suppress(OSError):
        changed = ask("diff", "--quiet", "HEAD", "--", ":!benchmarks/*results/*").returncode
        return ask("describe", "--always", "--match=").stdout.strip() + ("-dirty" if changed == 1 else "")
    return ""
