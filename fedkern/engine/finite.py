"""The server's model is finite at the end of every round, or nothing of the round is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedkern.engine.context import RunContext
from fedkern.errors import RunFailed
from fedkern.methods.uploads import all_finite, infinite_as_sent


def check_finite(tensors: Mapping[str, Any], when: str, context: RunContext) -> None:
    """Checks a model.

    Args:
        tensors: its tensors by name; other values pass.
        when: the round, for the message.
        context: has the initial buffers, whose infinities may stay.

    Raises:
        RunFailed: a tensor is not finite.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not all_finite(value):
            if name == "buffers" and infinite_as_sent(value, context.networks.initial_buffers[name]):
                continue
            raise RunFailed(
                f"The model {when} is not finite ({name}), though every upload was: nothing of that round is kept; "
                "lower --lr, or refuse large updates with --max-update-norm."
            )
