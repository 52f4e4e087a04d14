"""Retrieval: the right text of an image, and the right image of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkern import models, ops
from fedkern.models.vocabulary import split_words
from fedkern.tasks.base import Task
from fedkern.tasks.retrieval_figures import Gallery, recalls

TEMPERATURE = 0.07
"""Fixed temperature of the similarities of unit vectors in the contrastive loss (FedDRA)."""
RECALLS = (1, 5, 10)
LOSS_BATCH = 32
"""Pairs per batch of a test loss; the contrastive loss grows with the logarithm of this number."""


class Retrieval(Task):
    """Image-text pairs; a network is a pair of encoders, and the targets of a batch are the tokens of its texts."""

    name, main = "retrieval", "i2t_r1"
    target, network, pictures = "text", "pairs", ("retrieval",)
    offers = frozenset({"loss", "pairs", "images"})

    def loss(self, model: Any, batch: Any) -> Tensor:
        """Contrastive loss, the sum of both directions (docs/methods/feddra.md, section 5).

        Raises:
            ValueError: a batch has ``per_sample`` set, but the loss compares the samples.
        """
        if batch.per_sample:
            raise ValueError(
                "batch: expected labelled images where losses are per sample, given pairs, whose loss compares them"
            )
        x, y = model(batch.inputs, batch.targets)
        return ops.contrastive(x, y, TEMPERATURE)

    @torch.no_grad()
    def figures(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Figures of a pair of encoders.

        Args:
            data: ``data.split`` has the ``texts`` and ``ids``; ``data.loss_batch`` is the number of pairs per batch of
                the loss.

        Returns:
            A dict with

            - ``i2t_r1``, ``i2t_r5``, ``i2t_r10``: recall of the right text for an image, fractions;
            - ``t2i_r1``, ``t2i_r5``, ``t2i_r10``: recall of the right image for a text, fractions;
            - ``gallery``: the number of texts to choose from;
            - ``loss``: the mean contrastive loss.
        """
        both = [model(batch.inputs, batch.targets) for batch in data.batches(even=True)]
        if not both:
            raise ValueError("data: expected at least one sample, given none")
        images, texts = torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])
        gallery = Gallery.of(data.split.ids, data.split.texts)
        found = recalls(images[gallery.images.to(images.device)], texts, RECALLS, pairs=gallery.pairs)
        loss = contrastive_among(images, texts, data.loss_batch)
        return {**found, "loss": loss, "gallery": float(len(texts))}

    def comparable(self, sizes: Sequence[int]) -> tuple[str, ...]:
        return ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5") if len(set(sizes)) == 1 else ()  # of equally many candidates

    def chance(self, data: Any, classes: int, *, candidates: float = 0.0, **known: Any) -> float | None:
        return 1 / candidates if candidates else None

    def places(self, classes: Sequence[str], known: Sequence[str]) -> Sequence[int] | None:
        return range(len(classes))  # nothing is learnt of the classes

    def relabelled(self, labels: Tensor, places: Sequence[int], classes: int) -> Tensor:
        return labels

    def shown_classes(self, labels: Tensor) -> Tensor:
        return labels[:0]

    def described(self, context: Any) -> dict[str, Any]:
        """``pair``, the arguments of ``build_pair``; a vocabulary is learnt from the clients' texts."""
        data, config = context.data, context.config
        channels, *size = data.image_shape
        texts = (text for split in data.clients for text in split.texts or ())
        kind = config.text_encoder
        words = models.learn_vocabulary(texts, kind).tokens if kind in models.TEXT_ENCODERS else None
        return {
            "pair": {
                "image_encoder": config.image_encoder,
                "text_encoder": kind,
                "channels": channels,
                "image_size": size,
                "mean": list(data.mean),
                "std": list(data.std),
                "vocabulary": None if words is None else list(words),
                "width": config.width,
            }
        }

    def build(self, about: Mapping[str, Any], seed: Any) -> nn.Module:
        return models.build_pair(**about["pair"], seed=seed) if "pair" in about else super().build(about, seed)

    def network_name(self, config: Any) -> str:
        return f"{config.image_encoder}+{config.text_encoder}"

    def vocabulary_messages(self, context: Any) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
        words = context.described["pair"]["vocabulary"]
        if words is None:
            return None
        counts = [Counter(word for text in split.texts for word in split_words(text)) for split in context.data.clients]
        return [{"words": list(c), "counts": list(c.values())} for c in counts], {"words": words}

    def tokens(self, split: Any, tokenise: Callable[[], Callable[..., Any]]) -> Any:
        return tokenise()(split.texts)

    def targets(self, labels: Tensor, tokens: Any, rows: Tensor) -> Any:
        # All tokens stay on the CPU: the length of a batch's longest text is read from them, which nobody waits for.
        return tokens.take(rows).to(labels.device)


RETRIEVAL = Retrieval()


def contrastive_among(images: Tensor, texts: Tensor, size: int) -> float:
    """Mean contrastive loss of unit vectors [n, D] in batches of exactly min(``size``, n) pairs.

    A batch holds every (n // size)-th pair, so that neighbouring pairs, which may be similar, are not each other's
    negatives.  Leftover pairs are excluded, because the loss of a smaller batch is smaller.
    """
    n = len(images)
    count = max(1, n // size)
    rows = [torch.arange(start, start + count * min(size, n), count) for start in range(count)]
    losses = [ops.contrastive(images[r.to(images.device)], texts[r.to(texts.device)], TEMPERATURE) for r in rows]
    return float(torch.stack(losses).double().mean())
