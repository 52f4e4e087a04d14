"""Logits of several frozen teachers at once, with gradients for the images."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedkern.models.networks.cnn import CNN
from fedkern.models.networks.resnet import ResNet, ResNet8T
from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.networks.unet import UNet
from fedkern.models.precision import cast_trunk, reduced_dtype
from fedkern.ops._core.backend import active_isa, forced_backend

CHUNK = 2**16
"""Pixels per pass on the CPU when no gradient is kept, so that the feature maps stay in the CPU's cache."""


class TeacherStack:
    """K frozen networks of any architectures on the same images, with logits ``[K, B, C, *positions]``.

    Copies have batch norms folded into the convolutions before them, unless :func:`fedkern.ops.conv_norm` computes
    both, which takes less time.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._teachers = [
            _Teacher(freeze(network) if _suits_conv_norm(network) else fold_norms(network)) for network in networks
        ]

    def logits(self, images: Tensor) -> Tensor:
        return torch.stack([teacher.logits(images) for teacher in self._teachers])


class _Teacher:
    def __init__(self, network: nn.Module) -> None:
        # Any other forward may do more than head(features), so its network stays in fp32.
        splits = type(network).forward in (StagedNetwork.forward, UNet.forward)
        self._dtype = reduced_dtype() if splits else None
        self._head: Any = nn.Identity()
        if self._dtype is not None:
            self._head = network.head
            headless = copy.copy(network)
            headless._modules = {**network._modules, "head": nn.Identity()}
            network = cast_trunk(headless, self._dtype)
        self._network = network

    def logits(self, images: Tensor) -> Tensor:
        images = images if self._dtype is None else images.to(self._dtype)
        chunk = max(1, CHUNK // images.shape[2:].numel())
        at_once = len(images) <= chunk or not images.is_cpu or (torch.is_grad_enabled() and images.requires_grad)
        parts = (images,) if at_once else images.split(chunk)
        answers = [self._network(part) for part in parts]
        logits: Tensor = self._head(answers[0] if at_once else torch.cat(answers))
        return logits


def _suits_conv_norm(network: nn.Module) -> bool:
    if type(network) not in (CNN, ResNet, ResNet8T, UNet) or forced_backend() not in (None, "cpu"):
        return False
    weight = next(network.parameters())
    fp32 = weight.dtype is torch.float32 and reduced_dtype() is None
    # With AVX2 a ResNet of 8 channels takes 1.2 times as long by conv_norm.
    gains = ("avx512",) if isinstance(network, (ResNet, ResNet8T)) and len(weight) < 16 else ("avx2", "avx512")
    return weight.is_cpu and fp32 and active_isa() in gains


def freeze(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def fold_norms(network: nn.Module) -> nn.Module:
    """Return a frozen copy in eval mode, with batch norms folded into the convolutions before them if that is safe.

    A batch norm must be the only reader of a convolution's result, and both be called once.  A network that torch.fx
    cannot trace is copied unfolded.
    """
    frozen = freeze(network)
    try:
        nodes = list(fx.symbolic_trace(frozen).graph.nodes)
    except Exception:  # a network's own code may raise anything on a proxy
        return frozen
    modules = dict(frozen.named_modules())
    called = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        convolution, norm = modules[str(before.target)], modules[node.target]
        is_single = called.count(node.target) == 1 and called.count(before.target) == 1
        if is_single and type(convolution) is nn.Conv2d and norm.running_mean is not None:
            frozen.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            frozen.set_submodule(node.target, nn.Identity())
    return frozen.eval().requires_grad_(False)
