"""Data of the papers, and generated files in their official layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from python_tests.papers_data import open_all


@pytest.fixture(autouse=True)
def _papers(registries: None) -> None:
    open_all()


@pytest.fixture
def write_nico() -> Callable[..., Path]:
    """Write a class/context tree of small images whose pixels tell class and context."""

    def write(root, classes=3, contexts=10, images=5, size=(20, 12)):
        for c in range(classes):
            for k in range(contexts):
                # Context names differ between classes, and sort by their number.
                folder = root / f"class{c}" / f"context{k:02d} of {c}"
                folder.mkdir(parents=True)
                for i in range(images):
                    colour = (20 * c, 20 * k, 40 * i)
                    Image.new("RGB", size, colour).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}", quality=95)
        return root

    return write
