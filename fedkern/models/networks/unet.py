"""U-Net (Ronneberger et al., 2015, arXiv 1505.04597) with batch norm, for the classes of pixels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedkern.models.networks.conv_norm_layers import ConvSequential
from fedkern.models.precision import autocasts, to_fp32


class PixelHead(nn.Conv2d):
    """Linear classifier of every pixel: a 1x1 convolution with the attributes of ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, 1)
        self.in_features, self.out_features = in_features, out_features

    def initialise(self, generator: torch.Generator) -> None:
        """Draw initial values as a linear layer does, so that no class starts far ahead."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


class UpConvolution(nn.ConvTranspose2d):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 2, stride=2)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw weights of variance 1 / channels_in, because every output pixel sees one input pixel."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_channels), generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def double_conv(channels_in: int, channels_out: int) -> ConvSequential:
    layers: list[nn.Module] = []
    for entering in (channels_in, channels_out):
        layers += [nn.Conv2d(entering, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]
    return ConvSequential(*layers)


class UNet(nn.Module):
    """A contracting and an expanding path with a shortcut at every size.

    The convolutions are padded, unlike the paper's, so that the logits have the size of the image.  Images may have any
    size: right and bottom edges are replicated up to a multiple of ``2 ** depth``, and the padding is cut off again.

    Attributes:
        width: channels of :meth:`features` and of the largest maps.
        head: the classifier of every pixel, [B, width, H, W] -> [B, classes, H, W].

    Args:
        classes: number of classes, the background included.
        width: channels of the largest maps; they double whenever the size halves.  The paper's network has 64.
        depth: number of times that the size halves; 4 in the paper's network.
    """

    def __init__(self, *, classes: int, channels: int = 3, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(UpConvolution(2 * w, w) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(double_conv(2 * w, w) for w in reversed(widths[:-1]))
        self.head = PixelHead(width, classes)
        self.width, self.depth = width, depth

    @autocasts
    def features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the features of every pixel, ``[B, width, H, W]``."""
        height, width = x.shape[2:]
        step = 2**self.depth
        if isinstance(x, fx.Proxy) or height % step or width % step:  # a traced graph always pads, perhaps by 0
            x = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
        shortcuts: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            shortcuts.append(x)
        for up, join, shortcut in zip(self.up, self.join, reversed(shortcuts[:-1]), strict=True):
            x = join(torch.cat([shortcut, up(x)], 1))
        return to_fp32(x[:, :, :height, :width])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, classes, H, W]`` of images ``[B, C, H, W]``."""
        logits: Tensor = self.head(self.features(x))
        return logits
