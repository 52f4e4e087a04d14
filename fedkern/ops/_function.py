"""autograd.Function for calls that end where torch's own begins to notice them: a few dozen microseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

_graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph


def handed_out(gradients: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """``gradients`` as a backward pass may return them: no tensor that another pass over the graph reads again.

    Whoever receives a gradient may change it in place. Called within a backward pass.
    """
    if not _graph_is_retained():
        return gradients
    return [x.clone() if x is not None and any(x is kept for kept in saved) else x for x in gradients]


class EagerFunction(torch.autograd.Function):
    """An ``autograd.Function`` that can be called without the Python in front of it.

    ``apply`` looks for torch.func's transforms and for tensors that outlived one, which takes as long as a small
    kernel. ``call`` is the same for those who know that there are none (:func:`fedkern.ops.backend.eager`).
    """

    call: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.call = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
