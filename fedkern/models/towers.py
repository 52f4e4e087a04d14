"""Pairs of an image and a text encoder with alignment layers and projection heads (FedDRA, arXiv 2404.03854)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import expand
from fedkern.models.network_registry import initialise
from fedkern.models.networks.attention import TransformerLayer
from fedkern.models.networks.small_encoders import LENGTH, WIDTH, ConvTokens, ImageEncoder, PatchTokens, TextTransformer
from fedkern.models.precision import autocasts
from fedkern.models.pretrained import pretrained_pair
from fedkern.models.pretrained.vocabulary import Kind, Tokens, Vocabulary
from fedkern.models.state.allocate import allocate
from fedkern.streams import stream

TextEncoder = TextTransformer | pretrained_pair.PretrainedText
EMBEDDING = 128
IMAGE_ENCODERS = {"conv": "convolutions with group norm, 8x8 tokens", "vit": "vision transformer of four layers"}
TEXT_ENCODERS = {
    "words": "transformer of two layers over the words of the training texts",
    "wordpieces": "the same over word pieces",
}
PARTS = ("image_encoder", "text_encoder", "image_align", "text_align", "image_head", "text_head")
"""The submodules of a :class:`PairNetwork`; the first two are frozen in FedDRA's first stage."""


class PairNetwork(nn.Module):
    """Images and texts as unit vectors in one space (docs/methods/feddra.md, section 6).

    Both sides have an encoder that gives tokens, one transformer layer over all tokens, and a head on the first token:
    ``Linear d -> h, BN, ReLU, Linear h -> 128, BN without affine`` with h = ``8 d / 3`` (2,048 for 768), then L2
    normalisation.

    Args:
        image_encoder: images ``[B, C, H, W]`` to tokens ``[B, 1 + N, d]``; has ``width`` and ``grid``.
        text_encoder: :class:`Tokens` ``[B, L]`` to ``[B, L, d']``; has ``width`` and ``tokenize``.
        about: the arguments with which :func:`build_pair` makes the same network again, as JSON values.
    """

    def __init__(
        self, image_encoder: ImageEncoder, text_encoder: TextEncoder, *, about: Mapping[str, object] | None = None
    ) -> None:
        super().__init__()
        widths = int(image_encoder.width), int(text_encoder.width)
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_align = TransformerLayer(widths[0])
        self.text_align = TransformerLayer(widths[1], norm_first=False)
        self.image_head, self.text_head = (_head(width, 8 * width // 3) for width in widths)
        self.about = dict(about or {})

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens behind the first one."""
        return self.image_encoder.grid

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return token numbers and mask ``[B, L]`` of texts, on the CPU."""
        return self.text_encoder.tokenize(texts)

    @autocasts
    def encode_image(self, images: Tensor) -> Tensor:
        """Map normalised images fp32 ``[B, C, H, W]`` to the encoder's tokens ``[B, 1 + N, d]``."""
        tokens: Tensor = self.image_encoder(images)
        return tokens

    @autocasts
    def encode_text(self, tokens: Tokens) -> Tensor:
        """Map tokens ``[B, L]`` to the encoder's vectors ``[B, L, d]``."""
        vectors: Tensor = self.text_encoder(tokens)
        return vectors

    def image_token(self, images: Tensor) -> Tensor:
        """Map normalised images fp32 ``[B, C, H, W]`` to the inputs of their head ``[B, d]``."""
        return self.image_align.first_token(self.encode_image(images))

    def text_token(self, tokens: Tokens) -> Tensor:
        """Map tokens ``[B, L]`` to the inputs of their head ``[B, d]``."""
        return self.text_align.first_token(self.encode_text(tokens), tokens.mask)

    def project_image(self, sequence: Tensor) -> Tensor:
        """Map the output of :meth:`encode_image` to unit vectors ``[B, 128]``."""
        return unit_rows(self.image_head(self.image_align.first_token(sequence)))

    def project_text(self, sequence: Tensor, mask: Tensor) -> Tensor:
        """Map the output of :meth:`encode_text` and the tokens' mask bool ``[B, L]`` to unit vectors ``[B, 128]``."""
        return unit_rows(self.text_head(self.text_align.first_token(sequence, mask)))

    def image_embedding(self, images: Tensor) -> Tensor:
        """Map normalised images fp32 ``[B, C, H, W]`` to unit vectors ``[B, 128]``."""
        return unit_rows(self.image_head(self.image_token(images)))

    def text_embedding(self, tokens: Tokens) -> Tensor:
        """Map tokens ``[B, L]`` to unit vectors ``[B, 128]``."""
        return unit_rows(self.text_head(self.text_token(tokens)))

    def forward(self, images: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the unit vectors ``[B, 128]`` of images and of their texts."""
        return self.image_embedding(images), self.text_embedding(tokens)


SHORTEST = 0.1
"""Smallest norm of a row that still has a direction; after the last batch norm a row's norm is about 11."""


def unit_rows(projected: Tensor) -> Tensor:
    """Scale rows ``[B, 128]`` to norm 1, or less for rows shorter than :data:`SHORTEST`.

    In a batch of equal images or texts, batch norm leaves only rounding errors of a row, whose gradient at norm 1 would
    be ten orders of magnitude too large.
    """
    return functional.normalize(projected, dim=1, eps=SHORTEST)


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, EMBEDDING),
        nn.BatchNorm1d(EMBEDDING, affine=False),
    )


def build_pair(
    image_encoder: str = "conv",
    text_encoder: str = "words",
    *,
    channels: int,
    image_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    vocabulary: Sequence[str] | None = None,
    width: int | None = None,
    longest: int = LENGTH,
    seed: int = 0,
) -> PairNetwork:
    """Build a pair with float32 parameters on the CPU.

    The global random generators are neither read nor moved.  ``build_pair(**network.about)`` gives the same modules,
    into which a state dict can be loaded.

    Args:
        image_encoder: a name of ``IMAGE_ENCODERS``, or a local folder that transformers can read.
        text_encoder: a name of ``TEXT_ENCODERS``, or a local folder that transformers can read.
        channels: channels of the images.
        image_size: height and width of the images in pixels.
        mean, std: normalisation of the images, per channel.
        vocabulary: tokens of the built-in text encoders, ``learn_vocabulary(texts, kind).tokens``.
        width: channels of a token of the built-in encoders, a multiple of 4; default 96.
        longest: most tokens of a text; longer texts are cut.
        seed: the run's root seed; every part draws its weights from a stream of its own.

    Raises:
        UserError: an unknown encoder, a folder that cannot be used, or images too small.
    """
    builtin_names = image_encoder in IMAGE_ENCODERS, text_encoder in TEXT_ENCODERS
    _check_name(image_encoder, "image", IMAGE_ENCODERS)
    _check_name(text_encoder, "text", TEXT_ENCODERS)
    width = WIDTH if width is None else width
    if width < 4 or width % 4:
        raise UserError(f"the width of an image-text pair must be a multiple of 4, got {width}.")
    if builtin_names[0] and min(image_size) < 16:
        raise UserError(f"the image encoder {image_encoder} needs images of at least 16 pixels, got {min(image_size)}.")
    if builtin_names[1] and vocabulary is None:
        raise ValueError(f"vocabulary: expected the tokens that {text_encoder} knows, given none")
    picture: dict[str, Any] = {"channels": channels, "image_size": tuple(image_size)}
    about = {
        "image_encoder": image_encoder, "text_encoder": text_encoder, "channels": channels,
        "image_size": list(image_size), "mean": list(mean), "std": list(std),
        "vocabulary": list(vocabulary or ()) if builtin_names[1] else None, "width": width, "longest": longest,
    }  # fmt: skip
    images: ImageEncoder
    texts: TextEncoder
    if not builtin_names[0]:
        images = pretrained_pair.image_encoder(image_encoder, **picture, mean=mean, std=std)
    if not builtin_names[1]:
        texts = pretrained_pair.text_encoder(text_encoder, longest=longest)
    # On the meta device the layers' own initialisation touches no memory and no generator.
    with torch.device("meta"):
        if builtin_names[0]:
            images = {"conv": ConvTokens, "vit": PatchTokens}[image_encoder](**picture, width=width)
        if builtin_names[1]:
            tokens = Vocabulary(vocabulary or (), cast(Kind, text_encoder))
            texts = TextTransformer(tokens, width=width, longest=longest)
        network = PairNetwork(images, texts, about=about)
    for name, builtin in zip(PARTS, (*builtin_names, True, True, True, True), strict=True):
        if builtin:
            part = getattr(network, name)
            allocate(part)
            word = int(stream(seed, f"model/{name}", round=-1).integers(2**63))
            initialise(part, torch.Generator().manual_seed(word))
    return network


def _check_name(name: str, kind: str, names: Mapping[str, str]) -> None:
    looks_like_path = expand(name).is_dir() or name.startswith((".", "~")) or "/" in name
    if name not in names and not looks_like_path:
        hint = suggest_name(name, names)
        raise UserError(f'there is no {kind} encoder "{name}": give {", ".join(names)} or a local folder.{hint}')
