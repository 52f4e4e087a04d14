"""Format of a run folder, stated in the manifest of its checkpoints."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from fedkern.errors import require_format
from fedkern.files.filesystem import read_json
from fedkern.messages.states import State

NAME = "config.toml"
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
INIT = "init.safetensors"
"""File with the weights of a module that a script gave as ``init``."""
FORMAT = 15


def read_manifest(path: Path) -> State:
    """Return a manifest of this format, with unchecked entries.

    Raises:
        OtherFormat: the manifest has another format.
        OSError, ValueError, KeyError, TypeError: the file is missing or damaged.
    """
    manifest: State = read_json(path)
    require_format(path, manifest["format"], FORMAT)
    return manifest


def check_format(out: Path) -> None:
    """Raise OtherFormat if a run folder has another format, and ignore a missing or damaged manifest."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        read_manifest(out / FOLDER / MANIFEST)


def stored_code(out: Path) -> dict[str, dict[str, str]]:
    """Return the identities, by group, of the code that a script gave a run."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return read_code(read_manifest(out / FOLDER / MANIFEST)["entries"][-1]["info"])
    return {}


def read_code(info: Any) -> dict[str, dict[str, str]]:
    with suppress(LookupError, TypeError, AttributeError):
        tables = info["code"].items()
        return {group: {path: str(text) for path, text in table.items()} for group, table in tables}
    return {}
