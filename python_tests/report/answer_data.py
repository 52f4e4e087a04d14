"""Data for a network's answers, without a run."""

from types import SimpleNamespace

from torch import Tensor

from fedkern.data import Split
from fedkern.data.forms import ImageForm


def data_of(images: Tensor, labels: Tensor, classes, sets=("",), **more) -> SimpleNamespace:
    """Return test sets of the same uint8 images ``[n, C, H, W]``, which a network gets scaled to 0 to 1."""
    channels = images.shape[1]
    form = ImageForm(tuple(images.shape[1:]), (0.0,) * channels, (1.0,) * channels)
    return SimpleNamespace(tests=dict.fromkeys(sets, Split(images, labels, **more)), form=form, classes=classes)
