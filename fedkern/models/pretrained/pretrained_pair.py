"""Image and text encoders from transformers, read from local folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.files.filesystem import expand
from fedkern.files.inputs import read_json
from fedkern.models.networks.small_encoders import ImageEncoder
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.pretrained.safe_loading import (
    check_complete,
    check_folder,
    first_line,
    import_transformers,
    weight_args,
    without_code,
)
from fedkern.models.pretrained.vocabulary import Tokens


class PretrainedImage(ImageEncoder):
    """Image network of transformers (ViT, DeiT, DINOv2, CLIP's image side, Swin, ResNet ...) that gives tokens.

    The first token is the class token, or else the mean of the patch tokens.
    """

    def __init__(self, network: Any, preprocessing: Preprocessing, image_size: Sequence[int], channels: int) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        device = next(network.parameters()).device
        with torch.no_grad():
            example = self._run(torch.zeros(1, channels, *image_size, device=device))
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

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)[0]


class PretrainedText(nn.Module):
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

    def forward(self, tokens: Tokens) -> Tensor:
        ids, mask = (tokens.ids[:, 1:], tokens.mask[:, 1:]) if self.pooled else tokens
        out: Tensor = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if not self.pooled:
            return out
        share = mask[..., None].to(out.dtype)
        mean = (out * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([mean, out], 1)


def image_encoder(
    folder: str | Path, *, channels: int, image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> PretrainedImage:
    """Read an image network from a local folder (config.json, weights, preprocessor_config.json)."""
    path = _existing(folder, "image")
    network = _network(path, "image", "vision_model")
    side = getattr(network.config, "image_size", 224)
    preprocessing = Preprocessing.read(path, mean, std, side if isinstance(side, int) else int(side[0]))
    try:
        return PretrainedImage(network, preprocessing, image_size, channels)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _unusable(path, "image", error) from None


def text_encoder(folder: str | Path, *, longest: int) -> PretrainedText:
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
    pooled = _mean_pooled(path)
    if pooled is None:
        pooled = tokenizer.cls_token is None
    longest = min(longest, positions + pooled)
    try:
        return PretrainedText(network, tokenizer, longest, pooled=pooled)
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
            _remove_dropout(part_config)
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


def _remove_dropout(config: object) -> None:
    for name, value in vars(config).items() if config is not None else ():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _mean_pooled(path: Path) -> bool | None:
    """Return whether a sentence-embedding folder asks for the mean of all tokens, or None if nothing says so."""
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    try:
        return bool(read_json(file).get("pooling_mode_mean_tokens", False))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}.") from None


def _unusable(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"the network in {path} cannot be used as {kind} encoder: {first_line(error)}")
