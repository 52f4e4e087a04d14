"""Tiny-ImageNet from its official folders: 200 classes of 500 training images of 64x64 pixels.

FuseFL's authors augment by a flip and a rotation of up to 20 degrees, as this file does.  FedAvg with ResNet-18:

    python -m fedkern.run fedavg --data examples/papers/tinyimagenet.py:tinyimagenet --data-root DIR \\
        --model resnet18 --rounds 100 --batch-size 64 --weight-decay 5e-4

and FuseFL, whose defaults are those of its study otherwise:

    python -m fedkern.run fusefl --data examples/papers/tinyimagenet.py:tinyimagenet --data-root DIR \\
        --batch-size 64 --weight-decay 5e-4
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from fedkern import UserError, register_data
from fedkern.data import READING, Listing, Reading, Source, to_source
from fedkern.data.images.image_files import list_images
from fedkern.data.sources.site_folders import describe_unread_files
from fedkern.data.sources.table import find_folder, read_file
from fedkern.files.filesystem import describe_file_kind

SIDE = 64
_FOLDERS = ("tiny-imagenet-200", "tinyimagenet", "tiny-imagenet")


@register_data("tinyimagenet", clients=10, partition="dirichlet:0.5")
def tinyimagenet(root: str | Path | None = None, *, max_image_pixels: int = READING["max_image_pixels"]) -> Source:
    """Tiny-ImageNet, 110,000 photographs of 200 classes, 64 pixels (official folders).

    They lie in ``root`` or ``root/tiny-imagenet-200``; images are decoded when a split needs them.

    The official validation images are the test set (the official test set has no labels); a tenth of the training
    images is the validation set.

    Args:
        root: the data set's folder, or the folder above.

    Raises:
        UserError: a missing folder or file, or an annotation that names an unknown class or a missing image.
    """
    folder = find_folder(root, "tinyimagenet", _FOLDERS, ("wnids.txt",))
    wnids = _lines(folder / "wnids.txt")
    if len(wnids) < 2 or len(set(wnids)) != len(wnids):
        raise UserError(f'data set "tinyimagenet": {folder / "wnids.txt"} does not list two or more different classes')
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    paths: list[Path] = []
    labels: list[int] = []
    for wnid, label in label_of.items():
        class_folder = folder / "train" / wnid / "images"
        images = list_images(class_folder) if class_folder.is_dir() else []
        if not images:
            raise UserError(f'data set "tinyimagenet": the class folder {class_folder} is missing or holds no image')
        paths += images
        labels += [label] * len(images)
    trained = len(paths)
    annotations = folder / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(annotations), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        path = folder / "val" / "images" / name
        if wnid not in label_of:
            raise UserError(f'data set "tinyimagenet": {annotations}, line {number}, names no class of wnids.txt')
        if what := describe_file_kind(path):
            raise UserError(f'data set "tinyimagenet": the image {path} of {annotations}, line {number}, is {what}')
        paths.append(path)
        labels.append(label_of[wnid])
    if len(paths) == trained:
        raise UserError(f'data set "tinyimagenet": {annotations} lists no image; fetch the data set again')
    listing = Listing(
        paths=paths,
        ids=tuple(path.relative_to(folder).as_posix() for path in paths),
        labels=np.array(labels, dtype=np.int64),
        splits=["train"] * trained + ["test"] * (len(paths) - trained),
        clients=[""] * len(paths),
        notices=describe_unread_files(folder),
    )
    reading = Reading(SIDE, "rgb", test_share=0.0, validation_share=0.1, max_image_pixels=max_image_pixels)
    source = to_source("tinyimagenet", listing, _names(folder, wnids), reading)
    return dataclasses.replace(
        source, mean=(0.4802, 0.4481, 0.3975), std=(0.2770, 0.2691, 0.2821), augment="flip-rotate", compared=False
    )


def _names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the first name of each class in words.txt, followed by the class id where two classes share the name."""
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
    names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    return tuple(f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in zip(names, wnids, strict=True))


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_file(path, 'data set "tinyimagenet"').splitlines() if line.strip()]
