"""Frozen networks asked together: their logits, with gradients for the images."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedkern.models.precision import lower, trunk
from fedkern.models.staged import StagedNetwork
from fedkern.models.unet import UNet
from fedkern.ops import FusedBlocks

VECTOR = 16
"""Channels that a vector of the widest instructions holds in fp32."""

CHUNK = 64
"""Images that go through the networks at a time on the CPU where no gradient is kept: their maps stay in the cache."""

FUSE_BYTES = 256 << 20
"""Networks beyond this size together run one after another: a copy of them would cost more than it gains."""


class TeacherStack:
    """K frozen networks over the same images, of any architectures; logits ``[K, B, C, *positions]``.

    Batch norms are folded into the convolutions before them, and ReLUs and sums written in place.  Networks of one
    architecture run as one (:class:`fedkern.ops.FusedBlocks`) where that is faster, others one after another.

    Args:
        networks: in eval mode on one device; they are copied and not changed.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        groups: dict[Any, list[int]] = {}
        for k, network in enumerate(networks):
            shapes = tuple((name, tuple(value.shape)) for name, value in network.state_dict().items())
            groups.setdefault((type(network), shapes), []).append(k)
        self.count = len(networks)
        self._groups = [(members, group([folded(networks[k]) for k in members])) for members in groups.values()]

    def __len__(self) -> int:
        return self.count

    def logits(self, images: Tensor) -> Tensor:
        """``[K, B, C, *positions]`` of normalised images ``[B, C, H, W]``; gradients reach the images."""
        if len(self._groups) == 1:
            return self._groups[0][1].logits(images)
        rows: list[Any] = [None] * self.count
        for members, networks in self._groups:
            for k, row in zip(members, networks.logits(images), strict=True):
                rows[k] = row
        return torch.stack(rows)


def pieces(images: Tensor) -> Sequence[Tensor]:
    """The images in the portions in which networks see them (:data:`CHUNK`)."""
    whole = len(images) <= CHUNK or not images.is_cpu or (torch.is_grad_enabled() and images.requires_grad)
    return (images,) if whole else images.split(CHUNK)


class Separate:
    """Networks of one architecture, one after another."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._dtype = lower()
        self._heads: list[nn.Module] = []
        if type(networks[0]).forward not in (StagedNetwork.forward, UNet.forward):
            self._dtype = None  # nobody knows what a network of another kind makes of its features
        if self._dtype is not None:
            self._heads = [network.head for network in networks]  # type: ignore[misc]
            networks = [trunk(_headless(network), self._dtype) for network in networks]
        self._networks = [overwriting(network) for network in networks]

    def logits(self, images: Tensor) -> Tensor:
        """``[M, B, C, *positions]``."""
        parts = pieces(images if self._dtype is None else images.to(self._dtype))
        rows = [
            network(parts[0]) if len(parts) == 1 else torch.cat([network(part) for part in parts])
            for network in self._networks
        ]
        if self._dtype is not None:
            rows = [head(features) for head, features in zip(self._heads, rows, strict=True)]
        return torch.stack(rows)


def _headless(network: nn.Module) -> nn.Module:
    """A copy that answers with the features."""
    made = copy.copy(network)
    made._modules = {**network._modules, "head": nn.Identity()}
    return made


class Fused:
    """Staged networks of one architecture: the stages as one module, the heads as one product.

    Raises:
        TypeError, ValueError: no stage with parameters fits :class:`fedkern.ops.FusedBlocks`.
    """

    def __init__(self, networks: Sequence[StagedNetwork]) -> None:
        self._dtype = lower()
        if self._dtype is not None:
            for network in networks:
                trunk(nn.ModuleList(_units(network)), self._dtype)
        units = [list(_units(network)) for network in networks]
        self._count = len(networks)
        self._rest: nn.Module | None = None
        try:
            self.body = FusedBlocks([nn.Sequential(*own) for own in units])
        except TypeError:
            # A layer without parameters at the end (a pooling of a network's own) is the same for all.
            last = len(units[0])
            while not any(True for _ in units[0][last - 1].parameters()):
                last -= 1
            self._rest = nn.Sequential(*units[0][last:])
            self.body = FusedBlocks([nn.Sequential(*own[:last]) for own in units])
        self._weight = torch.stack([n.head.weight.detach().T for n in networks])
        self._bias = torch.stack([n.head.bias.detach() for n in networks])[:, None]

    def logits(self, images: Tensor) -> Tensor:
        """``[M, B, C]``."""
        parts = pieces(images)
        return self._logits(images) if len(parts) == 1 else torch.cat([self._logits(part) for part in parts], 1)

    def _logits(self, images: Tensor) -> Tensor:
        maps = self.body(images if self._dtype is None else images.to(self._dtype))
        if self._rest is not None:
            maps = self._rest(maps.unflatten(1, (self._count, -1)).flatten(0, 1)).unflatten(0, (-1, self._count))
            maps = maps.flatten(1, 2)
        features = maps.mean(dim=(2, 3), dtype=images.dtype).unflatten(1, (self._count, -1))
        return torch.baddbmm(self._bias, features.transpose(0, 1), self._weight)


def _units(network: StagedNetwork) -> Iterator[nn.Module]:
    """The modules that one after another make a network's last map."""
    for name in network.stage_names[:-1]:
        stage = getattr(network, name)
        yield from stage if isinstance(stage, nn.Sequential) else (stage,)


