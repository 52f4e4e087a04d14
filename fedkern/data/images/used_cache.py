"""Notes of this user on the caches of decoded images that runs have used, for commands on finished runs.

A run folder may come from anyone, so it does not say where files are written.  The notes are in the user's own cache
folder, one for every run with ``--cache``, named by a hash of the run folder's path.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fedkern.errors import UserError
from fedkern.files.filesystem import cache_folder


def note_cache(out: Path, cache: str | None) -> None:
    """Note that the run in ``out`` uses ``cache``.

    None removes the note of an earlier run in that place.

    Without a cache folder that can be written to, nothing is noted.
    """
    with suppress(OSError, UserError, ValueError):  # ValueError: a name that is not UTF-8
        note = _note(out)
        if cache is None:
            note.unlink(missing_ok=True)
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(cache, encoding="utf-8")


def recall_cache(out: str | Path) -> str | None:
    """Return the cache that a run of this user in ``out`` has used.

    None where there is none any more.
    """
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
