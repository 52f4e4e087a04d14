"""optimise on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkern.ops._core.backend import DTYPES, address
from fedkern.ops._core.cuda import queue
from fedkern.ops._core.memory import placed
from fedkern.ops._optimise.kernels import Call


class CudaOptimise:
    """:class:`fedkern.ops._optimise.kernels.OptimiseKernel` on ``fedkern._cuda``."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def step(self, call: Call) -> tuple[Tensor, Tensor]:
        parameters = call.parameters
        rows, size = parameters.shape
        squared = torch.empty(rows, dtype=torch.float64, device=parameters.device)
        finite = torch.empty(rows, dtype=torch.bool, device=parameters.device)
        workspace = squared.new_empty(2 * rows * self.core.optimise_blocks(rows, size))
        given = (
            parameters, call.gradients, call.first, call.second, call.anchor, call.correction, call.gradient_sum,
        )  # fmt: skip
        lr, each = call.lr, None
        if not isinstance(lr, float):
            each = lr.contiguous() if isinstance(lr, Tensor) else placed(lr, parameters.device)
            lr = 0.0
        numbers = [lr, call.momentum, call.weight_decay, call.proximal, call.max_norm or 0.0, *(call.adamw or ())]
        self.core.optimise_step(
            DTYPES[parameters.dtype],
            rows,
            size,
            [(address(x), 0 if x is None else x.stride(0)) for x in given],
            numbers,
            address(each),
            call.zero,
            [workspace.data_ptr(), squared.data_ptr(), finite.data_ptr()],
            *queue(parameters),
        )
        return finite, squared
