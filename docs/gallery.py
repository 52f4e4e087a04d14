"""Draw the pictures of docs/examples.md into docs/gallery: python docs/gallery.py [NAME ...].

Each script of examples/ runs as it stands, and its last run or comparison gives the picture.
Notebooks hold their pictures.
"""

import base64
import io
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

import fedkern

ROOT = Path(__file__).resolve().parent.parent
SIMULATE, COMPARE = fedkern.simulate, fedkern.compare


def draw(script: Path) -> None:
    """Run a script and save the learning curve of its last run or comparison."""

    def with_picture(play: Callable[..., Any]) -> Callable[..., Any]:
        def play_and_draw(*args: Any, **settings: Any) -> Any:
            result = play(*args, **settings)
            save(next(path for path in result.plot() if path.stem in ("accuracy", "comparison")), script.stem)
            return result

        return play_and_draw

    fedkern.simulate, fedkern.compare = with_picture(SIMULATE), with_picture(COMPARE)
    runpy.run_path(str(script), run_name="__main__")


def extract(notebook: Path) -> None:
    """Save the first picture of a notebook."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    save(io.BytesIO(base64.b64decode("".join(pictures[0]))), notebook.stem)


def save(picture: Any, name: str) -> None:
    """Save a picture, small enough for a repository."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((720, 720))
    image.quantize(32).save(ROOT / "docs" / "gallery" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for path in sorted((ROOT / "examples").glob("*.*")):
            if not sys.argv[1:] or path.stem in sys.argv[1:]:
                print(path.name)
                (extract if path.suffix == ".ipynb" else draw)(path)
        os.chdir(ROOT)
