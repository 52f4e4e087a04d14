"""Supervised losses (classes, several labels, segmentation, image-text pairs), and figures of a pair of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fedkern import ops
from fedkern.data.split import IGNORE
from fedkern.methods.common.retrieval import Gallery, recalls

TEMPERATURE = 0.07
"""Fixed temperature of the similarities of unit vectors in the contrastive loss (FedDRA)."""
RECALLS = (1, 5, 10)
LOSS_BATCH = 32
"""Pairs per batch of a test loss; the contrastive loss grows with the logarithm of this number."""


def supervised_loss(model: Any, batch: Any) -> Tensor:
    """Supervised loss of a batch, a scalar: cross-entropy on labels, contrastive loss on image-text pairs.

    Where an image may have several labels (uint8 [B, L]), the loss is the mean binary cross-entropy of all labels.  The
    loss of a segmentation is the mean over the known pixels of the batch, and 0 without known pixels.  The
    contrastive loss is the sum of both directions, image to text and text to image (docs/methods/feddra.md, section 5).

    Raises:
        ValueError: a batch of pairs has ``per_sample`` set, but the contrastive loss compares the samples.
    """
    if batch.tokens is None:
        logits = model(batch.images)
        if batch.labels.dim() == 1:
            return cross_entropy(logits, batch.labels)
        if batch.labels.dim() == 2:
            return binary_cross_entropy_with_logits(logits, batch.labels.to(logits.dtype))
        return pixelwise_loss(logits, batch.labels, per_sample=batch.per_sample)
    if batch.per_sample:
        raise ValueError(
            "batch: expected labelled images where losses are per sample, given pairs, whose loss compares them"
        )
    x, y = model(batch.images, batch.tokens)
    return ops.contrastive(x, y, TEMPERATURE)


def pixelwise_loss(logits: Tensor, labels: Tensor, *, per_sample: bool = False) -> Tensor:
    """Cross-entropy of the pixels whose class is known, a scalar in nats.

    Args:
        logits: fp [B, C, H, W].
        labels: int64 [B, H, W], negative where unknown.
        per_sample: True: the mean over samples of each sample's mean (0 without known pixels), so that a sample's
            gradient does not depend on the other samples' known pixels.  False: the mean over all known pixels.
    """
    known = labels >= 0
    labels = labels.masked_fill(~known, IGNORE)
    if per_sample:
        losses = cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE).flatten(1)  # 0 where unknown
        return (losses.sum(1) / known.flatten(1).sum(1).clamp_min(1)).mean()
    # Bit-identical to cross_entropy's own mean, except that no known pixels give 0 instead of NaN.
    return cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE) / known.sum().clamp_min(1)


@torch.no_grad()
def embeddings(model: Any, data: Any) -> tuple[Tensor, Tensor]:
    """Unit embeddings, fp32 [n, D], of all images and of all texts of a test set."""
    both = [model(images, tokens) for images, tokens in data.captioned()]
    if not both:
        raise ValueError("data: expected at least one sample, given none")
    return torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])


def pair_figures(model: Any, data: Any) -> dict[str, float]:
    """Figures of a pair of encoders on a test set.

    Args:
        model: in eval mode.
        data: ``data.captioned()`` yields (images, tokens) in order; ``data.split`` has their ``texts`` and ``ids``;
            ``data.loss_batch`` is the number of pairs per batch of the loss.

    Returns:
        A dict with

        - ``i2t_r1``, ``i2t_r5``, ``i2t_r10``: recall of the right text for an image, fractions;
        - ``t2i_r1``, ``t2i_r5``, ``t2i_r10``: recall of the right image for a text, fractions;
        - ``gallery``: the number of texts to choose from;
        - ``loss``: the mean contrastive loss.
    """
    images, texts = embeddings(model, data)
    gallery = Gallery.of(data.split.ids, data.split.texts)
    found = recalls(images[gallery.images.to(images.device)], texts, RECALLS, pairs=gallery.pairs)
    loss = contrastive_among(images, texts, data.loss_batch)
    return {**found, "loss": loss, "gallery": float(len(texts))}


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


def batches_of(rows: np.ndarray, size: int) -> Sequence[np.ndarray]:
    """``rows`` in batches of exactly ``size``; an incomplete last batch is left out."""
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
