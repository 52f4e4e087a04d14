"""CIFAR-10 and CIFAR-100 (the official "binary version", not the pickled one), and SVHN (MATLAB files)."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkern.data.forms import Scale
from fedkern.data.sources.listing import interleave_classes
from fedkern.data.sources.table import find_folder, read_bytes
from fedkern.data.types import Labelled, Source, memory_source
from fedkern.errors import UserError

SIDE = 32
MAX_IMAGES = 1_000_000  # in a file


def read_mat(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read ``X`` uint8 ``[32, 32, 3, n]`` and ``y`` ``[n, 1]``, in which 10 is the digit 0.

    Returns images uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n]``, 0 to 9.
    """
    from scipy.io import loadmat, whosmat  # slow to import, so only when needed

    raw, path = read_bytes(folder, name, "svhn", lambda head, path: 2 * MAX_IMAGES * 3 * SIDE * SIDE)
    try:
        # Check the announced size before anything is decompressed.
        announced = {variable: shape for variable, shape, _ in whosmat(io.BytesIO(raw)) if variable in ("X", "y")}
        if any(math.prod(int(side) for side in shape) > MAX_IMAGES * 3 * SIDE * SIDE for shape in announced.values()):
            raise ValueError(f"it announces more than {MAX_IMAGES:,} images")
        content = loadmat(io.BytesIO(raw), variable_names=("X", "y"))
        pixels, labels = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    except MemoryError:
        raise
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(
            f'data set "svhn": {path} is damaged or not the official MATLAB file with X and y ({error}); fetch it again'
        ) from None
    if pixels.dtype != np.uint8 or pixels.shape != (SIDE, SIDE, 3, len(labels)) or len(labels) == 0:
        raise UserError(
            f'data set "svhn": {path} holds X of {pixels.dtype} {list(pixels.shape)} and {len(labels)} labels, '
            f"expected uint8 [{SIDE}, {SIDE}, 3, n] and n labels"
        )
    if labels.dtype.kind not in "uif":
        raise UserError(f'data set "svhn": {path} holds labels of {labels.dtype}, expected whole numbers from 1 to 10')
    for label in labels[~((labels >= 0) & (labels <= 10) & (labels == np.rint(labels)))]:  # NaN fails all of these
        raise UserError(f'data set "svhn": {path} holds the label {label:g}, expected a whole number from 1 to 10')
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(labels.astype(np.int64) % 10)


def open_svhn(root: str | Path | None) -> Source:
    """Read SVHN from ``root``, ``root/svhn`` or ``root/SVHN``."""
    files = "train_32x32.mat", "test_32x32.mat"
    folder = find_folder(root, "svhn", ("svhn", "SVHN"), files)
    train, test = (read_mat(folder, name) for name in files)
    order = interleave_classes(train[1].numpy(), "split/svhn")
    classes, held_out = tuple(str(digit) for digit in range(10)), max(1, len(order) // VALIDATION_SHARE)
    scale = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    # Not augmented: a flipped or shifted house number may be another number.
    return memory_source("svhn", train, test, held_out, classes, scale, order=order)


PIXELS = 3 * 32 * 32
VALIDATION_SHARE = 10
MOST_RECORDS = 1_000_000  # limit for a compressed file, as no header states the number

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_COARSE = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2
"""
CIFAR100_CLASSES = tuple(_FINE.split())
CIFAR100_COARSE_CLASSES = tuple(_COARSE.split())


def read_records(folder: Path, name: str, data: str, label_counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Read records of ``len(label_counts)`` label bytes and 3,072 pixel bytes.

    Returns images uint8 ``[n, 3, 32, 32]`` and labels int64 ``[n, len(label_counts)]``.
    """
    record = len(label_counts) + PIXELS
    raw, path = read_bytes(folder, name, data, lambda head, path: MOST_RECORDS * record)
    if len(raw) == 0 or len(raw) % record:
        raise UserError(
            f'data set "{data}": {path} holds {len(raw)} bytes, expected a whole number of records of {record} bytes '
            f"(the official file has 10,000 or 50,000 of them)"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    labels = records[:, : len(label_counts)].astype(np.int64)
    for column, count in enumerate(label_counts):
        if labels[:, column].max() >= count:
            raise UserError(
                f'data set "{data}": {path} holds label {labels[:, column].max()}, expected 0 to {count - 1}; the file '
                "is damaged or belongs to another data set"
            )
    images = torch.from_numpy(records[:, len(label_counts) :].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels)


CIFAR10_SCALE: Scale = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_SCALE: Scale = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""Mean and standard deviation per channel."""


def open_cifar10(root: str | Path | None) -> Source:
    """Read CIFAR-10 from ``root``, ``root/cifar10`` or ``root/cifar-10-batches-bin``."""
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = find_folder(root, "cifar10", ("cifar-10-batches-bin", "cifar10", "CIFAR10"), [*batches, "test_batch.bin"])
    parts = [read_records(folder, name, "cifar10", (10,)) for name in batches]
    train = torch.cat([images for images, _ in parts]), torch.cat([labels[:, 0] for _, labels in parts])
    test_images, test_labels = read_records(folder, "test_batch.bin", "cifar10", (10,))
    return _source("cifar10", train, (test_images, test_labels[:, 0]), CIFAR10_CLASSES, CIFAR10_SCALE)


def open_cifar100(root: str | Path | None, labels: str = "fine") -> Source:
    """Read CIFAR-100 from ``root``, ``root/cifar100`` or ``root/cifar-100-binary``."""
    folder = find_folder(root, "cifar100", ("cifar-100-binary", "cifar100", "CIFAR100"), ["train.bin", "test.bin"])
    column, classes = (1, CIFAR100_CLASSES) if labels == "fine" else (0, CIFAR100_COARSE_CLASSES)
    files = (read_records(folder, name, "cifar100", (20, 100)) for name in ("train.bin", "test.bin"))
    train, test = ((images, labels[:, column].contiguous()) for images, labels in files)
    return _source("cifar100", train, test, classes, CIFAR100_SCALE)


def _source(data: str, train: Labelled, test: Labelled, classes: tuple[str, ...], scale: Scale) -> Source:
    held_out = max(1, len(train[1]) // VALIDATION_SHARE)
    return memory_source(data, train, test, held_out, classes, scale, augment="crop-flip")
