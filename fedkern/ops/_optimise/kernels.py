"""optimise: interface of a backend's kernel, and the call that the kernel receives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class AdamW(NamedTuple):
    """AdamW's settings, and the bias corrections of its moments at step ``t``."""

    beta1: float
    beta2: float
    bias: float  # 1 - beta1^t
    root: float  # sqrt(1 - beta2^t)
    eps: float


class Call(NamedTuple):
    """One checked step of M optimisers.

    Tensors are ``[M, P]`` of one dtype and device, with unit stride along P and without overlap where they are written
    to; ``anchor`` and ``correction`` may be expanded along M.

    Attributes:
        first, second: the velocity of SGD with momentum (``first``), or both moments of AdamW; updated.
        gradient_sum: the raw gradients are added to this tensor.
        lr: one learning rate for all M, or one per row: a list, or for tensors on a GPU fp64 ``[M]`` there.
        max_norm: largest norm of each row's gradient; None: no clipping.
        zero: whether to set ``gradients`` to zero.
        adamw: None for SGD.
    """

    parameters: Tensor
    gradients: Tensor
    first: Tensor | None
    second: Tensor | None
    anchor: Tensor | None
    correction: Tensor | None
    gradient_sum: Tensor | None
    lr: float | Sequence[float] | Tensor
    momentum: float
    weight_decay: float
    proximal: float
    max_norm: float | None
    zero: bool
    adamw: AdamW | None

    def replaced(self, tensors: Mapping[str, Tensor]) -> Call:
        """The same call with other tensors."""
        return Call(**{**self._asdict(), **tensors})

    def written(self) -> dict[str, Tensor]:
        """The tensors that the step writes to, by name."""
        named = {name: getattr(self, name) for name in ("parameters", "first", "second", "gradient_sum")}
        if self.zero:
            named["gradients"] = self.gradients
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of ``[M, P]``, by name."""
        names = ("parameters", "gradients", "first", "second", "anchor", "correction", "gradient_sum")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class OptimiseKernel(Protocol):
    """A backend's kernel of :func:`fedkern.ops.sgd_step` and :func:`fedkern.ops.adamw_step`."""

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        """Takes the step; returns which rows stayed finite (bool ``[M]``) and their squared norms (fp64 ``[M]``)."""
        ...
