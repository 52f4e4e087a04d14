"""NICO: class/context folders of images, and the F7 and L7 protocols (docs/methods/baselines.md, 6.1).

There are seven clients.  The protocols use these contexts of every class, in sorted order:

| protocol | client i holds | out-of-distribution test |
|---|---|---|
| F7 | the i-th of the first seven contexts | all later contexts |
| L7 | the i-th of the last seven contexts | all earlier contexts |

So inside one client every class has a background of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedkern.data.images.image_files import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    ImageFiles,
    ImageReader,
    check_distinct,
    list_images,
    subfolders,
)
from fedkern.data.sources.found_files import need_root
from fedkern.data.sources.site_folders import left_out
from fedkern.data.types import Pool, Source
from fedkern.errors import UserError
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


def open_nico(
    root: str | Path | None,
    protocol: str = "F7",
    size: int = 224,
    part: str = "",
    held_out: float = 0.1,
    max_image_pixels: int = MAX_PIXELS,
) -> Source:
    """Reads a tree of ``class/context/image`` folders; images are decoded only when a split needs them.

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
        held = min(max(1, round(held_out * len(rows))), len(rows) // 3) if held_out else 0
        pools["id"] += order[:held]
        pools["validation"] += order[held : 2 * held]
        pools["train"] += order[2 * held :]
    if held_out and not pools["id"]:
        raise UserError(
            f'data set "nico": no context under {folder} has three images, so none can be held out for the '
            "in-distribution test"
        )
    files = ImageFiles(tuple(record.path for record in records), size, "nico", max_pixels=max_image_pixels)
    made = {
        name: _pool(records, np.array(sorted(rows), dtype=np.int64), groups, folder, files)
        for name, rows in pools.items()
    }
    return Source(
        classes=classes,
        train=made["train"],
        validation=made["validation"],
        tests={name: made[name] for name in ("id", "ood") if pools[name]},
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augment="nico",
        groups=CLIENTS,
        notices=tuple(left_out(folder)),
    )


def scan(folder: Path) -> tuple[tuple[str, ...], list[Record]]:
    """Lists the classes (sorted) and every image file of a tree, in sorted order."""
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
            found = list_images(folder / name / context)
            if not found:
                raise UserError(f'data set "nico": the context folder {folder / name / context} holds no image')
            records += [Record(path, label, position, len(contexts)) for path in found]
    return tuple(classes), records


def _pool(
    records: list[Record], rows: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], folder: Path, files: ImageFiles
) -> Pool:
    own = [records[row] for row in rows.tolist()]
    return Pool(
        labels=torch.tensor([record.label for record in own], dtype=torch.int64),
        ids=tuple(record.path.relative_to(folder).as_posix() for record in own),
        read=ImageReader(files, torch.from_numpy(rows)),
        groups=torch.from_numpy(groups[rows]),
    )


def _tree(root: str | Path | None, part: str) -> Path:
    """The folder whose subfolders are the classes."""
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
