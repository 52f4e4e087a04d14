"""optimise: from tensors to the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._optimise.kernels import Call

# Templates for empty_like, which takes two thirds of the time of empty(()).
_TEMPLATES: list[Tensor] = []
_empty_like = torch.empty_like


def results(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the results (finite, squared norm) of parameters ``[P]`` or ``[M, P]``."""
    if parameters.dim() == 1:
        if not _TEMPLATES:
            _TEMPLATES[:] = [torch.empty((), dtype=kind, device="cpu") for kind in (torch.bool, torch.float64)]
        return _empty_like(_TEMPLATES[0]), _empty_like(_TEMPLATES[1])
    rows = parameters.shape[0]
    return (
        torch.empty(rows, dtype=torch.bool, device=parameters.device),
        torch.empty(rows, dtype=torch.float64, device=parameters.device),
    )


class CpuOptimise:
    """:class:`~fedkern.ops._optimise.kernels.OptimiseKernel` on ``fedkern._cpu``."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core

    def direct(
        self, rule: int, tensors: Sequence[Any], lr: Any, numbers: tuple[Any, ...], max_norm: Any, zero: bool
    ) -> tuple[Tensor, Tensor] | None:
        """A step on unchecked arguments; None, with nothing written, if they are wrong or must be prepared first.

        The core makes all checks: in Python they take longer than the step of a small network.
        """
        parameters = tensors[0]
        axes = parameters.dim()
        if axes != 1 and (axes != 2 or parameters.is_nested):
            return None
        finite, squared = results(parameters)
        done = self.core.optimise_step(
            rule, (*tensors, finite, squared), lr, numbers, max_norm, zero, torch.is_grad_enabled(), False,
            torch.get_num_threads(),
        )  # fmt: skip
        return (finite, squared) if done else None

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        finite, squared = results(call.parameters)
        numbers: tuple[float, ...] = (call.momentum, call.weight_decay, call.proximal)
        lr = call.lr.tolist() if isinstance(call.lr, Tensor) else call.lr
        tensors = (
            call.parameters, call.gradients, call.first, call.second, call.anchor, call.correction, call.gradient_sum,
            finite, squared,
        )  # fmt: skip
        done = self.core.optimise_step(
            int(call.adamw is not None), tensors, lr, (*numbers, *(call.adamw or ())), call.max_norm, call.zero, False,
            True, torch.get_num_threads(),
        )  # fmt: skip
        assert done, "a checked step is one that the core takes"
        return finite, squared
