"""FlatParameters: a module's parameters and buffers as views into one buffer per dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatParameters:
    """Flattens ``module``: ``parameters`` [P] and ``buffers`` [Q] are flat vectors that the module's tensors view."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        with torch.no_grad():
            self.parameters = self._flatten(list(module.parameters()))
            self.buffers = self._flatten([b for b in module.buffers() if b.is_floating_point()])

    @staticmethod
    def _flatten(tensors: list[Tensor]) -> Tensor:
        flat = torch.empty(sum(t.numel() for t in tensors))
        offset = 0
        for t in tensors:
            view = torch.as_strided(flat, t.shape, t.stride(), offset)
            view.copy_(t)
            t.data = view
            offset += t.numel()
        return flat
