"""optimise: the call that a backend's kernel receives, and the launcher of the compiled cores."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fedkern.ops._core.launch import Launcher
from fedkern.ops._core.memory import place_values
from fedkern.ops._optimise.checks import check_like

_empty, _empty_like = torch.empty, torch.empty_like


class AdamW(NamedTuple):
    beta1: float
    beta2: float
    bias: float  # 1 - beta1^t
    root: float  # sqrt(1 - beta2^t)
    eps: float


class Call(NamedTuple):
    """Checked step of M optimisers, whose fields csrc/bindings/optimise_call.h reads in this order.

    Tensors are ``[M, P]`` with unit stride along P and without overlap where they are written to. For the compiled
    cores they may also be ``[P]`` with M = 1, and ``anchor`` and ``correction`` one ``[P]`` for all rows.

    Attributes:
        first, second: SGD's velocity (``first``), or AdamW's moments; updated.
        gradient_sum: the raw gradients are added to this tensor.
        lr: one learning rate, or one per row: a list, or on a GPU fp64 ``[M]``.
        max_norm: largest norm of each row's gradient; None: no clipping.
        zero: whether to set ``gradients`` to zero.
        adamw: None for SGD.
    """

    parameters: Tensor
    gradients: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    anchor: Tensor | None = None
    correction: Tensor | None = None
    gradient_sum: Tensor | None = None
    lr: float | Sequence[float] | Tensor = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    max_norm: float | None = None
    zero: bool = False
    adamw: AdamW | None = None

    def outputs(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("parameters", "first", "second", "gradient_sum")}
        if self.zero:
            named["gradients"] = self.gradients
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def tensors(self) -> dict[str, Tensor]:
        names = ("parameters", "gradients", "first", "second", "anchor", "correction", "gradient_sum")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class OptimiseKernels(Launcher):
    def __init__(self, core: ModuleType) -> None:
        super().__init__(core)
        # For empty_like, which takes two thirds of the time of empty(()).
        self._finite, self._squared = (_empty((), dtype=kind, device="cpu") for kind in (torch.bool, torch.float64))

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        """Take the step, and return finite rows (bool) and squared norms (fp64), 0-d for vectors ``[P]``."""
        parameters, lr = call.parameters, call.lr
        if parameters.dim() == 1 and not self.gpu:
            finite, squared = _empty_like(self._finite), _empty_like(self._squared)
        else:
            shape, device = parameters.shape, parameters.device
            if call.gradients.dim() != len(shape):  # one [P] passes for [1, P] in the core's check
                check_like(call.gradients, "gradients", parameters)
            rows = shape[0] if len(shape) == 2 else ()
            finite = _empty(rows, dtype=torch.bool, device=device)
            squared = _empty(rows, dtype=torch.float64, device=device)
        rates = workspace = None
        if type(lr) is not float:
            if isinstance(lr, Tensor):
                rates = lr.contiguous()
            elif self.gpu and isinstance(lr, Sequence):
                rates = place_values(lr, parameters.device)
        if self.gpu:
            rows = squared.numel()
            workspace = squared.new_empty(2 * rows * self.core.optimise_blocks(rows, parameters.shape[-1]))
        self.core.optimise_step(call, rates, finite, squared, workspace, self.at(parameters))
        return finite, squared
