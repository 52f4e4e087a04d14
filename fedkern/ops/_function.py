"""autograd.Function for calls that end where torch's own begins to notice them: a few dozen microseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch


class EagerFunction(torch.autograd.Function):
    """An ``autograd.Function`` that can be called without the Python in front of it.

    ``apply`` looks for torch.func's transforms and for tensors that outlived one, which takes as long as a small
    kernel. ``call`` is the same for those who know that there are none (:func:`fedkern.ops.backend.eager`).
    """

    call: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.call = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
