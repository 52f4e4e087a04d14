"""Play the notebooks of examples/ and store their outputs in them: python -m benchmarks.notebooks."""

import base64
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

import fedkern

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))
COLOURS = 128
"""Colours of a stored picture: enough for charts, at a third of the bytes."""


def play(path: Path, folder: Path) -> Any:
    """Return a notebook with its outputs in a kernel of this Python in ``folder``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place, record_timing=False)
    client.execute(env={**os.environ, "PYTHONPATH": str(Path(fedkern.__file__).parents[1])})
    return notebook


def _smaller(picture: str) -> str:
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as full:
        full.convert("RGB").quantize(COLOURS).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Play every notebook, and write it with its outputs."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = play(path, Path(folder))
        notebook.metadata.language_info = {"name": "python"}  # without the version of this machine's Python
        for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _smaller(data["image/png"])
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
