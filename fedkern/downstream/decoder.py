"""Segmentation by a light decoder on frozen image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern.data import IGNORE
from fedkern.models import PairNetwork, initialise
from fedkern.streams import stream
from fedkern.tasks.cross_entropy import cross_entropy

WIDTH = 48
BATCH, LR = 32, 3e-3


class TokenDecoder(nn.Module):
    """Decoder from the frozen image encoder's patch tokens to logits of every pixel of images of ``image_size``.

    Two 3x3 convolutions, each with ReLU and bilinear upsampling, then a 1x1 convolution. The image encoder is never
    trained.
    """

    def __init__(self, network: PairNetwork, classes: int, image_size: Sequence[int]) -> None:
        super().__init__()
        self._encoder = [network]  # in a list: no submodule to train, move or save
        self.size = tuple(image_size)
        channels = network.image_align.norm1.weight.numel()
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1)
        self.last = nn.Conv2d(WIDTH // 2, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``[B, C, H, W]`` to logits ``[B, classes, H, W]``."""
        network = self._encoder[0]
        with torch.no_grad():
            tokens = network.encode_image(images)[:, 1:]
            tokens = F.layer_norm(tokens, tokens.shape[-1:])  # encoders differ in the scale of their tokens
        x = tokens.transpose(1, 2).unflatten(2, network.grid)
        half = [max(-(-side // 2), cells) for side, cells in zip(self.size, network.grid, strict=True)]
        x = F.interpolate(F.relu(self.first(x)), half, mode="bilinear", align_corners=False)
        x = F.interpolate(F.relu(self.second(x)), self.size, mode="bilinear", align_corners=False)
        logits: Tensor = self.last(x)
        return logits


def train_decoder(
    network: PairNetwork, images: Sequence[Tensor], labels: Tensor, classes: int, *, epochs: int, seed: int
) -> TokenDecoder:
    """Train a decoder with AdamW on the cross-entropy of pixels, and return it in eval mode.

    Args:
        network: a pair in eval mode.
        images: normalised images in consecutive parts.
        labels: int64 ``[n, H, W]`` of all images, negative for unknown pixels.
        seed: draws the initial weights and the order.
    """
    decoder = TokenDecoder(network, classes, labels.shape[1:])
    initialise(decoder, torch.Generator().manual_seed(int(stream(seed, "decoder").integers(2**63))))
    pixels = torch.cat(list(images))
    decoder.to(pixels.device)
    labels = labels.to(pixels.device).clamp_min(IGNORE)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=LR, weight_decay=1e-4)
    for epoch in range(epochs):
        order = torch.from_numpy(stream(seed, "decoder/order", round=epoch).permutation(len(pixels)))
        for rows in order.split(BATCH):
            rows = rows.to(pixels.device)
            loss = cross_entropy(decoder(pixels[rows]), labels[rows], ignore_index=IGNORE)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return decoder.eval()
