"""Local folders of pre-trained networks, as transformers writes them."""

from __future__ import annotations

import hashlib
from pathlib import Path


def content_hash(folder: Path) -> str:
    """Hash of a folder's weights and settings, so that a folder with new weights gets a new cache."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt") and path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode())
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
