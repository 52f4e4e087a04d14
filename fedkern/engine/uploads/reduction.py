"""Vectors of an upload that stay on the GPU."""

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
"""Free bytes per parameter on the GPU from which uploads stay there."""


@register_filter("reduction")
class GpuUploads(Filter):
    """Filter that leaves vectors, which the server only adds up, on the GPU if all clients work in this process."""

    needs_whole_upload, keeps_on_device = False, True

    @classmethod
    def build(cls, run: RunObjects) -> GpuUploads | None:
        if run.executor is not run.here or not has_room(run.context.device, run.parameters):
            return None
        run.server.summing = MovingAccumulator
        return cls() if run.server.aggregator is None else None

    def encoders(self, asked: ExchangeRequest) -> Mapping[ClientId, Encoder]:
        names = asked.hooks.on_gpu
        return {k: GpuCheck(names, _without_tensors(asked.declaration_of(k))) for k in asked.sent} if names else {}


@dataclass(frozen=True)
class GpuCheck:
    """Check of an upload, vectors of which stay on the GPU."""

    on_gpu: tuple[str, ...]
    declared: Declaration

    def encode(self, leaving: Departure) -> tuple[Any, State | None]:
        """Check an upload, or send an unfit upload unchanged, for the server to refuse."""
        info: State = {}
        upload = leaving.message
        if examine_upload(leaving.sent, upload, self.declared, info, leaving.drift) or not upload:
            if isinstance(upload, Mapping):
                upload = {name: fetch(value) if isinstance(value, Tensor) else value for name, value in upload.items()}
            return upload, None
        return upload, info


def _without_tensors(declared: Any) -> Any:
    if isinstance(declared, Mapping):
        return {name: _without_tensors(value) for name, value in declared.items()}
    return like(declared) if isinstance(declared, Tensor) else declared


class MovingAccumulator:
    """Accumulator that moves, while empty, to the device of its first vector (see :class:`fedkern.ops.Accumulator`)."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._own = accumulator

    def add(self, vector: Tensor, weight: float | Tensor = 1.0) -> None:
        accumulator = self._own
        if not accumulator.count and vector.device != accumulator.device:
            self._own = accumulator = Accumulator(accumulator.size, accumulator.exact, device=vector.device)
        accumulator.add(vector.to(accumulator.device), weight)

    def mean(self) -> Tensor:
        return fetch(self._own.mean())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # a user's server_update may use all of an accumulator


def has_room(device: torch.device, parameters: int) -> bool:
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > BYTES_FREE * parameters
