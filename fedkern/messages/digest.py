"""Digest of a message: two messages with the same digest hold the same, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest(message: Any) -> str:
    """BLAKE2b of a message: names, dtypes, shapes and bits of all its contents."""
    total = hashlib.blake2b(digest_size=16)

    def put(value: Any) -> None:
        if isinstance(value, Mapping):
            total.update(f"{{{len(value)}".encode())
            for name in sorted(value, key=repr):
                total.update(repr(name).encode())
                put(value[name])
        elif isinstance(value, (list, tuple)):
            total.update(f"[{len(value)}".encode())
            for item in value:
                put(item)
        elif isinstance(value, Tensor):
            total.update(f"{value.dtype}{list(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{list(value.shape)}".encode())
            total.update(value.tobytes())
        else:
            total.update(repr(value).encode())

    put(message)
    return total.hexdigest()
