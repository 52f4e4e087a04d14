"""Contestants from packages that may not be here, and what cannot run here in their place."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class Absent:
    """A contestant that cannot run here: the table names it with the reason."""

    reason: str


Contestant = Callable[[], Any] | Absent


def folded(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are in the convolutions registered right before them."""
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


def liger_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Contestant:
    """Forward and backward of Liger-Kernel's KL divergence, which takes log-probabilities and probabilities."""
    liger = _load("liger_kernel.transformers.kl_div", "Liger-Kernel", student)
    if isinstance(liger, Absent):
        return liger
    loss = liger.LigerKLDIVLoss(reduction="batchmean")

    def step() -> None:
        student.grad = None
        value = loss(log_softmax(student / temperature, 1), softmax(teacher / temperature, 1))
        (value * temperature**2).backward()

    return step


def liger_jsd(logits: Tensor) -> Contestant:
    """Forward and backward of Liger-Kernel's Jensen-Shannon divergence: two teachers ``[2, B, C]`` of equal weight."""
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


def apex_mean(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor, layers: int = 62) -> Contestant:
    """A weighted mean by apex's multi_tensor_axpby, client after client, into ``out``."""
    apex = _load("amp_C", "apex", out)
    if isinstance(apex, Absent):
        return apex
    total = sum(weights)
    target = list(out.chunk(layers))
    clients = [list(vector.chunk(layers)) for vector in vectors]
    overflow = torch.zeros(1, dtype=torch.int32, device=out.device)

    def run() -> Tensor:
        out.zero_()
        for client, weight in zip(clients, weights, strict=True):
            # out = 1 * out + share * client; nothing is checked for overflow (-1)
            apex.multi_tensor_axpby(65536, overflow, [target, client, target], 1.0, weight / total, -1)
        return out

    return run


def apex_adam(
    parameters: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Contestant:
    """One Adam update of flat vectors by apex's fused kernel, without bias correction and weight decay."""
    apex = _load("amp_C", "apex", parameters)
    if isinstance(apex, Absent):
        return apex
    overflow = torch.zeros(1, dtype=torch.int32, device=parameters.device)
    lists = [[gradient], [parameters], [first], [second]]
    return lambda: apex.multi_tensor_adam(65536, overflow, lists, lr, *betas, eps, 1, 0, 0, 0.0)
