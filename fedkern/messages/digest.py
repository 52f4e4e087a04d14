"""Digests: two messages or states with the same digest are equal, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from fedkern.messages.leaves import leaves


def digest(message: object) -> str:
    """Return the BLAKE2b of a message: names, dtypes, shapes and bits of all its contents."""
    total = hashlib.blake2b(digest_size=16)

    def put(value: object) -> None:
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


class Fingerprint:
    """Record of a state, by which a change is noticed.

    Another tensor, or another version of one, is a change without reading. Writes through ``.data``, NumPy's view or a
    fused optimiser change neither, so otherwise digests are compared.
    """

    def __init__(self, state: object) -> None:
        self._tensors, self._digest = _tensors_in(state), digest(state)

    def matches(self, state: object) -> bool:
        # Both hold their tensors, so that no new tensor gets the identity of an old one.
        pairs = zip_longest(_tensors_in(state), self._tensors, fillvalue=(None, 0))
        are_same = all(new is old and version == old_version for (new, version), (old, old_version) in pairs)
        return are_same and digest(state) == self._digest


def _tensors_in(state: object) -> list[tuple[Tensor, int]]:
    return [(leaf, leaf._version) for leaf in leaves(state) if isinstance(leaf, Tensor)]