def group(networks: list[nn.Module]) -> Fused | Separate:
    """Networks of one architecture together, in the form that computes them fastest.

    On the CPU that is one after another where convolutions fill the vectors they are computed in: every map is then
    still in the cache when the next layer reads it.
    """
    first = networks[0]
    size = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    narrow = any(isinstance(layer, nn.Conv2d) and layer.out_channels < VECTOR for layer in first.modules())
    one_by_one = len(networks) == 1 or size > FUSE_BYTES or (next(first.parameters()).is_cpu and not narrow)
    if one_by_one or type(first).forward is not StagedNetwork.forward:
        return Separate(networks)
    try:
        return Fused(networks)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Separate(networks)  # a layer that FusedBlocks does not know


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """A frozen copy in eval mode whose batch norms are folded into the convolutions before them where that is sure.

    A batch norm is folded where torch.fx sees it read a convolution's result that nothing else reads, and both are
    called once.  Networks that torch.fx cannot trace are copied as they are.
    """
    made = copy.deepcopy(network).eval().requires_grad_(False)
    try:
        nodes = list(fx.symbolic_trace(made).graph.nodes)
    except Exception:  # whatever a network's own code raises when its input is a proxy
        return made
    modules = dict(made.named_modules())
    called = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        convolution, norm = modules[str(before.target)], modules[node.target]
        alone = called.count(node.target) == 1 and called.count(before.target) == 1
        if alone and type(convolution) is nn.Conv2d and norm.running_mean is not None:
            made.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            made.set_submodule(node.target, nn.Identity())
    return made.eval().requires_grad_(False)


def overwriting(network: nn.Module) -> nn.Module:
    """The same frozen network with its ReLUs and sums written over what they read, where nothing else reads that.

    A fresh map costs the system's pages and the cache its content.  Gradients for the input stay right: a convolution
    does not keep its result, and a ReLU keeps its own.  Networks that torch.fx cannot trace come back as they are.
    """
    try:
        graph = fx.symbolic_trace(network)
    except Exception:  # whatever a network's own code raises when its input is a proxy
        return network
    modules = dict(graph.named_modules())

    def fresh(value: Any) -> bool:
        """Whether a value is a convolution's or a sum's result that one node reads."""
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            return False
        if value.op == "call_module":
            layer = modules[str(value.target)]
            # What was a batch norm hands on the map it is given, which nobody else may then read.
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
