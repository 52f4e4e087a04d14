"""Notes on the image caches that this user's runs have used, for commands on finished runs.

A run folder may come from anyone, so it must not say where files are written: notes are in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fedkern.errors import UserError
from fedkern.files.filesystem import cache_folder


def note_cache(out: Path, cache: str | None) -> None:
    """Note the cache of the run in ``out``, or with None remove an older note.

    Nothing is noted if the cache folder cannot be written.
    """
    with suppress(OSError, UserError, ValueError):  # ValueError: a name that is not UTF-8
        note = _note(out)
        if cache is None:
            note.unlink(missing_ok=True)
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(cache, encoding="utf-8")


def recall_cache(out: str | Path) -> str | None:
    """Return the noted cache of the run in ``out``, or None if it is gone."""
    try:
        note = _note(Path(out))
        if note.stat().st_uid != os.geteuid():  # several users may share a cache folder
            return None
        cache = note.read_text(encoding="utf-8")
        return cache if Path(cache).is_dir() and os.access(cache, os.W_OK) else None
    except (OSError, UserError, ValueError):
        return None


def _note(out: Path) -> Path:
    return cache_folder("runs") / hashlib.sha256(os.fsencode(out.resolve())).hexdigest()
