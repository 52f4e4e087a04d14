"""Provenance of a run: hashes of data, code and files, and the version, which comparisons check."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import fedkern
from fedkern.files.filesystem import open_regular, report_unreadable
from fedkern.settings.config import FOLDER, NAME, RunConfig, flatten_table
from fedkern.usercode import named_code

OF_DATA = ("classes", "sizes", "names", "labels", "images", "samples", "function")
"""Entries of a run's identity for the data (`fedkern.data.identity`), unlike those with the name of a setting."""
_READ_IN_PART = ("train_samples", "public_samples")
"""Settings that decide which images a run has read."""
_UNHASHED_PATHS = ("data_root", "cache", "init", "model", "data_options.detector_cache")
"""Paths with contents that have other entries, or that change no figure."""


def files_identity(config: RunConfig) -> dict[str, str]:
    """Return hashes of files, folders and code by the setting that names them, and the version."""
    identity = {"version": fedkern.__version__}
    for name, value in flatten_table(config.to_dict()).items():
        if isinstance(value, str) and name not in _UNHASHED_PATHS and Path(value).is_absolute():
            digest = hashlib.sha256()
            for path in _files(Path(value)):
                digest.update(f"{path.relative_to(value)}\0".encode(errors="surrogateescape"))
                with report_unreadable(path), open_regular(path) as file:
                    digest.update(hashlib.file_digest(cast(Any, file), "sha256").digest())
                identity[name] = digest.hexdigest()
    return identity | hash_code({"data": config.data, "choose": config.choose, **dict(config.method_options.code())})


def hash_code(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the identities of those texts that name code in a file."""
    named = {name: location for name, text in texts.items() if (location := named_code.parse(text)) is not None}
    return {
        name: named_code.read_code(Path(os.path.realpath(location.file)), str(location)).identity
        for name, location in named.items() if location.file
    }  # fmt: skip


def _files(path: Path) -> list[Path]:
    """Return the file itself, or the files in a folder, of a run folder the checkpoints, which no report changes."""
    if path.is_dir():
        top = path / FOLDER if (path / NAME).exists() else path
        return sorted(path for path in top.rglob("*") if path.is_file())
    return [path] if path.is_file() else []


def code_identity(config: RunConfig) -> dict[str, str]:
    """Return hashes of a run's code and files by setting, and the version."""
    hashes = {"model": config.model_sha256, "layout": config.model_layout, "init": config.init_sha256}
    hashes |= {"method": config.method_sha256, "training": config.training_sha256}
    hashes |= {f"plugins.{name}": value for name, value in config.plugins.items()}
    hashes |= {name: value for name, value in config.identity.items() if name not in OF_DATA}
    return {name: value for name, value in hashes.items() if value is not None}


def other_data(config: RunConfig, peer: RunConfig) -> list[str]:
    """Return the parts in which two runs' data differ under the same settings."""
    hashes, peer_hashes = config.identity, peer.identity
    if config.data != peer.data or config.data_options != peer.data_options:
        return []
    partly = any(getattr(config, name) != getattr(peer, name) for name in _READ_IN_PART)
    names = [name for name in OF_DATA if name in hashes and name in peer_hashes and not (partly and name == "images")]
    return [name for name in names if hashes[name] != peer_hashes[name]]


def other_code(config: RunConfig, peer: RunConfig) -> list[str]:
    """Return the settings that name the same code or file in two runs, but with other content."""
    settings, peer_settings = flatten_table(config.to_dict()), flatten_table(peer.to_dict())
    identity, peer_identity = code_identity(config), code_identity(peer)

    def is_same(name: str) -> bool:
        setting = "model" if name == "layout" else name
        is_comparable = config.method == peer.method or not name.startswith(("options.", "method"))
        return is_comparable and (name.startswith("plugins.") or settings.get(setting) == peer_settings.get(setting))

    changed = [name for name, text in identity.items() if peer_identity.get(name, text) != text and is_same(name)]
    return list(dict.fromkeys("model" if name == "layout" else name for name in changed))


def describe_difference(config: RunConfig, peer: RunConfig) -> str:
    """Describe the differences in data and code of two runs, or return ""."""
    parts = [f"different data ({', '.join(data)})"] if (data := other_data(config, peer)) else []
    code = [_in_words(name, config) for name in other_code(config, peer)]
    return " and ".join([*parts, *([f"another {', '.join(code)}"] if code else [])])


def _in_words(name: str, config: RunConfig) -> str:
    if name == "version":
        return "version of fedkern"
    part, _, key = name.partition(".")
    if part == "plugins":
        return f"plugin {key}"
    words = {"method": "class of the method", "network": "code of the network", "loss_fn": "loss, metric or collation"}
    return f"{words.get(name, key or name)} {flatten_table(config.to_dict()).get(name, '')}".strip()
