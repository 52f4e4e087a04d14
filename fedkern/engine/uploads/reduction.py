"""Vectors of an upload that stay on the GPU where they were made (see `Method.reduce`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.declared import examine_upload
from fedkern.engine.uploads.encoders import Departure, Encoder
from fedkern.engine.uploads.filters import ExchangeRequest, Filter, register_filter
from fedkern.messages.states import State
from fedkern.methods.base import ClientId, Declaration
from fedkern.methods.uploads import like
from fedkern.ops import Accumulator
from fedkern.process.device_copies import fetch

BYTES_FREE = 128
"""Bytes of free memory of the GPU, per parameter, with which uploads stay there."""


@register_filter("reduction")
class Reduction(Filter):
    """Leave vectors that the method's server only adds up on the GPU on which all clients work, in this process."""

    needs_whole_upload, keeps_on_device = False, True

    @classmethod
    def build(cls, run: RunObjects) -> Reduction | None:
        if run.executor is not run.here or not has_room(run.context.device, run.parameters):
            return None
        run.server.summing = Following
        return cls() if run.server.aggregator is None else None

    def encoders(self, asked: ExchangeRequest) -> Mapping[ClientId, Encoder]:
        names = asked.hooks.on_gpu
        return {k: Reducing(names, _without_tensors(asked.declaration_of(k))) for k in asked.sent} if names else {}


@dataclass(frozen=True)
class Reducing:
    """Checks an upload, vectors of which stay on the GPU.

    Attributes:
        on_gpu: names of these vectors (see :attr:`Encoder.on_gpu`).
        declared: declaration of the upload, without tensors (see `fedkern.methods.uploads`).
    """

    on_gpu: tuple[str, ...]
    declared: Declaration

    def encode(self, leaving: Departure) -> tuple[Any, State | None]:
        """See :meth:`Encoder.encode`.

        An upload that does not fit travels whole, and the server says why.
        """
        info: State = {}
        upload = leaving.message
        if examine_upload(leaving.sent, upload, self.declared, info, leaving.drift) or not upload:
            return _fetch_upload(upload), None
        return upload, info


def _without_tensors(declared: Any) -> Any:
    """Return a declaration with the shapes and dtypes of its tensors in their place."""
    if isinstance(declared, Mapping):
        return {name: _without_tensors(value) for name, value in declared.items()}
    return like(declared) if isinstance(declared, Tensor) else declared


def _fetch_upload(upload: object) -> object:
    """Return what may not stay on the GPU."""
    if not isinstance(upload, Mapping):
        return upload
    return {name: fetch(value) if isinstance(value, Tensor) else value for name, value in upload.items()}


class Following:
    """An accumulator on the device of its first vector (compare :class:`fedkern.ops.Accumulator`).

    Args:
        accumulator: the accumulator, without vectors, that is made anew on that device.
    """

    def __init__(self, accumulator: Accumulator) -> None:
        self._own = accumulator

    def add(self, vector: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add ``weight * vector``."""
        accumulator = self._own
        if not accumulator.count and vector.device != accumulator.device:
            self._own = accumulator = Accumulator(accumulator.size, accumulator.exact, device=vector.device)
        accumulator.add(vector.to(accumulator.device), weight)

    def mean(self) -> Tensor:
        """Return the weighted mean of all vectors, ``[P]``, in the host's memory."""
        return fetch(self._own.mean())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # a server_update of somebody's own may use all of an accumulator


def has_room(device: torch.device, parameters: int) -> bool:
    """Return whether uploads of so many parameters and their sums can stay on a device."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > BYTES_FREE * parameters
