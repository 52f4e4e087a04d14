"""EfficientNet-Lite0's frozen features under a linear classifier, for the row of FedCGS beside Fed-LPFM."""

from functools import cache

import torch
from torch import Tensor, nn

from fedkern.data.sources.cifar import CIFAR10_CLASSES, CIFAR10_SCALE
from fedkern.models.teachers.efficientnet_lite import NAME, SHA256, efficientnet_lite_teacher
from fedkern.models.teachers.teacher import Teacher, teacher_of
from fedkern.models.teachers.teacher_cache import LogitsCache

WIDTH = 1280


class FrozenFeatures(nn.Module):
    """Linear classifier on the features of EfficientNet-Lite0, which alone has parameters and travels.

    An image's features are computed once and kept in the user's cache folder, beside teachers' logits.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map CIFAR-10's normalised images fp32 ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
        store, extractor = _extractor()
        with torch.no_grad():
            features = store.logits(extractor, [images])
        logits: Tensor = self.head(features.to(images.device))
        return logits


@cache
def _extractor() -> tuple[LogitsCache, Teacher]:
    mean, std = CIFAR10_SCALE
    network = efficientnet_lite_teacher(CIFAR10_CLASSES, mean=mean, std=std)
    name = f"features of {NAME}"
    extractor = teacher_of(network.features, name, WIDTH, identity={"model": name, "weights": SHA256})
    return LogitsCache(None, mean, std), extractor
