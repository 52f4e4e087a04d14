"""Bounds on the norm of an update (``--max-update-norm``, ``--clip-update-norm``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.uploads.filters import Arrival, Filter, register_filter


@register_filter("norm_bounds")
class NormBounds(Filter):
    """Filter that refuses or clips uploads whose update, the change of the sent parameters, has too large a norm.

    Args:
        largest: the norm beyond which an upload is refused; 0: none.
        clip: the norm to which a longer update is clipped; 0: none.
    """

    def __init__(self, largest: float, clip: float) -> None:
        self._largest, self._clip = largest, clip

    @classmethod
    def build(cls, run: RunObjects) -> NormBounds | None:
        largest, clip = run.config.max_update_norm, run.config.clip_update_norm
        return cls(largest, clip) if largest or clip else None

    def decode(self, arrival: Arrival) -> str:
        start = arrival.declared.get("parameters")
        if not isinstance(start, Tensor) or arrival.message is None:
            return ""
        sent = arrival.message["parameters"]
        update = sent.to(start.device).double() - start.double()
        norm = float(torch.linalg.vector_norm(update))
        if self._largest and norm > self._largest:
            return f"has an update of norm {norm:.6g} where --max-update-norm allows {self._largest:g}"
        if self._clip and norm > self._clip:
            arrival.info["clipped"] = factor = self._clip / norm
            arrival.message = {**arrival.message, "parameters": (start + update * factor).to(sent)}
        return ""
