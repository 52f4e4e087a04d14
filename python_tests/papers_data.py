"""Data functions of examples/papers, for tests."""

from pathlib import Path
from typing import Any

from fedkern.data import DATASETS
from fedkern.data.dataset_registry import open_code
from fedkern.usercode import named_code

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "papers"
BRATS, NICO, REPORTS, SLIDES, TINYIMAGENET = PAPERS = tuple(
    f"{FOLDER / name}.py:{name}" for name in ("brats", "nico", "reports", "slides", "tinyimagenet")
)


def open_all() -> None:
    """Make the data sets known to `fedkern.data.load`, as ``--data`` does."""
    for name in PAPERS:
        open_code(name)


def function(paper: str, name: str) -> Any:
    """Return a function of a paper's file, and take back what the file registers, since other tests list registries."""
    named = named_code.parse(f"{paper.rpartition(':')[0]}:{name}")
    assert named is not None
    before = dict(DATASETS)
    try:
        return named_code.load(named, "the function")[0]
    finally:
        DATASETS.clear()
        DATASETS.update(before)
