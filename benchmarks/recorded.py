"""Commit that a result file names."""

from pathlib import Path

from fedkern.process.commit import commit
from fedkern.process.versions import versions

UNRECORDED = "unrecorded"
"""What stands in a result file whose commit nobody knows."""


def recorded_commit() -> str:
    """Return the checkout's short hash, with "-dirty" where files differ from the commit, or :data:`UNRECORDED`."""
    return commit(Path(__file__).parent) or UNRECORDED


def recorded_versions() -> dict[str, str]:
    """Return the packages' versions and the commit, which a result file names."""
    return {**versions(), "commit": recorded_commit()}
