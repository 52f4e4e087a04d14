"""Generator of images from noise, for distillation without data."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.models.networks.conv_norm_layers import ConvSequential
from fedkern.models.precision import autocasts, to_fp32
from fedkern.models.state.allocate import allocate

BASE = 8  # largest side of the first map: larger images add doublings, not a larger linear map


class Generator(nn.Module):
    """DCGAN-like generator: a linear map of the noise, then doublings of the size, each with a 3x3 convolution.

    The maps have ``widths[0] * ngf`` channels before the first doubling and ``widths[i] * ngf`` after the i-th.  A last
    convolution and a sigmoid make pixels in [0, 1].

    ``widths=(2, 2, 1)`` with ``nz`` 256 is DENSE's generator (arXiv 2112.12371).  ``widths=(4, 2, 1)`` with ``nz`` 100
    is FedIOD's (arXiv 2312.14478), of 2.03 million parameters at 3x32x32.

    Args:
        nz: dimensions of the noise.
        ngf: unit of the channels.
        image_size: side in pixels, or (height, width), at least 4.
        widths: channels of the maps in units of ``ngf``; images above 32 pixels repeat the first for more doublings.
        mean, std: normalisation of the output, per channel, for images in [0, 1]; by default none.
        pixel_mean: approximate mean of the pixels that new weights generate, per channel; by default 0.5.
        generator: draws the initial weights; the global generator is neither read nor moved.

    Raises:
        ValueError: a size is not positive, or ``mean``, ``std`` or ``pixel_mean`` has another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        nz: int = 256,
        ngf: int = 64,
        channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        widths: Sequence[int] = (2, 2, 1),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixel_mean: Sequence[float] | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 4:
            raise ValueError(f"image_size must be at least 4, not {min(height, width)}")
        doublings = len(widths) - 1
        while max(height, width) > BASE << doublings:
            doublings += 1
        sizes = [ngf * w for w in (*[widths[0]] * (doublings + 1 - len(widths)), *widths)]
        self.nz = nz
        self.pixel_mean = tuple(pixel_mean or [0.5] * channels)
        self.image_size = (height, width)
        self.base = (sizes[0], -(-height // (1 << doublings)), -(-width // (1 << doublings)))
        with torch.device("meta"):  # the layers' own initialisation would draw from the global generator
            self.project = nn.Linear(nz, sizes[0] * self.base[1] * self.base[2])
            layers: list[nn.Module] = [nn.BatchNorm2d(sizes[0])]
            for before, after in pairwise(sizes):
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.LeakyReLU(0.2),
                ]
            self.body = ConvSequential(*layers, nn.Conv2d(sizes[-1], channels, 3, padding=1))
        allocate(self)
        shape = (1, channels, 1, 1)
        self.register_buffer("mean", torch.tensor(mean or [0.0] * channels).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0] * channels).view(shape), persistent=False)
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw new weights: N(0, 0.02) for convolutions and the linear map, N(1, 0.02) for batch norm's scales.

        The bias of the last convolution puts the pixels around ``pixel_mean``; all other biases are 0.
        """
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                centre = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
                layer.weight.copy_(torch.empty(layer.weight.shape).normal_(centre, 0.02, generator=generator))
                if layer.bias is not None:
                    layer.bias.zero_()
        last = self.body[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias.copy_(torch.logit(torch.tensor(self.pixel_mean), eps=0.01))  # a mean of 0 or 1 would saturate

    @autocasts
    def pixels(self, z: Tensor) -> Tensor:
        """Generate images in [0, 1], fp32 ``[B, C, H, W]``, from noise ``[B, nz]``."""
        x = self.body(self.project(z).unflatten(1, self.base))
        height, width = self.image_size
        return F.sigmoid(to_fp32(x[:, :, :height, :width]))

    def forward(self, z: Tensor) -> Tensor:
        """Generate normalised images ``[B, C, H, W]`` from noise ``[B, nz]``."""
        return (self.pixels(z) - self.mean) / self.std
