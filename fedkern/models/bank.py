"""Frozen networks asked together: their logits, with gradients for the images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedkern.models.staged import StagedNetwork
from fedkern.ops import FusedBlocks

FUSE_BYTES = 256 << 20
"""Networks beyond this size together run one after another: a copy of them would cost more than it gains."""


class Bank:
    """K frozen networks over the same images, of any architectures; logits ``[K, B, C, *positions]``.

    Batch norms are folded into the convolutions before them.  Networks of one architecture run as one
    (:class:`fedkern.ops.FusedBlocks`) as far as their layers allow, others one after another.

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


class Separate:
    """Networks of one architecture, one after another."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._networks = list(networks)

    def logits(self, images: Tensor) -> Tensor:
        """``[M, B, C, *positions]``."""
        return torch.stack([network(images) for network in self._networks])


class Fused:
    """Staged networks of one architecture: the stages as one module, the heads as one product.

    Raises:
        TypeError, ValueError: no stage with parameters fits :class:`fedkern.ops.FusedBlocks`.
    """

    def __init__(self, networks: Sequence[StagedNetwork]) -> None:
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
        maps = self.body(images)
        if self._rest is not None:
            maps = self._rest(maps.unflatten(1, (self._count, -1)).flatten(0, 1)).unflatten(0, (-1, self._count))
            maps = maps.flatten(1, 2)
        features = maps.mean(dim=(2, 3)).unflatten(1, (self._count, -1))
        return torch.baddbmm(self._bias, features.transpose(0, 1), self._weight)


def _units(network: StagedNetwork) -> Iterator[nn.Module]:
    """The modules that one after another make a network's last map."""
    for name in network.stage_names[:-1]:
        stage = getattr(network, name)
        yield from stage if isinstance(stage, nn.Sequential) else (stage,)


def group(networks: list[nn.Module]) -> Fused | Separate:
    """Networks of one architecture together, in the form that computes them fastest."""
    first = networks[0]
    size = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    if len(networks) == 1 or size > FUSE_BYTES or type(first).forward is not StagedNetwork.forward:
        return Separate(networks)
    if type(first)._run is not StagedNetwork._run:  # type: ignore[attr-defined]
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
    return made.requires_grad_(False)
