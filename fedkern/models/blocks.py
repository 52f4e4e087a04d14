"""Division of networks into blocks that are fused one after another in FuseFL (arXiv 2410.20380)."""

import copy
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, fx, nn

from fedkern.errors import UserError
from fedkern.models.networks.conv_norm_layers import ConvSequential
from fedkern.models.networks.resnet import ResNet
from fedkern.models.networks.staged import Classifier, StagedNetwork
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.users.user_models import OwnNetwork
from fedkern.ops._core.layout import plain_strides

CUTS: dict[tuple[type[nn.Module], int], dict[int, tuple[int, ...]]] = {
    (ResNet, 9): {2: (4,), 3: (0, 4), 4: (0, 4, 6), 8: (0, 1, 2, 3, 5, 7, 8)},  # ResNet-18
    (ResNet, 5): {2: (2,), 3: (0, 2), 4: (0, 2, 3)},  # ResNet-10, at the same stages for fusion with ResNet-18
}
"""Layers behind which published networks are cut, by class and number of layers, then by number of blocks.

See docs/methods/fusefl.md, section 4.  All other networks are cut into parts of (nearly) equally many layers.
"""


class OwnBlock(nn.Sequential):
    """Block of a user-defined network, with the input strides of the network."""

    own = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x if isinstance(x, fx.Proxy) else plain_strides(x))
        return y


class BlockNetwork(Classifier):
    """Blocks one after another, and a linear classifier on the last block's features ``[B, d]``.

    The first block takes images, the others a map ``[B, C, H, W]``, tokens ``[B, N, C]`` or features ``[B, d]``.
    """

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks must hold at least one module, not none")
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    @autocasts
    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return to_fp32(x)

    @torch.no_grad()
    def interfaces(self, image_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the shape of every block's result for one image of ``image_shape`` (C, H, W).

        The CPU runs zero images: the meta device would import torch's compiler, which takes a second.
        """
        x = torch.zeros(2, *image_shape)
        shapes: list[tuple[int, ...]] = []
        for i, block in enumerate(self.blocks, start=1):
            source = f"what block {i - 1} gives" if i > 1 else "the images"
            try:
                y = copy.deepcopy(block).cpu().eval()(x)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                reason = str(error).strip().split("\n")[0].rstrip(".")
                hint = _explain(block, tuple(x.shape[1:])) or f": {reason}"
                raise UserError(f"Block {i} cannot take {source}, of shape {list(x.shape[1:])}{hint}.") from None
            if not isinstance(y, Tensor) or y.dim() not in (2, 3, 4):
                raise UserError(f"Block {i} must give features [B, d], tokens [B, N, C] or a map [B, C, H, W].")
            shapes.append(tuple(y.shape[1:]))
            x = y
        if shapes[-1] != (self.head.in_features,):
            raise UserError(
                f"The last block gives {list(shapes[-1])}, but the classifier takes features [{self.head.in_features}]."
            )
        return shapes


def _explain(block: nn.Module, shape: tuple[int, ...]) -> str:
    """Return the reason for an error by a wrong number of channels, else ""."""
    layer = next(module for module in block.modules() if not any(True for _ in module.children()))
    if isinstance(layer, nn.Conv2d) and len(shape) == 3 and layer.in_channels != shape[0]:
        return f", as its first layer takes {layer.in_channels} channels"
    if isinstance(layer, nn.Linear) and layer.in_features != shape[-1]:
        return f", as its first layer takes {layer.in_features} features"
    return ""


def count_channels(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def check_alike(interfaces: Sequence[Sequence[tuple[int, ...]]]) -> None:
    """Raise UserError if blocks of one level differ in the shape of their results."""
    for k, shapes in enumerate(interfaces):
        for level, (shape, expected) in enumerate(zip(shapes, interfaces[0], strict=True), start=1):
            if shape != expected:
                raise UserError(
                    f"Block {level} of client {k} gives {list(shape)} and that of client 0 {list(expected)}: networks "
                    "can only be fused where their blocks give the same shape, so take networks of one kind, such as "
                    "resnet18,resnet10, or another number of blocks."
                )


def list_layers(model: StagedNetwork) -> list[nn.Module]:
    """Return the smallest parts of a network that cutting keeps whole, in order, without the average pooling.

    A part is a composite module (a residual block, a transformer layer), or a run of plain layers (a stem).
    """
    parts: list[nn.Module] = []
    joined = nn.Sequential if isinstance(model, OwnNetwork) else ConvSequential
    for name in model.stage_names[:-1]:
        stage = model.stage(name)
        # Not children(), which would list a repeated activation once.
        children = stage if isinstance(stage, nn.Sequential) else [stage]
        for is_composite, run in groupby(children, lambda child: any(True for _ in child.children())):
            layers = list(run)
            parts += layers if is_composite else [joined(*layers)]
    return parts


def cut_points(model: StagedNetwork, blocks: int) -> tuple[int, ...]:
    """Return the layers behind which ``model`` is cut, with the pooling as the last layer."""
    count = len(list_layers(model))
    if not 1 <= blocks <= count + 1:
        raise UserError(
            f"{type(model).__name__} here has {count} layers and a pooling and can be cut into 1 to {count + 1} "
            f"blocks, not {blocks}: take fewer with the method option blocks, or a deeper --model."
        )
    published = CUTS.get((type(model), count), {}).get(blocks)
    if published is not None:
        return published
    # With a block more than layers, the last part is empty: the pooling alone.
    return tuple(int(part[-1]) for part in np.array_split(np.arange(count), blocks)[:-1])


def cut_network(model: StagedNetwork, blocks: int) -> BlockNetwork:
    """Divide a network into blocks that share its parameters, the last with the average pooling."""
    parts = [*list_layers(model), model.pooling]
    ends = [*(point + 1 for point in cut_points(model, blocks)), len(parts)]
    starts, block = [0, *ends[:-1]], OwnBlock if isinstance(model, OwnNetwork) else nn.Sequential
    return BlockNetwork([block(*parts[a:b]) for a, b in zip(starts, ends, strict=True)], model.head)
