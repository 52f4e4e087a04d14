"""Pairs of an image and a text encoder with alignment layers and projection heads (FedDRA, arXiv 2404.03854).

Encoders are built in, or read from local folders of transformers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import expand, read_json
from fedkern.models.network_registry import initialise
from fedkern.models.networks.attention import TransformerLayer
from fedkern.models.networks.small_encoders import LENGTH, WIDTH, ConvTokens, ImageEncoder, PatchTokens, TextTransformer
from fedkern.models.precision import autocasts
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.pretrained.row_memory import RememberingEncoder
from fedkern.models.pretrained.safe_loading import (
    check_complete,
    check_folder,
    first_line,
    import_transformers,
    weight_args,
    without_code,
)
from fedkern.models.pretrained.vocabulary import Tokens, Vocabulary
from fedkern.models.state.allocate import allocate
from fedkern.models.teachers.efficientnet_lite import LITE_FILE, PIXELS, SIDE, LiteMaps
from fedkern.streams import stream


class PretrainedImage(ImageEncoder, RememberingEncoder):
    """Image network of transformers (ViT, DeiT, DINOv2, CLIP's image side, Swin, ResNet ...) that gives tokens.

    The first token is the class token, or else the mean of the patch tokens.
    """

    def __init__(self, network: Any, preprocessing: Preprocessing, image_size: Sequence[int], channels: int) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        with torch.no_grad():
            example = self._run(torch.zeros(1, channels, *image_size, device=next(network.parameters()).device))
        self.width = int(example[0].shape[2])
        self.grid = example[1]

    def _run(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        pixels = self.preprocessing(images)
        out = self.network(pixel_values=pixels).last_hidden_state
        if out.dim() == 4:  # a convolutional network's map
            tokens, grid, special = out.flatten(2).transpose(1, 2), (out.shape[2], out.shape[3]), 0
        else:
            tokens = out
            grid, special = self._layout(out.shape[1], pixels.shape[2], pixels.shape[3])
        patches = tokens[:, special:]
        front = tokens[:, :1] if special else patches.mean(1, keepdim=True)
        return torch.cat([front, patches], 1), grid

    def _layout(self, count: int, height: int, width: int) -> tuple[tuple[int, int], int]:
        """Return rows and columns of patches among ``count`` tokens, and the number of tokens before them."""
        patch = getattr(self.network.config, "patch_size", None)
        sides = (patch, patch) if isinstance(patch, int) else patch
        has_front = any(name.endswith(("cls_token", "class_embedding")) for name, _ in self.network.named_parameters())
        if sides and has_front:
            grid = height // sides[0], width // sides[1]
            return grid, count - grid[0] * grid[1]
        rows = max(1, round(math.sqrt(count * height / width)))
        while count % rows:  # merged patches (Swin): take the shape nearest to the image's
            rows -= 1
        return (rows, count // rows), 0

    def extra_repr(self) -> str:
        return str(vars(self.preprocessing))

    def forward(self, images: Tensor) -> Tensor:
        if self.memory is None or images.device.type != "cpu":
            return self._run(images)[0]
        return torch.stack(self.memory.rows(images, lambda image: self._run(image)[0]))


class PretrainedText(RememberingEncoder):
    """Text network of transformers (BERT and its kin, sentence embedders, CLIP's text side ...) that gives tokens.

    The first token represents the text: ``[CLS]``, or if ``pooled`` the mean of all tokens, which a sentence-embedding
    checkpoint asks for in 1_Pooling/config.json.  Texts are cut after ``longest`` tokens.
    """

    def __init__(self, network: Any, tokenizer: Any, longest: int, *, pooled: bool) -> None:
        super().__init__()
        self.network, self.tokenizer, self.pooled = network, tokenizer, pooled
        self.width = int(network.config.hidden_size)
        self.longest = longest

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            return Tokens(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1, dtype=torch.bool))
        longest = self.longest - self.pooled
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
        if self.pooled:  # room for the mean
            ids = torch.cat([ids[:, :1], ids], 1)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        return Tokens(ids, mask)

    def extra_repr(self) -> str:
        return f"pooled={self.pooled}"

    def forward(self, tokens: Tokens) -> Tensor:
        if self.memory is None or tokens.device.type != "cpu":
            return self._run(tokens)
        ids, mask = tokens
        texts = [words[present] for words, present in zip(ids, mask, strict=True)]
        rows = self.memory.rows(texts, lambda words: self._run(Tokens(words, torch.ones_like(words, dtype=torch.bool))))
        vectors = rows[0].new_zeros(*ids.shape, self.width)
        vectors[mask] = torch.cat(rows)
        return vectors

    def _run(self, tokens: Tokens) -> Tensor:
        ids, mask = (tokens.ids[:, 1:], tokens.mask[:, 1:]) if self.pooled else tokens
        out: Tensor = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if not self.pooled:
            return out
        share = mask[..., None].to(out.dtype)
        mean = (out * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([mean, out], 1)


def read_image_encoder(
    folder: str | Path, *, channels: int, image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> PretrainedImage:
    """Read an image network from a local folder of transformers, or with EfficientNet-Lite0's weights."""
    path = _existing(folder, "image")
    if (path / LITE_FILE).is_file():
        return PretrainedImage(LiteMaps(path), Preprocessing(PIXELS, mean, std, SIDE), image_size, channels)
    network = _network(path, "image", "vision_model")
    side = getattr(network.config, "image_size", 224)
    preprocessing = Preprocessing.read(path, mean, std, side if isinstance(side, int) else int(side[0]))
    try:
        return PretrainedImage(network, preprocessing, image_size, channels)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _unusable(path, "image", error) from None


def read_text_encoder(folder: str | Path, *, longest: int) -> PretrainedText:
    """Read a text network and its tokenizer from a local folder."""
    path = _existing(folder, "text")
    network = _network(path, "text", "text_model")
    with import_transformers("a tokenizer", f"text encoder {path}", path) as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **without_code(local=True))
    _check_words(path, tokenizer, network)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    positions = getattr(network.config, "max_position_embeddings", longest)
    if getattr(network.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # their positions count from padding_idx + 1
    pooled = _mean_pooled(path, otherwise=tokenizer.cls_token is None)
    try:
        return PretrainedText(network, tokenizer, min(longest, positions + pooled), pooled=pooled)
    except AttributeError as error:
        raise _unusable(path, "text", error) from None


def _check_words(path: Path, tokenizer: Any, network: Any) -> None:
    """Raise UserError if the tokenizer has no words, or more words than the network has embeddings.

    For a folder without tokenizer files transformers makes a tokenizer of special tokens alone.
    """
    reads = bool(getattr(tokenizer, "vocab_files_names", None))  # False for byte-level tokenizers (ByT5)
    files = any(any(path.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model"))
    if (reads and not files) or len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise UserError(
            f"the text encoder {path} has no words: copy its tokenizer's files (tokenizer.json, vocab.txt, vocab.json "
            "with merges.txt, or the one that ends in .model) beside its weights, or save it there with "
            "save_pretrained."
        )
    try:
        rows = getattr(network.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # no embedding table (CANINE), or no network of transformers
        rows = None
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of the text encoder {path} knows {len(tokenizer):,} words and its network {rows:,}: they "
            "do not belong together; copy both from one place, or give the network the rest with "
            "resize_token_embeddings(len(tokenizer)) and save it again."
        )


def _existing(folder: str | Path, kind: str) -> Path:
    path = expand(folder)
    if not path.is_dir():
        raise UserError(f"the folder {path} of the {kind} encoder does not exist.")
    check_folder(path, f"{kind} encoder")
    return path


def _network(path: Path, kind: str, part: str) -> nn.Module:
    """Return the base model in a folder (of an image-text model its ``part``) in float32, without pooler and dropout.

    Dropout would draw from the global generator, and a resumed run would not repeat its draws.
    """
    with import_transformers(f"the {kind} encoder", f"{kind} encoder {path}", path) as transformers:
        config = transformers.AutoConfig.from_pretrained(str(path), **without_code(local=True))
        for part_config in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
            for name, value in vars(part_config).items() if part_config is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(part_config, name, 0.0)
        network, report = transformers.AutoModel.from_pretrained(
            str(path), config=config, dtype=torch.float32, output_loading_info=True, **weight_args(local=True)
        )
    complete = network
    if getattr(network.config, "is_encoder_decoder", False):
        network = network.get_encoder()
    base: nn.Module = getattr(network, part, network)
    if isinstance(getattr(base, "pooler", None), nn.Module):
        base.pooler = nn.Identity()  # the pooler's output is not used, so the pooler would never learn
    check_complete(f"{kind} encoder {path}", complete, base, report["missing_keys"])
    return base.float()


def _mean_pooled(path: Path, *, otherwise: bool) -> bool:
    """Return whether a sentence-embedding folder asks for the mean of all tokens, or ``otherwise`` without a file."""
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return otherwise
    try:
        return bool(read_json(file).get("pooling_mode_mean_tokens", False))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}.") from None


def _unusable(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"the network in {path} cannot be used as {kind} encoder: {first_line(error)}")


TextEncoder = TextTransformer | PretrainedText
EMBEDDING = 128
IMAGE_ENCODERS = {"conv": "convolutions with group norm, 8x8 tokens", "vit": "vision transformer of four layers"}
TEXT_ENCODERS = {"words": "transformer of two layers over the words of the training texts"}
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
        vocabulary: tokens of the built-in text encoders, ``learn_vocabulary(texts).tokens``.
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
        images = read_image_encoder(image_encoder, **picture, mean=mean, std=std)
    if not builtin_names[1]:
        texts = read_text_encoder(text_encoder, longest=longest)
    # On the meta device the layers' own initialisation touches no memory and no generator.
    with torch.device("meta"):
        if builtin_names[0]:
            images = {"conv": ConvTokens, "vit": PatchTokens}[image_encoder](**picture, width=width)
        if builtin_names[1]:
            texts = TextTransformer(Vocabulary(vocabulary or ()), width=width, longest=longest)
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
