"""What travels between a run's server and its clients' nodes: a text and named arrays of bytes.

Without torch, which takes a process a second to import: a process that only hands messages on does without.
"""

from __future__ import annotations

from typing import NamedTuple


class Malformed(ValueError):
    """What arrived is no message of fedkern's; the text says why, as the end of a sentence."""


class Raw(NamedTuple):
    """A tensor as it travels.

    Attributes:
        dtype: a key of `fedkern.flower.runs.portable.DTYPES`.
        data: the elements in the order of memory, in this machine's byte order (little-endian).
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class PackedMessage(NamedTuple):
    """A packed message value: JSON text, and the tensors that it names."""

    text: str
    tensors: dict[str, Raw]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(len(raw.data) for raw in self.tensors.values())
