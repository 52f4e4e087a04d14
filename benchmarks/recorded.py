"""The commit that a result file names."""

from __future__ import annotations

from pathlib import Path

from fedkern.process.commit import commit

UNRECORDED = "unrecorded"
"""What stands in a result file whose commit nobody knows."""


def recorded_commit() -> str:
    """The short hash of the checkout, with "-dirty" where files differ from the commit, or :data:`UNRECORDED`."""
    return commit(Path(__file__).parent) or UNRECORDED
