"""Outputs of frozen encoders, kept by input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from fedkern.models.precision import reduced_dtype

LIMIT = 1 << 30
"""Rows beyond this number of bytes are computed every time."""
_SHARED: dict[bytes, RowMemory] = {}


class RowMemory:
    """Outputs of a frozen network by input, on the CPU.

    Every input is computed alone, because the bits of a row depend on the size of its batch.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, Tensor] = {}
        self._bytes = 0

    @classmethod
    def of(cls, network: nn.Module) -> RowMemory:
        """Return the memory of these weights and settings, which all networks and runs of this process share."""
        digest = blake2b(network.extra_repr().encode())
        for tensor in network.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return _SHARED.setdefault(digest.digest(), cls())

    def __deepcopy__(self, copied: object) -> RowMemory:
        return self

    def rows(self, inputs: Iterable[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return ``compute(x[None])[0]`` of every input without a gradient."""
        with torch.inference_mode(False), torch.no_grad():  # a kept row may come into a training step
            return [self._row(x, compute) for x in inputs]

    def _row(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        mode = f"{reduced_dtype()} {torch.get_num_threads()}"  # bits depend on both
        key = blake2b(x.contiguous().numpy().tobytes() + mode.encode()).digest()
        row = self._rows.get(key)
        if row is None:
            row = compute(x[None].clone())[0]
            self._bytes += row.nbytes
            if self._bytes <= LIMIT:
                self._rows[key] = row
        return row


class RememberingEncoder(nn.Module):
    """Base class of pre-trained encoders, which have a memory once ``--freeze`` has frozen all their parameters.

    ``extra_repr`` returns the settings that outputs depend on.
    """

    memory: RowMemory | None = None
