"""FedIOD's patch discriminators, any number of them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminators(nn.Module):
    """K discriminators that tell real images from generated ones patch by patch (FedIOD, arXiv 2312.14478).

    Each is a 4x4 convolution of stride 2 to ``ndf`` channels with LeakyReLU 0.2, another to ``2 ndf`` with batch norm
    and LeakyReLU, and a 1x1 convolution to one logit: 0.53 million parameters at 3 channels and ``ndf`` 128.  Batch
    norm uses the statistics of the batch it sees, always; there are no running ones.

    Discriminator k is rows ``k * n`` to ``(k + 1) * n`` of every parameter's first axis; see :meth:`parts`.

    Args:
        generators: K CPU generators, each draws the initial weights of its discriminator: N(0, 0.02), batch norm's
            scales N(1, 0.02); the global generator is neither read nor moved.
        channels: image channels.
        ndf: channels of the first map.

    Raises:
        ValueError: no generator, or a size that is not positive.
    """

    def __init__(self, generators: Sequence[torch.Generator], *, channels: int = 3, ndf: int = 128) -> None:
        super().__init__()
        if not generators:
            raise ValueError("generators must hold at least one generator, not none")
        for name, value in (("channels", channels), ("ndf", ndf)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.count, self.channels, self.ndf = len(generators), channels, ndf
        wide = 2 * ndf
        drawn = [draw_parts(generator, channels, ndf) for generator in generators]
        for name in drawn[0]:
            setattr(self, name, nn.Parameter(torch.cat([part[name] for part in drawn])))
        self._wide = wide

    first: nn.Parameter
    first_bias: nn.Parameter
    second: nn.Parameter
    scale: nn.Parameter
    shift: nn.Parameter
    last: nn.Parameter
    last_bias: nn.Parameter

    def parts(self) -> list[dict[str, Tensor]]:
        """The K discriminators' parameters by name, views of this module's."""
        cut = {name: value.detach().tensor_split(self.count) for name, value in self.named_parameters()}
        return [{name: pieces[k] for name, pieces in cut.items()} for k in range(self.count)]

    def forward(self, images: Tensor) -> Tensor:
        """Patch logits ``[K, B, h, w]``.

        Args:
            images: ``[B, C, H, W]``, the same for all discriminators, or ``[K, B, C, H, W]``, each its own; normalised.
        """
        count = self.count
        if images.dim() == 5:
            x = torch.cat([F.conv2d(*one, stride=2, padding=1) for one in self._own(images)], 1)
        else:
            x = F.conv2d(images, self.first, self.first_bias, stride=2, padding=1)
        x = F.conv2d(F.leaky_relu(x, 0.2), self.second, stride=2, padding=1, groups=count)
        x = F.leaky_relu(F.batch_norm(x, None, None, self.scale, self.shift, training=True), 0.2)
        return F.conv2d(x, self.last, self.last_bias, groups=count).transpose(0, 1)

    def _own(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        # One after another: a grouped convolution of so few channels per group takes longer.
        weights, biases = self.first.tensor_split(self.count), self.first_bias.tensor_split(self.count)
        return list(zip(images.unbind(0), weights, biases, strict=True))


def draw_parts(generator: torch.Generator, channels: int, ndf: int) -> dict[str, Tensor]:
    """Initial weights of one discriminator, by parameter name."""

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, 0.02, generator=generator)

    wide = 2 * ndf
    return {
        "first": normal(ndf, channels, 4, 4),
        "first_bias": torch.zeros(ndf),
        "second": normal(wide, ndf, 4, 4),
        "scale": normal(wide, mean=1.0),
        "shift": torch.zeros(wide),
        "last": normal(1, wide, 1, 1),
        "last_bias": torch.zeros(1),
    }
