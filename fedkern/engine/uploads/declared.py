"""Check that uploads are finite and as the method declares."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkern.engine.uploads.encoders import Drift
from fedkern.engine.uploads.filters import Arrival, Filter, register_filter
from fedkern.messages.states import State
from fedkern.methods.base import Declaration, Message
from fedkern.methods.uploads import is_alike, why_refused


@register_filter("declared")
class Declared(Filter):
    """Filter that refuses uploads of undeclared names, kinds, shapes or dtypes, and values that are not finite."""

    needs_whole_upload = False

    def decode(self, arrival: Arrival) -> str:
        if arrival.checked is not None:
            arrival.info.update(arrival.checked)
            return ""
        why = examine_upload(arrival.sent, arrival.message, arrival.declared, arrival.info)
        if not why and arrival.declared and not arrival.message:
            arrival.message = None
        return why


def examine_upload(
    sent: Message, upload: object, declared: Declaration, info: State, measured: Drift | None = None
) -> str:
    """Check a client's upload, and return why it is refused, or an empty text.

    Args:
        sent: the message that the client was sent.
        upload: the client's upload.
        info: gets ``drift``, the norm of the update, if parameters were sent and came back.
        measured: that norm, if known.
    """
    start, end = sent.get("parameters"), upload.get("parameters") if isinstance(upload, Mapping) else None
    seen: Tensor | None = None
    if isinstance(start, Tensor) and isinstance(end, Tensor) and is_alike(end, start):
        norm = None if measured is None else measured.of(end)
        info["drift"] = drift = float(torch.linalg.vector_norm(end - start) if norm is None else norm)
        seen = end if math.isfinite(drift) else None  # a finite norm has only finite elements
    return why_refused(upload, declared, seen)
