"""Secret bits of the server, from which the noise of client-level differential privacy follows.

The secret is on the disk before the first release, so that a resumed run repeats its noise, and beside the checkpoints,
which are not published.
"""

import re
import secrets
from pathlib import Path

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.files.filesystem import read_text
from fedkern.privacy.keys import SECRET_BYTES

NAME = "server-secret.txt"
_DIGITS = re.compile(rf"[0-9a-f]{{{2 * SECRET_BYTES}}}\n")


def draw_secret(folder: Path) -> str:
    """Draw the secret of a new run, 32 hexadecimal digits, into the folder of its checkpoints."""
    secret = secrets.token_hex(SECRET_BYTES)
    atomic.write_bytes(folder / NAME, f"{secret}\n".encode())
    return secret


def read_secret(folder: Path) -> str:
    """Return the secret in a folder, or raise UserError if the file is missing or damaged."""
    path = folder / NAME
    try:
        text = read_text(path, "ascii")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not _DIGITS.fullmatch(text):
        raise UserError(
            f"{path} is missing or damaged, so that this private run cannot repeat its noise: put the file back, or "
            "start the run again in a new folder."
        )
    return text.strip()


def load_or_create(folder: Path, *, begun: bool) -> str:
    """Return the secret of a run, drawn unless the run has ``begun`` or the file exists."""
    return read_secret(folder) if begun or (folder / NAME).exists() else draw_secret(folder)
