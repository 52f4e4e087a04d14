"""NICO: class/context folders of images, and the F7 and L7 protocols.

FedGID with the published settings of FedDDL's code (docs/methods/fedgid.md, 8):

    python -m fedkern.run fedgid --data examples/papers/nico.py:nico --data-root DIR --data-option protocol=F7 \\
        --detector FOLDER --model resnet18 --rounds 50 --local-epochs 10 --batch-size 64 --lr 0.01 \\
        --weight-decay 1e-5 --grad-cam 100

There are seven clients.  The protocols use these contexts of every class, in sorted order:

| protocol | client i holds | out-of-distribution test |
|---|---|---|
| F7 | the i-th of the first seven contexts | all later contexts |
| L7 | the i-th of the last seven contexts | all earlier contexts |

So inside one client every class has a background of its own.  Images are normalised by ImageNet's mean and standard
deviation, and augmented by a crop with padding 4, a flip, and a rotation of up to 15 degrees (``--augment nico``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedkern import UserError, register_data
from fedkern.data import READING, Option, Pool, Source
from fedkern.data.images.image_files import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFiles,
    ImageReader,
    check_distinct,
    list_images,
    subfolders,
)
from fedkern.data.sources.site_folders import describe_unread_files
from fedkern.data.sources.table import need_root
from fedkern.streams import stream

CLIENTS = 7
_FOLDERS = ("nico", "NICO")


@dataclass(frozen=True)
class Record:
    """One image file: path, label, position of its context in the class's sorted contexts, and their number."""

    path: Path
    label: int
    context: int
    contexts: int


@register_data("nico", clients=CLIENTS, partition="attribute")
def nico(
    root: str | Path | None = None,
    *,
    protocol: str = Option("F7", "first or last seven contexts of every class train", choices=("F7", "L7")),
    size: int = Option(224, "side in pixels to which images are resized", low=8, high=8192),
    part: str = Option("", "subfolder to use, for example Animal or Vehicle"),
    held_out: float = Option(
        0.1,
        "share of the training contexts held out as in-distribution test, and again as validation",
        low=0,
        high=0.33,
    ),
    max_image_pixels: int = READING["max_image_pixels"],
) -> Source:
    """NICO, class/context folders of photographs; clients hold their own contexts, unseen contexts test.

    Images are decoded only when a split needs them.

    Args:
        root: the tree, or a folder that holds it as ``nico`` or ``NICO``.
        size: side in pixels to which every image is resized (the whole image, without cropping).
        part: subfolder to descend into, for a download that keeps ``Animal`` and ``Vehicle`` side by side (any case).
        held_out: share of the training contexts' images that goes to the in-distribution test; as many again go to the
            validation set.  The images are the same for every seed.  0: there is no in-distribution test, and the
            validation set is empty.

    Raises:
        UserError: no such tree, a class with fewer than eight contexts, a context without images, or one image in two
            folders.
    """
    folder = _tree(root, part)
    classes, records = scan(folder)
    check_distinct("nico", [one.path for one in records], [one.path.relative_to(folder).as_posix() for one in records])
    test_range = range(CLIENTS, 10**9) if protocol == "F7" else None
    pools: dict[str, list[int]] = {"train": [], "validation": [], "id": [], "ood": []}
    groups = np.full(len(records), -1, dtype=np.int64)
    by_context: dict[tuple[int, int], list[int]] = {}
    for row, record in enumerate(records):
        first = 0 if test_range is not None else record.contexts - CLIENTS
        client = record.context - first
        if 0 <= client < CLIENTS:
            groups[row] = client
            by_context.setdefault((record.label, record.context), []).append(row)
        else:
            pools["ood"].append(row)
    for (label, context), rows in by_context.items():
        rng = stream(0, f"split/nico/{label}/{context}")
        order = [rows[i] for i in rng.permutation(len(rows))]
        # At most a third of a small context is held out, so that its client keeps training images.
        count = min(max(1, round(held_out * len(rows))), len(rows) // 3) if held_out else 0
        pools["id"] += order[:count]
        pools["validation"] += order[count : 2 * count]
        pools["train"] += order[2 * count :]
    if held_out and not pools["id"]:
        raise UserError(
            f'data set "nico": no context under {folder} has three images, so none can be held out for the '
            "in-distribution test"
        )
    files = ImageFiles(tuple(record.path for record in records), size, "nico", max_pixels=max_image_pixels)
    sets = {
        name: _pool(records, np.array(sorted(rows), dtype=np.int64), groups, folder, files)
        for name, rows in pools.items()
    }
    return Source(
        classes=classes,
        train=sets["train"],
        validation=sets["validation"],
        tests={name: sets[name] for name in ("id", "ood") if pools[name]},
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augment="nico",
        groups=CLIENTS,
        notices=tuple(describe_unread_files(folder)),
    )


def scan(folder: Path) -> tuple[tuple[str, ...], list[Record]]:
    """List the classes (sorted) and every image file of a tree, in sorted order."""
    classes = subfolders(folder)
    if len(classes) < 2:
        raise UserError(
            f'data set "nico": expected folders class/context/image under {folder}, found {len(classes)} classes'
        )
    records: list[Record] = []
    for label, name in enumerate(classes):
        contexts = subfolders(folder / name)
        if len(contexts) <= CLIENTS:
            raise UserError(
                f'data set "nico": class folder {folder / name} has {len(contexts)} contexts, expected at least '
                f"{CLIENTS + 1} (seven for the clients, the rest for the out-of-distribution test)"
            )
        for position, context in enumerate(contexts):
            images = list_images(folder / name / context)
            if not images:
                raise UserError(f'data set "nico": the context folder {folder / name / context} holds no image')
            records += [Record(path, label, position, len(contexts)) for path in images]
    return tuple(classes), records


def _pool(
    records: list[Record], rows: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], folder: Path, files: ImageFiles
) -> Pool:
    images = [records[row] for row in rows.tolist()]
    return Pool(
        labels=torch.tensor([record.label for record in images], dtype=torch.int64),
        ids=tuple(record.path.relative_to(folder).as_posix() for record in images),
        read=ImageReader(files, torch.from_numpy(rows)),
        groups=torch.from_numpy(groups[rows]),
    )


def _tree(root: str | Path | None, part: str) -> Path:
    """Return the folder whose subfolders are the classes."""
    base = need_root(root, "nico", "class/context/image.jpg")
    for candidate in (*(base / name for name in _FOLDERS), base):
        if not candidate.is_dir():
            continue
        if not part:
            return candidate
        for name in subfolders(candidate):
            if name.lower() in (part.lower(), f"nico-{part}".lower(), f"nico_{part}".lower()):
                return candidate / name
    if part:
        raise UserError(f'data set "nico": no folder "{part}" under {base} (option part)')
    raise UserError(f'data set "nico": {base} holds no class folders')
