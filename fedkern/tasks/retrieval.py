"""Image-text retrieval in both directions, by recall at k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import models, ops
from fedkern.models.pretrained.vocabulary import Tokens, split_words
from fedkern.tasks.protocols import Description, JudgedSet, RunFacts, TaskBatch, Words
from fedkern.tasks.task import Task

TEMPERATURE = 0.07
"""Fixed temperature of the similarities of unit vectors in the contrastive loss (FedDRA)."""
RECALLS = (1, 5, 10)
LOSS_BATCH = 32
"""Pairs per batch of a test loss; the contrastive loss grows with the logarithm of this number."""
CHUNK = 512  # queries scored at once, so that memory holds only [CHUNK, gallery] scores


class Retrieval(Task):
    """Image-text retrieval by a pair of encoders, where the targets of a batch are its texts' tokens."""

    name, main = "retrieval", "i2t_r1"
    target, network, pictures = "text", "pairs", ("retrieval",)
    offers = frozenset({"loss", "pairs", "images"})

    def loss(self, model: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the contrastive loss, the sum of both directions (docs/methods/feddra.md, section 5)."""
        if batch.per_sample:
            raise ValueError(
                "batch: expected labelled images where losses are per sample, given pairs, whose loss compares them"
            )
        x, y = model(batch.inputs, batch.targets)
        return ops.contrastive(x, y, TEMPERATURE)

    def count_known(self, batch: TaskBatch) -> int:
        return len(batch.indices)

    @torch.no_grad()
    def figures(self, model: nn.Module, data: JudgedSet) -> dict[str, float]:
        """Return the figures of a pair of encoders.

        - ``i2t_r1``, ``i2t_r5``, ``i2t_r10``: recall of the right text for an image, fractions;
        - ``t2i_r1``, ``t2i_r5``, ``t2i_r10``: recall of the right image for a text;
        - ``gallery``: the number of texts to choose from;
        - ``loss``: the mean contrastive loss of ``data.loss_batch`` pairs.
        """
        embeddings = [model(batch.inputs, batch.targets) for batch in data.batches(even=True)]
        if not embeddings:
            raise ValueError("data: expected at least one sample, given none")
        images, texts = torch.cat([x for x, _ in embeddings]), torch.cat([y for _, y in embeddings])
        gallery = Gallery.of(data.split.ids, data.split.texts)
        figures = recalls(images[gallery.images.to(images.device)], texts, RECALLS, pairs=gallery.pairs)
        return {**figures, "loss": contrastive_among(images, texts, data.loss_batch), "gallery": float(len(texts))}

    def comparable(self, sizes: Sequence[int]) -> tuple[str, ...]:
        return ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5") if len(set(sizes)) == 1 else ()  # of equally many candidates

    def chance(self, data: object, classes: int, *, candidates: float = 0.0, **facts: object) -> float | None:
        return 1 / candidates if candidates else None

    def places(self, classes: Sequence[str], network_classes: Sequence[str]) -> Sequence[int] | None:
        return range(len(classes))  # nothing is learnt of the classes

    def map_labels(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        return labels

    def shown_classes(self, labels: Tensor) -> Tensor:
        return labels[:0]

    def describe_network(self, context: RunFacts) -> Description:
        """Return ``pair``, the arguments of ``build_pair``, with a vocabulary of the clients' texts."""
        data, config = context.data, context.config
        channels, *size = data.form.shape
        texts = (text for split in data.clients for text in split.texts or ())
        kind = config.text_encoder
        mean, std = data.form.mean, data.form.std
        if config.image_encoder not in models.IMAGE_ENCODERS:  # such an encoder has its own scale of images
            mean, std = data.form.scale(f"The image encoder {config.image_encoder}")
        words = models.learn_vocabulary(texts).tokens if kind in models.TEXT_ENCODERS else None
        return {
            "pair": {
                "image_encoder": config.image_encoder,
                "text_encoder": kind,
                "channels": channels,
                "image_size": size,
                "mean": list(mean),
                "std": list(std),
                "vocabulary": None if words is None else list(words),
                "width": config.width,
            }
        }

    def build(self, about: Description, seed: int) -> nn.Module:
        return models.build_pair(**about["pair"], seed=seed) if "pair" in about else super().build(about, seed)

    def network_name(self, config: Any) -> str:
        return f"{config.image_encoder}+{config.text_encoder}"

    def vocabulary_messages(self, context: RunFacts) -> tuple[list[Words], Words] | None:
        words = context.task_facts["pair"]["vocabulary"]
        if words is None:
            return None
        counts = [Counter(word for text in split.texts for word in split_words(text)) for split in context.data.clients]
        return [{"words": list(c), "counts": list(c.values())} for c in counts], {"words": words}

    def tokens(self, split: Any, tokenise: Callable[[], Callable[[Sequence[str]], Tokens]]) -> Tokens:
        return tokenise()(split.texts)

    def targets(self, labels: Tensor, tokens: Tokens | None, rows: Tensor) -> Tokens:
        assert tokens is not None
        # All tokens stay on the CPU: the length of a batch's longest text is read from them, which nobody waits for.
        return tokens.take(rows).to(labels.device)


RETRIEVAL = Retrieval()


def contrastive_among(images: Tensor, texts: Tensor, size: int) -> float:
    """Return the mean contrastive loss of unit vectors [n, D] in batches of exactly min(``size``, n) pairs.

    Every (n // size)-th pair, so that similar neighbours are not each other's negatives. Leftover pairs are excluded,
    because smaller batches have smaller losses.
    """
    n = len(images)
    count = max(1, n // size)
    rows = [torch.arange(start, start + count * min(size, n), count) for start in range(count)]
    losses = [ops.contrastive(images[r.to(images.device)], texts[r.to(texts.device)], TEMPERATURE) for r in rows]
    return float(torch.stack(losses).double().mean())


@dataclass(frozen=True)
class Gallery:
    """Distinct images of a set, and the matching image-text pairs.

    Attributes:
        images: int64 ``[I]``, the first row of every distinct image.
        pairs: int64 ``[P, 2]``, (position in ``images``, row of the text) of every matching pair.
    """

    images: Tensor
    pairs: Tensor

    @staticmethod
    def of(ids: Sequence[str] | None, texts: Sequence[str]) -> Gallery:
        """Return the gallery of rows.

        Rows of equal id are one image with several captions, and equal texts share their images.
        """
        names = [str(row) for row in range(len(texts))] if ids is None else ids
        place: dict[str, int] = {}
        first_rows: list[int] = []
        holders: dict[str, dict[int, None]] = {}  # ordered sets
        for row, (name, text) in enumerate(zip(names, texts, strict=True)):
            if name not in place:
                place[name] = len(first_rows)
                first_rows.append(row)
            holders.setdefault(text, {})[place[name]] = None
        pairs = [(image, row) for row, text in enumerate(texts) for image in holders[text]]
        return Gallery(torch.tensor(first_rows, dtype=torch.int64), torch.tensor(pairs, dtype=torch.int64).view(-1, 2))


@torch.no_grad()
def recalls(
    image_embeddings: Tensor, text_embeddings: Tensor, ks: Sequence[int] = (1, 5, 10), *, pairs: Tensor | None = None
) -> dict[str, float]:
    """Return the recall at k in both directions: the share of queries with a partner among the k nearest.

    Ties count as the expectation over a random order, so embeddings that have collapsed to one point score k / gallery
    and not 1.

    Args:
        image_embeddings, text_embeddings: fp32 ``[I, d]`` and ``[T, d]``, unit vectors.
        pairs: int64 ``[P, 2]``, (image, text) of every matching pair; default: image i matches text i only. A query
            without a partner does not count.
    """
    images, texts = len(image_embeddings), len(text_embeddings)
    if image_embeddings.dim() != 2 or image_embeddings.shape[1:] != text_embeddings.shape[1:]:
        raise ValueError(
            f"image_embeddings, text_embeddings: expected [I, d] and [T, d], got {list(image_embeddings.shape)} and "
            f"{list(text_embeddings.shape)}"
        )
    if not images or not texts:
        raise ValueError(f"image_embeddings, text_embeddings: expected at least one each, got {images} and {texts}")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks: expected whole numbers of at least 1, got {list(ks)}")
    if pairs is None:
        if images != texts:
            raise ValueError(f"pairs: expected for {images} images and {texts} texts, given none")
        pairs = torch.arange(images)[:, None].expand(-1, 2)
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs: expected int64 [P, 2], got {pairs.dtype} {list(pairs.shape)}")
    if int(pairs.min()) < 0 or int(pairs[:, 0].max()) >= images or int(pairs[:, 1].max()) >= texts:
        raise ValueError(f"pairs: expected images below {images} and texts below {texts}")
    pairs = pairs.to(image_embeddings.device)
    to_text = _recalls(image_embeddings, text_embeddings, ks, pairs)
    to_image = _recalls(text_embeddings, image_embeddings, ks, pairs.flip(1))
    return {
        **{f"i2t_r{k}": value for k, value in zip(ks, to_text, strict=True)},
        **{f"t2i_r{k}": value for k, value in zip(ks, to_image, strict=True)},
    }


def _recalls(queries: Tensor, gallery: Tensor, ks: Sequence[int], pairs: Tensor) -> list[float]:
    hits = torch.zeros(len(ks), dtype=torch.float64)
    counted = 0
    pairs = pairs[torch.argsort(pairs[:, 0], stable=True)]
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ gallery.T
        # Equal texts should tie for a query, but a matrix product may round their columns differently.
        scores = (scores.double() * 2**20).round().nan_to_num_(nan=-torch.inf)  # NaN ranks last
        begin, last = torch.searchsorted(pairs[:, 0].contiguous(), torch.tensor([start, start + CHUNK]).to(pairs))
        is_pair = torch.zeros_like(scores, dtype=torch.bool)
        is_pair[pairs[begin:last, 0] - start, pairs[begin:last, 1]] = True
        has = is_pair.any(1)
        scores, is_pair = scores[has], is_pair[has]
        best = scores.masked_fill(~is_pair, -torch.inf).amax(1, keepdim=True)
        ahead = (scores > best).sum(1)
        level = scores == best
        tied, right = level.sum(1), (level & is_pair).sum(1)
        for i, k in enumerate(ks):
            hits[i] += float(_among(k - ahead, tied, right).sum())
        counted += int(has.sum())
    return (hits / max(counted, 1)).tolist()


def _among(drawn: Tensor, tied: Tensor, right: Tensor) -> Tensor:
    """Return the probability that ``drawn`` of ``tied`` random candidates include a ``right`` one."""
    drawn, wrong = drawn.clamp(min=0), tied - right
    # C(wrong, drawn) / C(tied, drawn), computed with log-factorials.
    of_wrong, of_all = (
        torch.lgamma(n.double() + 1) - torch.lgamma((n - drawn).clamp(min=0).double() + 1) for n in (wrong, tied)
    )
    missed = (of_wrong - of_all).exp()
    return torch.where(drawn == 0, 0.0, torch.where(drawn > wrong, 1.0, 1 - missed))
