"""Baselines from packages that may be missing, and placeholders for those that cannot run."""

import copy
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class Absent:
    """Baseline that cannot run on this machine, with the reason for the table."""

    reason: str


Implementation = Callable[[], Any] | Absent


def fold_norms(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose batch norms are in the convolutions registered right before them."""
    made = copy.deepcopy(module).eval()
    for owner in list(made.modules()):
        names = list(owner.named_children())
        for (name, conv), (behind, norm) in itertools.pairwise(names):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(owner, name, fuse_conv_bn_eval(conv, norm))
                setattr(owner, behind, nn.Identity())
    return made


def _load(module: str, package: str, tensor: Tensor) -> Any | Absent:
    if tensor.device.type != "cuda":
        return Absent(f"{package} needs a GPU")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Absent(f"{package} cannot be imported: {error}")


def liger_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Implementation:
    """Run Liger-Kernel's KL divergence forward and backward, which takes log-probabilities and probabilities."""
    liger = _load("liger_kernel.transformers.kl_div", "Liger-Kernel", student)
    if isinstance(liger, Absent):
        return liger
    loss = liger.LigerKLDIVLoss(reduction="batchmean")

    def step() -> None:
        student.grad = None
        value = loss(log_softmax(student / temperature, 1), softmax(teacher / temperature, 1))
        (value * temperature**2).backward()

    return step


def liger_jsd(logits: Tensor) -> Implementation:
    """Run Liger-Kernel's Jensen-Shannon divergence forward and backward: two teachers ``[2, B, C]`` of equal weight."""
    liger = _load("liger_kernel.transformers.jsd", "Liger-Kernel", logits)
    if isinstance(liger, Absent):
        return liger
    if logits.dim() != 3 or logits.shape[0] != 2:
        return Absent("Liger-Kernel compares two distributions [B, C]")
    loss = liger.LigerJSD(beta=0.5)

    def step() -> None:
        logits.grad = None
        log_p = log_softmax(logits, 2)
        loss(log_p[0], log_p[1]).backward()

    return step
