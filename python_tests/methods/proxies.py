"""A proxy whose logits are its parameters, beside teachers' logits, for tests of distillation losses."""

import numpy as np
import torch

from fedkern.methods.protocol import Batch, Phase

PHASE = Phase(0, "train", "update")


class Fixed(torch.nn.Module):
    """A proxy with given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self, images):
        return self.logits


def scene(teachers=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    proxy = Fixed(2 * torch.randn(7, 5, generator=g, dtype=torch.float64))
    teacher = 3 * torch.randn(teachers, 7, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 5, (7,), generator=g)
    return proxy, teacher, Batch(torch.zeros(7, 1, 8, 8), labels, np.arange(7), PHASE)
