"""``autograd.Function`` with less overhead, for operators whose whole call takes a few dozen microseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedkern.ops._core.private_torch import apply_of, graph_is_retained


class Context(Protocol):
    """First argument of both passes of an operator's autograd function.

    Attributes:
        settings: all that the forward pass leaves to the backward pass besides tensors.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]
    settings: Any

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def handed_out(gradients: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return ``gradients``, cloning those among ``saved`` if the graph is retained.

    Their receiver may change them in place, and another pass reads saved tensors again. Only for backward passes.
    """
    if not graph_is_retained():
        return gradients
    return [x.clone() if x is not None and any(x is original for original in saved) else x for x in gradients]


def saved_tensors(ctx: Context) -> tuple[Any, ...]:
    """Return the saved tensors for kernels.

    Hooks on saved tensors may return negative views, whose memory has the opposite sign.
    """
    saved = ctx.saved_tensors
    for x in saved:
        if x is not None and x.is_neg():
            return tuple(x if x is None else x.resolve_neg() for x in saved)
    return saved


class EagerFunction(torch.autograd.Function):
    """``autograd.Function`` whose ``call`` skips the Python code of ``apply``.

    ``apply`` looks for torch.func transforms as long as a small kernel takes. The caller must know that there are none.
    """

    call: ClassVar[Callable[..., Tensor]]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.call = apply_of(cls)
