"""Stack of frozen teachers: the logits of all of them at once, with gradients for the images."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
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
"""fp32 channels in a vector register of the widest instructions (AVX-512)."""

CHUNK = 64
"""Images per pass on the CPU when no gradient is kept, so that their feature maps stay in the CPU's cache."""

FUSE_BYTES = 256 << 20
"""Largest total size of networks that run fused; the fused copy of larger ones would cost more than it gains."""


class TeacherStack:
    """K frozen networks of any architectures on the same images; logits ``[K, B, C, *positions]``.

    Batch norms are folded into the convolutions before them, and ReLUs and sums run in place.  Networks of one
    architecture run fused (:class:`fedkern.ops.FusedBlocks`) where that is faster, all others one after another.

    Args:
        networks: networks in eval mode on one device; they are copied and not changed.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        groups: dict[Any, list[int]] = {}
        for k, network in enumerate(networks):
            shapes = tuple((name, tuple(value.shape)) for name, value in network.state_dict().items())
            groups.setdefault((type(network), shapes), []).append(k)
        self._groups = [(members, group([folded(networks[k]) for k in members])) for members in groups.values()]

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[K, B, C, *positions]`` of normalised images ``[B, C, H, W]``; gradients reach the images."""
        if len(self._groups) == 1:
            return self._groups[0][1].logits(images)
        rows: dict[int, Tensor] = {}
        for members, networks in self._groups:
            rows.update(zip(members, networks.logits(images), strict=True))
        return torch.stack([rows[k] for k in range(len(rows))])


def in_chunks(answer: Callable[[Tensor], Tensor], images: Tensor, dim: int) -> Tensor:
    """``answer(images)``, from :data:`CHUNK` images at a time where that is faster; joined along ``dim``."""
    at_once = len(images) <= CHUNK or not images.is_cpu or (torch.is_grad_enabled() and images.requires_grad)
    return answer(images) if at_once else torch.cat([answer(part) for part in images.split(CHUNK)], dim)


class Separate:
    """Networks of one architecture that run one after another."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._dtype = lower()
        self._heads: list[nn.Module] = []
        if type(networks[0]).forward not in (StagedNetwork.forward, UNet.forward):
            self._dtype = None  # another forward may do more than head(features)
        if self._dtype is not None:
            self._heads = [network.head for network in networks]  # type: ignore[misc]
            networks = [trunk(_headless(network), self._dtype) for network in networks]
        self._networks = [overwriting(network) for network in networks]

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[M, B, C, *positions]``."""
        images = images if self._dtype is None else images.to(self._dtype)
        rows = [in_chunks(network, images, 0) for network in self._networks]
        if self._dtype is not None:
            rows = [head(features) for head, features in zip(self._heads, rows, strict=True)]
        return torch.stack(rows)


def _headless(network: nn.Module) -> nn.Module:
    """A copy that gives the features instead of the logits."""
    body = copy.copy(network)
    body._modules = {**network._modules, "head": nn.Identity()}
    return body


class Fused:
    """Staged networks of one architecture: the stages run as one module, the heads as one batched matrix product.

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
            self.body = FusedBlocks([nn.Sequential(*layers) for layers in units])
        except TypeError:
            # Last layers without parameters (a network's own pooling) are the same for all networks.
            last = len(units[0])
            while not any(True for _ in units[0][last - 1].parameters()):
                last -= 1
            self._rest = nn.Sequential(*units[0][last:])
            self.body = FusedBlocks([nn.Sequential(*layers[:last]) for layers in units])
        self._weight = torch.stack([n.head.weight.detach().T for n in networks])
        self._bias = torch.stack([n.head.bias.detach() for n in networks])[:, None]

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[M, B, C]``."""
        return in_chunks(self._logits, images, 1)

    def _logits(self, images: Tensor) -> Tensor:
        maps = self.body(images if self._dtype is None else images.to(self._dtype))
        if self._rest is not None:
            maps = self._rest(maps.unflatten(1, (self._count, -1)).flatten(0, 1)).unflatten(0, (-1, self._count))
            maps = maps.flatten(1, 2)
        features = maps.mean(dim=(2, 3), dtype=images.dtype).unflatten(1, (self._count, -1))
        return torch.baddbmm(self._bias, features.transpose(0, 1), self._weight)


def _units(network: StagedNetwork) -> Iterator[nn.Module]:
    """The modules that compute a network's last feature map, in order."""
    for name in network.stage_names[:-1]:
        stage = getattr(network, name)
        yield from stage if isinstance(stage, nn.Sequential) else (stage,)


def group(networks: list[nn.Module]) -> Fused | Separate:
    """Chooses the faster form for networks of one architecture: fused, or one after another.

    On the CPU, running one after another is faster if every convolution has at least :data:`VECTOR` output channels:
    a map is then still in the CPU's cache when the next layer reads it.
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
    """A frozen copy in eval mode, with batch norms folded into the convolutions before them where that is safe.

    A batch norm is folded if torch.fx sees that it alone reads a convolution's result and that both are called once.
    A network that torch.fx cannot trace is copied unfolded.
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
        alone = called.count(node.target) == 1 and called.count(before.target) == 1
        if alone and type(convolution) is nn.Conv2d and norm.running_mean is not None:
            frozen.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            frozen.set_submodule(node.target, nn.Identity())
    return frozen.eval().requires_grad_(False)


def overwriting(network: nn.Module) -> nn.Module:
    """The same frozen network with in-place ReLUs and sums, wherever nothing else reads their input.

    A new map costs page faults and evicts the CPU's cache.  Gradients for the input stay right: the backward pass of a
    convolution does not need its result, and that of a ReLU needs only its own.  A network that torch.fx cannot trace
    is returned unchanged.
    """
    try:
        graph = fx.symbolic_trace(network)
    except Exception:  # a network's own code may raise anything on a proxy
        return network
    modules = dict(graph.named_modules())

    def fresh(value: Any) -> bool:
        """Whether a value is the result of a convolution or of an in-place sum, and only one node reads it."""
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            return False
        if value.op == "call_module":
            layer = modules[str(value.target)]
            # An Identity (a folded batch norm) passes its input on, so nothing else may read that input.
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
