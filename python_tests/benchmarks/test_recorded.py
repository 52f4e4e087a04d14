"""Tests that every result file names the commit that made it, or says that nobody recorded the commit."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import comparisons, recorded
from benchmarks.page import RESULTS

COMMIT = re.compile(rf"{recorded.UNRECORDED}|[0-9a-f]{{7,8}}(-dirty)?")
FILES = [path for folder in (comparisons.RESULTS, RESULTS) for path in sorted(folder.glob("*.json"))]


def commits(content: dict) -> list[str]:
    """Return the commits that a file names.

    A study names one in every finished row.
    """
    if "rows" in content and "machine" not in content:
        builds = [row["fedkern"] for row in content["rows"] if row["ours"] is not None]
        return [build.partition(" ")[2] for commit in builds for build in commit.split(", ")]
    return [content.get("versions", content.get("machine", content)).get("commit", "")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_file_names_its_commit_or_says_unrecorded(path: Path) -> None:
    found = commits(json.loads(path.read_text()))
    assert [commit for commit in found if not COMMIT.fullmatch(commit)] == []


def test_the_commit_is_unrecorded_where_nobody_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "commit", lambda package: "")
    assert recorded.recorded_commit() == "unrecorded"
    monkeypatch.setattr(recorded, "commit", lambda package: f"of {package.name}")
    assert recorded.recorded_commit() == "of benchmarks"
