"""Small image and text encoders that need no download, with a first token that represents the whole image or text."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedkern.models.networks.attention import TransformerLayer, token_rows, unpack
from fedkern.models.networks.conv_norm_layers import ConvSequential
from fedkern.models.networks.vit import patch_size
from fedkern.models.precision import Layer
from fedkern.models.pretrained.vocabulary import Tokens, Vocabulary

WIDTH = 96
IMAGE_LAYERS, TEXT_LAYERS = 4, 2
LENGTH = 112  # most tokens of a text (docs/methods/feddra.md, 6)


class _Positions(nn.Module):
    """Learnt positions, and a learnt token in front: ``[B, N, d]`` to ``[B, 1 + N, d]``."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 1 + count, width))

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.cls, std=0.02, generator=generator)
        nn.init.normal_(self.position, std=0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1) + self.position


class ImageEncoder(nn.Module):
    """Base class of image encoders: tokens of ``width`` channels in a ``grid`` behind the first token."""

    width: int
    grid: tuple[int, int]


class ConvTokens(ImageEncoder):
    """Convolutions with group norm, and the positions of the last map, at most 8x8, as tokens.

    Batch norm would need running statistics averaged over clients with different backgrounds.  Channels double from
    ``width / 4`` up to ``width``, a multiple of 4.
    """

    def __init__(self, *, channels: int, width: int, image_size: Sequence[int]) -> None:
        super().__init__()
        halvings = max(2, math.ceil(math.log2(max(image_size) / 8)))
        sizes = [channels, *(min(width, width // 4 * 2**i) for i in range(halvings)), width]
        stages: list[nn.Module] = []
        for i in range(halvings + 1):
            stages += [
                nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False),
                nn.GroupNorm(math.gcd(8, sizes[i + 1]), sizes[i + 1]),
                nn.ReLU(),
            ]
            if i < halvings:
                stages.append(nn.MaxPool2d(2))
        self.stages = ConvSequential(*stages)
        height, across = image_size
        self.grid = height >> halvings, across >> halvings
        self.width = width
        self.positions: Layer = _Positions(self.grid[0] * self.grid[1], width)

    def forward(self, images: Tensor) -> Tensor:
        return self.positions(self.stages(images).flatten(2).transpose(1, 2))


class PatchTokens(ImageEncoder):
    """Small vision transformer (arXiv 2010.11929): patches as tokens, four layers and a norm."""

    def __init__(self, *, channels: int, width: int, image_size: Sequence[int]) -> None:
        super().__init__()
        patch = patch_size(min(image_size))
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.grid = image_size[0] // patch, image_size[1] // patch
        self.width = width
        self.positions: Layer = _Positions(self.grid[0] * self.grid[1], width)
        self.layers: Layer = nn.Sequential(*(TransformerLayer(width) for _ in range(IMAGE_LAYERS)), nn.LayerNorm(width))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.positions(self.project(images).flatten(2).transpose(1, 2)))


class WordEmbedding(nn.Module):
    def __init__(self, words: int, longest: int, width: int) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.empty(words, width))
        self.position = nn.Parameter(torch.empty(longest, width))

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.word, std=0.02, generator=generator)
        nn.init.normal_(self.position, std=0.02, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.word) + self.position[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Small transformer over words, ``[CLS]`` in front."""

    def __init__(self, vocabulary: Vocabulary, *, width: int, longest: int = LENGTH) -> None:
        super().__init__()
        self.vocabulary, self.width, self.longest = vocabulary, width, longest
        self.embedding = WordEmbedding(len(vocabulary), longest, width)
        self.layers = nn.ModuleList(TransformerLayer(width) for _ in range(TEXT_LAYERS))
        self.norm: Layer = nn.LayerNorm(width)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self.vocabulary.tokenize(texts, self.longest)

    def forward(self, tokens: Tokens) -> Tensor:
        """Map tokens ``[B, L]`` to vectors ``[B, L, d]``, meaningless at padding."""
        x, rows = self.embedding(tokens.ids), token_rows(tokens.mask)
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        for layer in self.layers:
            x = layer(x, tokens.mask, rows)
        x = self.norm(x)
        return x if rows is None else unpack(x, tokens.mask, rows)
