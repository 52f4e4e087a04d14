"""Logits of several frozen teachers at once, with gradients for the images."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedkern.models.networks.staged import StagedNetwork
from fedkern.models.networks.unet import UNet
from fedkern.models.precision import cast_trunk, reduced_dtype

CHUNK = 64
"""Images per pass on the CPU when no gradient is kept, so that their feature maps stay in the CPU's cache."""


class TeacherStack:
    """K frozen networks of any architectures on the same images, with logits ``[K, B, C, *positions]``.

    Copies have batch norms folded into the convolutions before them, and ReLUs and sums in place.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._teachers = [_Teacher(fold_norms(network)) for network in networks]

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
            network = cast_trunk(_headless(network), self._dtype)
        self._network = overwriting(network)

    def logits(self, images: Tensor) -> Tensor:
        images = images if self._dtype is None else images.to(self._dtype)
        at_once = len(images) <= CHUNK or not images.is_cpu or (torch.is_grad_enabled() and images.requires_grad)
        parts = (images,) if at_once else images.split(CHUNK)
        answers = [self._network(part) for part in parts]
        logits: Tensor = self._head(answers[0] if at_once else torch.cat(answers))
        return logits


def _headless(network: nn.Module) -> nn.Module:
    body = copy.copy(network)
    body._modules = {**network._modules, "head": nn.Identity()}
    return body


@torch.no_grad()
def fold_norms(network: nn.Module) -> nn.Module:
    """Return a frozen copy in eval mode, with batch norms folded into the convolutions before them if that is safe.

    A batch norm must be the only reader of a convolution's result, and both be called once.  A network that torch.fx
    cannot trace is copied unfolded.
    """
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
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


def overwriting(network: nn.Module) -> nn.Module:
    """Return the same frozen network with in-place ReLUs and sums where nothing else reads their input.

    A new map costs page faults and evicts the CPU's cache.  Gradients stay right: the backward pass of a convolution
    does not need its result, and that of a ReLU needs only its own.
    """
    try:
        graph = fx.symbolic_trace(network)
    except Exception:  # a network's own code may raise anything on a proxy
        return network
    modules = dict(graph.named_modules())

    def fresh(value: object) -> bool:
        """Return whether one node alone reads the result of a convolution or an in-place sum."""
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            return False
        if value.op == "call_module":
            layer = modules[str(value.target)]
            # An Identity (a batch norm folded by `fold_norms`) passes its input on: nothing else may read that input.
            return type(layer) is nn.Conv2d or (type(layer) is nn.Identity and fresh(value.args[0]))
        return value.op == "call_method" and value.target == "add_"

    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in (operator.add, torch.add) and not node.kwargs:
            a, b = node.args
            if fresh(b) and not fresh(a):
                a, b = b, a
            if fresh(a) and isinstance(b, fx.Node) and a is not b:
                node.op, node.target, node.args = "call_method", "add_", (a, b)
    for node in graph.graph.nodes:
        relu = node.op == "call_function" and node.target in (F.relu, torch.relu)
        if node.op == "call_module" and type(modules[str(node.target)]) is nn.ReLU:
            relu = True
        if relu and fresh(node.args[0]):
            node.op, node.target, node.args, node.kwargs = "call_method", "relu_", (node.args[0],), {}
    graph.graph.lint()
    graph.recompile()
    return graph
