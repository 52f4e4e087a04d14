"""Batch norm with statistics that are given."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def fix_statistics(module: nn.Module) -> None:
    """Puts a module's batch norms in eval mode: they normalise by their running statistics and leave them (FixBN).

    Scale and shift go on learning.  ``module.train()`` undoes it.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
