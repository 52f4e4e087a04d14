"""EfficientNet-Lite0's frozen maps under a linear classifier, for the rows of FedCGS beside Fed-LPFM."""

from functools import cache

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fedkern.data.sources.cifar import CIFAR10_CLASSES, CIFAR10_SCALE
from fedkern.models.teachers.efficientnet_lite import NAME, SHA256, efficientnet_lite_teacher
from fedkern.models.teachers.teacher import Teacher, teacher_of
from fedkern.models.teachers.teacher_cache import LogitsCache


class FrozenFeatures(nn.Module):
    """Linear classifier on the features of EfficientNet-Lite0, which alone has parameters and travels.

    An image's features are computed once and kept in the user's cache folder, beside teachers' logits.

    Args:
        classes: number of classes.
    """

    stage, grid, width = "layer7", 1, 1280

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(self.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map CIFAR-10's normalised images fp32 ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
        store, extractor = make_extractor(self.stage, self.grid, self.width)
        return self.head(store.logits(extractor, [images]).to(images.device))


class EarlyFeatures(FrozenFeatures):
    """The same on maps of the first three stages, averaged over a 4x4 grid."""

    stage, grid, width = "layer3", 4, 640


@cache
def make_extractor(stage: str, grid: int, width: int) -> tuple[LogitsCache, Teacher]:
    """Return a store of features, and what computes them: maps after ``stage``, averaged over a grid."""
    mean, std = CIFAR10_SCALE
    teacher, name = efficientnet_lite_teacher(CIFAR10_CLASSES, mean=mean, std=std), f"{stage} of {NAME}"

    def extract(images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(teacher.network.maps(images, stage), grid).flatten(1)

    identity = {"model": name, "grid": grid, "weights": SHA256}
    return LogitsCache(None, mean, std), teacher_of(extract, name, width, identity=identity)
