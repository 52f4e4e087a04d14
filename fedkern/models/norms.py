"""Batch norm with fixed statistics (FixBN)."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_bn_after(module: nn.Module) -> None:
    """Puts a module's batch norms in eval mode: they use their running statistics without updating them (FixBN).

    Scale and shift are still trained.  ``module.train()`` undoes this.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
