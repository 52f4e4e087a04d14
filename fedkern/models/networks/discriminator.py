"""FedIOD's patch discriminators, K side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.ops._conv.strided import strided_conv
from fedkern.ops._core.layout import apply_norm


class PatchDiscriminators(nn.Module):
    """K discriminators that tell real images from generated ones patch by patch (FedIOD, arXiv 2312.14478).

    A discriminator has a 4x4 convolution of stride 2 to ``ndf`` channels with LeakyReLU 0.2, further ones to twice the
    channels (at most ``8 ndf``) with batch norm by batch statistics and LeakyReLU, and a 1x1 convolution to one logit.
    Discriminator k has the rows ``k * n`` to ``(k + 1) * n`` of every parameter's first axis.

    Args:
        generators: K CPU generators, which draw weights from N(0, 0.02) and scales of batch norm from N(1, 0.02).
        layers: at least two convolutions of stride 2; images must have at least ``2 ** layers`` pixels a side.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], *, channels: int = 3, ndf: int = 128, layers: int = 2
    ) -> None:
        super().__init__()
        self.count, self.channels, self.ndf, self.layers = len(generators), channels, ndf, layers
        initial_parts = [draw_parts(generator, channels, ndf, layers) for generator in generators]
        for name in initial_parts[0]:
            setattr(self, name, nn.Parameter(torch.cat([part[name] for part in initial_parts])))

    first: nn.Parameter
    first_bias: nn.Parameter
    last: nn.Parameter
    last_bias: nn.Parameter

    def parts(self) -> list[dict[str, Tensor]]:
        cut = {name: value.detach().tensor_split(self.count) for name, value in self.named_parameters()}
        return [{name: pieces[k] for name, pieces in cut.items()} for k in range(self.count)]

    def forward(self, images: Tensor) -> Tensor:
        """Return patch logits ``[K, B, h, w]`` of images ``[B, C, H, W]``, or ``[K, B, C, H, W]``."""
        count = self.count
        if images.dim() == 5:
            # Separate convolutions: a grouped one with so few channels per group takes longer.
            layers = zip(images, self.first.tensor_split(count), self.first_bias.tensor_split(count), strict=True)
            x = torch.cat([F.conv2d(*layer, stride=2, padding=1) for layer in layers], 1)
        else:
            x = F.conv2d(images, self.first, self.first_bias, stride=2, padding=1)
        x = F.leaky_relu(x, 0.2)
        for number in range(2, self.layers + 1):
            weight, scale, shift = (getattr(self, f"{name}{number}") for name in ("conv", "scale", "shift"))
            x = strided_conv(x, weight, count)
            x = F.leaky_relu(apply_norm(F.batch_norm, x, None, None, scale, shift, training=True), 0.2)
        return F.conv2d(x, self.last, self.last_bias, groups=count).transpose(0, 1)


def receptive_field(layers: int) -> int:
    return (3 << layers) - 2


def whole_image(height: int, width: int) -> int:
    """Return the number of layers, at least 2, after which a logit sees the whole image, if the shorter side allows."""
    layers = 2
    while receptive_field(layers) < max(height, width) and 2 ** (layers + 1) <= min(height, width):
        layers += 1
    return layers


def draw_parts(generator: torch.Generator, channels: int, ndf: int, layers: int) -> dict[str, Tensor]:
    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, 0.02, generator=generator)

    parts = {"first": normal(ndf, channels, 4, 4), "first_bias": torch.zeros(ndf)}
    wide = ndf
    for number in range(2, layers + 1):
        narrow, wide = wide, min(2 * wide, 8 * ndf)
        parts[f"conv{number}"] = normal(wide, narrow, 4, 4)
        parts[f"scale{number}"] = normal(wide, mean=1.0)
        parts[f"shift{number}"] = torch.zeros(wide)
    return {**parts, "last": normal(1, wide, 1, 1), "last_bias": torch.zeros(1)}
