"""MNIST for papers that train on all 60,000 images with pixels in [0, 1]."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedkern.data.sources.idx import open_idx
from fedkern.data.types import FederatedData


def pixel_mnist(root: str | Path | None, shares: Callable[[Tensor], list[Tensor]]) -> FederatedData:
    """Load MNIST with all training images at clients, pixels in [0, 1], without validation set.

    ``shares`` maps the labels, int64 ``[60000]``, to the rows of every client, int64.
    """
    source = open_idx("mnist", root)
    pools = [pool.take(torch.arange(len(pool))) for pool in (source.train, source.validation)]
    images, labels = torch.cat([pool.images for pool in pools]), torch.cat([pool.labels for pool in pools])
    test = source.tests[""].take(torch.arange(len(source.tests[""])))
    return FederatedData.from_arrays(
        [(images[rows], labels[rows]) for rows in shares(labels)], (test.images, test.labels), classes=source.classes,
        mean=(0.0,), std=(1.0,),
    )  # fmt: skip
