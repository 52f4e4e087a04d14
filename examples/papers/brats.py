"""BraTS and data sets with the same layout: NIfTI volumes, one folder per case, cut into axial slices.

A case folder holds a file for every modality and a mask file with the class of every voxel, such as ``NAME_t1.nii.gz``,
``NAME_flair.nii.gz`` and ``NAME_seg.nii.gz``.  Volumes are first turned to the closest canonical orientation (right,
anterior, superior), so that slices are axial however the volume was stored.  They are read with nibabel, the
extra ``medical``.

A U-Net by FedAvg:

    python -m fedkern.run fedavg --data examples/papers/brats.py:brats --data-root DIR --model unet --rounds 50 \\
        --batch-size 16 --optimizer adamw --lr 0.001

FedIOD, whose setup on BraTS is not published, with the settings of its study on other masks (docs/methods/fediod.md):

    python -m fedkern.run fediod --data examples/papers/brats.py:brats --data-root DIR --model unet --width 8 \\
        --rounds 75 --local-epochs 30 --batch-size 16 --optimizer adamw --lr 0.001 --weight-decay 3e-4 \\
        --method-option iterations=4 --method-option batch=16 --method-option student_steps=4 \\
        --method-option generator_lr=2e-3 --method-option critic_lr=1e-3 --method-option critic_layers=2 \\
        --method-option warmup=0.25 --method-option w_balance=1 --method-option disc_weight=true \\
        --method-option student_optimizer=adamw --method-option student_lr=3e-3
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import UserError, register_data
from fedkern.data import READING, Listing, Option, Pool, Reading, Source
from fedkern.data.images.full_masks import FullMasks, MaskStore
from fedkern.data.images.image_files import MAX_PIXELS, is_hidden, run_in_threads, subfolders
from fedkern.data.labels.spelling import SHOWN, sort_names
from fedkern.data.sources.listing import SPLITS, split_rows
from fedkern.data.sources.site_folders import describe_unread_files
from fedkern.data.sources.table import gunzip, need_root
from fedkern.errors import first_of
from fedkern.files.filesystem import open_regular, real_file
from fedkern.process.extras import import_extra
from fedkern.tasks.segmentation import largest_classes

PARTS = {"necrotic core": (1,), "oedema": (2,), "enhancing tumour": (4, 3)}
"""Classes of BraTS and the voxel values that its releases store for each."""

HEADER = 540  # bytes of a NIfTI-2 header, the longer of the two
SHIFT = 0.1  # of a voxel: what rounding the two forms of an affine in a header may come to
PERCENTILES = 0.5, 99.5  # of a volume's non-zero voxels; intensities outside are clipped
MEAN, STD = 0.3, 0.25  # low, because brain and bright tissue fill a small part of a slice


@dataclass(frozen=True)
class Case:
    """One case folder: the files of its modalities, in order, and its mask file."""

    name: str
    split: str
    site: str
    volumes: tuple[Path, ...]
    mask: Path


@dataclass(frozen=True)
class Grid:
    """Voxels of a file: their count along every axis, right, anterior, superior, and where they lie in space."""

    path: Path
    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]

    def check(self, other: Grid) -> None:
        """Raise UserError where the voxels of another file of the case are not these."""
        if other.shape != self.shape:
            raise UserError(f'data set "brats": {other.path} has another shape than {self.path}')
        corners = np.stack([*np.meshgrid(*((0, side - 1) for side in self.shape), indexing="ij"), np.ones((2, 2, 2))])
        apart = np.linalg.norm(np.tensordot((other.affine - self.affine)[:3], corners, 1), axis=0).max()
        if not apart <= SHIFT * np.linalg.norm(self.affine[:3, :3], axis=0).min():  # nor where it is not finite
            raise UserError(
                f'data set "brats": the affine of {other.path} puts its voxels up to {apart:.3g} mm away from those of '
                f"{self.path}; resample one to the other, or mend the header that is wrong"
            )


@register_data("brats", clients=10, partition="iid", task="segmentation")
def brats(
    root: str | Path | None = None,
    *,
    size: int = Option(128, "side in pixels to which slices are resized", low=8, high=8192),
    modalities: str = Option("t1,t1ce,t2,flair", "the channels, as the names of their files end"),
    target: str = Option("seg", "how the names of the files of classes end"),
    labels: str = Option("whole", "whole (one object), parts (BraTS's three), or stored values such as 1|2|4"),
    slices: str = Option(
        "object", "axial slices that hold an object, any tissue, or all", choices=("object", "tissue", "all")
    ),
    every: int = Option(1, "keep one slice in so many", low=1),
    test_share: float = Option(0.2, "share of the cases held out as test set where there is none", low=0, high=0.9),
    validation_share: float = Option(
        0.1, "share of the training cases held out as validation set where there is none", low=0, high=0.9
    ),
    max_image_pixels: int = READING["max_image_pixels"],
) -> Source:
    """Tumour segmentation in NIfTI volumes, a folder for every case as in BraTS; clients hold whole cases.

    Masks are read at once, volumes when a split needs them.  Cases are held out, and shared out among clients, as a
    whole.  Where cases lie in several folders (HGG and LGG, or one folder for every hospital), these folders are the
    clients of the partition ``attribute``.

    Args:
        root: holds the case folders, at any depth; ``train``, ``val`` and ``test`` at the top are the splits.
        size: side in pixels of the slices, which are padded to squares before they are resized.
        labels: ``whole`` (any value above 0 is the object), ``parts`` (the three classes of BraTS), or the values that
            are classes, such as ``1|2|5``; all other values are then background.

    Intensities are mapped to bytes volume by volume, from the 0.5th to the 99.5th percentile of the non-zero voxels.
    Voxels of value 0 stay 0.

    Raises:
        UserError: nibabel is missing; there is no case or no slice; a folder or volume is found twice; or a file is
            missing, damaged, of another shape or at another place in space.
    """
    _nibabel()
    base = need_root(root, "brats", "CASE/CASE_flair.nii.gz")
    channels = tuple(name.strip() for name in modalities.split(",") if name.strip())
    if not channels or len(set(channels)) < len(channels):
        raise UserError(f'data set "brats": modalities must be different names between commas, not "{modalities}"')
    cases = find_cases(base, channels, target)
    values = read_labels(labels)
    voxels: dict[int, npt.NDArray[np.uint8]] = {}
    grids: dict[int, Grid] = {}

    def read(i: int) -> None:
        voxels[i], grids[i] = classes_of(cases[i].mask, list(values.values()), max_image_pixels)

    run_in_threads(read, len(cases))
    rows = [
        (i, z)
        for i, case in enumerate(cases)
        for z in kept_slices(case, voxels[i], grids[i], slices, every, max_image_pixels)
    ]
    if not rows:
        raise UserError(f'data set "brats": no slice under {base} holds any class; take slices=all or other labels')
    where = np.array(rows, dtype=np.int64)
    targets = torch.stack([square(torch.from_numpy(voxels[i][z].copy()), size, smooth=False) for i, z in rows])
    full = MaskStore(_unread, size, square=True)
    for row, (i, z) in enumerate(rows):
        full.pack(row, voxels[i][z])
    pools = _pools(cases, grids, where, targets, full, (test_share, validation_share), max_image_pixels)
    sites = sort_names(case.site for case in cases)
    return Source(
        classes=("background", *values),
        train=pools["train"],
        validation=pools["validation"],
        tests={"": pools["test"]},
        mean=(MEAN,) * len(channels),
        std=(STD,) * len(channels),
        augment="none",
        groups=len(sites) if len(sites) > 1 else None,
        sites=tuple(site or "." for site in sites) if len(sites) > 1 else (),
        drawn_validation=not {"test", "validation"} <= {case.split for case in cases},
        notices=tuple(describe_unread_files(base)),
    )


def find_cases(base: Path, modalities: Sequence[str], mask: str) -> list[Case]:
    """Return the case folders under ``base``, in order of name: all folders with a file of at least one of the names.

    Raises:
        UserError: there is no case folder, a case lacks one of its files, some cases are in folders of splits and
            others are not, or links give two names to one folder or to the volume of a case.
    """
    cases: list[Case] = []
    owners: dict[object, Path] = {}

    def once(path: Path, what: str, owner: Path) -> None:
        other = owners.setdefault(real_file(path), owner)
        if other != owner:
            raise UserError(
                f'data set "brats": {other} and {owner} {what} {path.resolve()}, so that its cases would be there '
                "twice: remove the link that makes it two."
            )

    def look(folder: Path) -> None:
        once(folder, "are one folder,", folder)
        files = {name: ending(folder, name) for name in (*modalities, mask)}
        if any(files.values()):
            missing = [name for name, path in files.items() if path is None]
            if missing:
                raise UserError(
                    f'data set "brats": the case {folder} has no file *{missing[0]}.nii or *{missing[0]}.nii.gz'
                )
            above = folder.relative_to(base).parts[:-1]
            split = SPLITS.get(above[0].lower(), "") if above else ""
            site = "/".join(above[1:] if split else above)
            paths = [path for path in files.values() if path is not None]
            for path in paths[:-1]:
                once(path, "have one volume,", folder)
            name = folder.relative_to(base).as_posix()
            cases.append(Case(name, split, site, tuple(paths[:-1]), paths[-1]))
            return
        for name in subfolders(folder):
            look(folder / name)

    look(base)
    if not cases:
        raise UserError(
            f'data set "brats": found no folder with files *{mask}.nii.gz under {base}; name their endings with '
            "--data-option modalities=... and target=..."
        )
    apart = [case.name for case in cases if not case.split]
    if len(apart) < len(cases) and apart:
        raise UserError(
            f'data set "brats": {base} has folders of splits and cases outside of them, {first_of(apart, SHOWN)}: put '
            "every case into train, val or test, or no case"
        )
    return cases


def ending(folder: Path, name: str) -> Path | None:
    """Return the NIfTI file in ``folder`` that is called ``name``, or whose name ends in ``_name`` or ``-name``."""
    for path in sorted(folder.iterdir()):
        for suffix in (".nii.gz", ".nii"):
            if path.name.endswith(suffix) and not is_hidden(path.name) and path.is_file():
                stem = path.name.removesuffix(suffix)
                if stem == name or stem.endswith(("_" + name, "-" + name)):
                    return path
    return None


def read_labels(text: str) -> dict[str, tuple[int, ...]]:
    """Return the classes after the background and the stored values of each.

    An empty tuple stands for all values above 0.
    """
    if text == "whole":
        return {"object": ()}
    if text == "parts":
        return dict(PARTS)
    words = [word.strip() for word in text.split("|")]
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(set(words)) < len(words):
        raise UserError(
            f'data set "brats": labels must be whole, parts, or different values between |, such as 1|2|4, not "{text}"'
        )
    return {word: (int(word),) for word in words}


def read_volume(path: Path, max_voxels: int = MAX_PIXELS) -> tuple[npt.NDArray[np.float32], Grid]:
    """Return a volume's values fp32 ``[Z, Y, X]``: axial slices from below, each with the front on top; and its grid.

    Raises:
        UserError: the file cannot be read, does not have three dimensions, has more than ``max_voxels`` voxels or none,
            has bytes behind the last voxel, or holds a value that is not finite.
    """
    nib = _nibabel()

    def due(head: bytes) -> int:
        header = _kind(nib, head).header_class(head[: _kind(nib, head).header_class.sizeof_hdr], check=False)
        shape = [int(side) for side in header.get_data_shape()]
        voxels = math.prod(shape)
        if min(shape, default=0) < 1:
            raise UserError(
                f'data set "brats": the volume {path} has a dimension of {min(shape, default=0)}; replace or remove it'
            )
        if voxels > max_voxels:
            raise UserError(
                f'data set "brats": the volume {path} has {"x".join(map(str, shape))} voxels, more than '
                f"{max_voxels:,}: make it smaller or, where it is to be trusted, give --max-image-pixels {voxels}"
            )
        return int(header.get_data_offset()) + voxels * int(header.get_data_dtype().itemsize)

    try:
        with open_regular(path) as file:
            raw = gunzip(file, due, HEADER) if path.suffix == ".gz" else file.read()
        if len(raw) > due(raw[:HEADER]):
            raise ValueError(f"{len(raw) - due(raw[:HEADER])} bytes stand behind its last voxel")
        image = nib.as_closest_canonical(_kind(nib, raw).from_bytes(raw))
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # nibabel and what it calls raise many kinds for a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f'data set "brats": cannot read the volume {path} ({reason}); replace or remove it') from error
    values = values.reshape(values.shape[:3]) if values.ndim > 3 and set(values.shape[3:]) == {1} else values
    if values.ndim != 3:
        raise UserError(f'data set "brats": the volume {path} has {values.ndim} dimensions, expected three')
    if not np.isfinite(values).all():
        raise UserError(f'data set "brats": the volume {path} holds values that are no finite numbers')
    return np.ascontiguousarray(values.transpose(2, 1, 0)[:, ::-1]), Grid(path, values.shape, image.affine)


def _kind(nib: Any, head: bytes) -> Any:
    """NIfTI-2 if the file begins with the length of the NIfTI-2 header, in either byte order; else NIfTI-1."""
    return nib.Nifti2Image if HEADER in (int.from_bytes(head[:4], o) for o in ("little", "big")) else nib.Nifti1Image


def classes_of(
    path: Path, values: Sequence[tuple[int, ...]], max_voxels: int = MAX_PIXELS
) -> tuple[npt.NDArray[np.uint8], Grid]:
    """Return the class of every voxel of a mask file, uint8 ``[Z, Y, X]``, and the file's grid."""
    stored, grid = read_volume(path, max_voxels)
    if (stored != np.rint(stored)).any() or stored.min() < 0:
        raise UserError(f'data set "brats": the mask {path} holds values that are no class numbers')
    classes = np.zeros(stored.shape, dtype=np.uint8)
    for number, meant in enumerate(values, 1):
        classes[np.isin(stored, meant) if meant else stored > 0] = number
    return classes, grid


def _unread(row: int) -> npt.NDArray[np.int16]:
    raise AssertionError(row)  # all slices are in memory


def kept_slices(
    case: Case, classes: npt.NDArray[np.uint8], grid: Grid, slices: str, every: int, max_voxels: int = MAX_PIXELS
) -> list[int]:
    """Return the slices of a case that become images; ``grid`` is that of the mask."""
    if slices == "all":
        there = np.ones(len(classes), dtype=bool)
    elif slices == "tissue":
        values, other = read_volume(case.volumes[0], max_voxels)
        grid.check(other)
        there = np.asarray((values != 0).any((1, 2)))
    else:
        there = np.asarray(classes.any((1, 2)))
    return [int(z) for z in np.flatnonzero(there)[::every]]


def to_bytes(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Map intensities to 1 to 255 between two percentiles of the non-zero values; 0 stays 0."""
    tissue = values != 0
    if not tissue.any():
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = np.percentile(values[tissue], PERCENTILES)
    scaled = 1 + np.rint(254 * np.clip((values - low) / max(high - low, 1e-12), 0, 1))
    return np.where(tissue, scaled, 0).astype(np.uint8)


def square(image: Tensor, size: int, *, smooth: bool) -> Tensor:
    """Pad bytes ``[..., H, W]`` with 0 to a square and resizes to ``size``: bilinear if ``smooth``, else nearest."""
    height, width = image.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = F.pad(image, (left, side - width - left, top, side - height - top))
    if side == size:
        return padded
    flat = padded.reshape(1, -1, side, side).float()
    if smooth:
        resized = F.interpolate(flat, (size, size), mode="bilinear", antialias=True, align_corners=False)
    else:
        resized = F.interpolate(flat, (size, size), mode="nearest-exact")
    return resized.round_().clamp_(0, 255).to(torch.uint8).reshape(*image.shape[:-2], size, size)


def _pools(
    cases: Sequence[Case],
    grids: Mapping[int, Grid],
    where: npt.NDArray[np.int64],
    targets: Tensor,
    full: MaskStore,
    shares: tuple[float, float],
    max_voxels: int,
) -> dict[str, Pool]:
    largest = largest_classes(targets)
    sites = sort_names(case.site for case in cases)
    site = torch.tensor([sites.index(case.site) for case in cases])

    def pool(chosen: npt.NDArray[np.int64]) -> Pool:
        rows = torch.from_numpy(np.flatnonzero(np.isin(where[:, 0], chosen)))
        places = where[rows.numpy()]

        def read(wanted: Tensor) -> tuple[Tensor, None]:
            return _slices(cases, grids, places[wanted.numpy()], targets.shape[-1], max_voxels), None

        def classes(wanted: Tensor) -> Tensor:
            return targets[rows[wanted]].long()

        return Pool(
            labels=largest[rows],
            ids=tuple(f"{cases[i].name}/{z}" for i, z in places.tolist()),
            read=read,
            groups=site[places[:, 0]] if len(sites) > 1 else None,
            targets=classes,
            cases=torch.from_numpy(places[:, 0].copy()),
            full=FullMasks(full, rows),
        )

    return {name: pool(chosen) for name, chosen in _split(cases, np.unique(where[:, 0]), shares).items()}


def _split(
    cases: Sequence[Case], present: npt.NDArray[np.int64], shares: tuple[float, float]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the cases of every split; a split without a folder gets whole cases that are held out."""
    there = [cases[i] for i in present]
    splits = [case.split for case in there]
    if "test" not in splits:
        splits = ["test" if split == "validation" else split for split in splits]
    names, sites = tuple(case.name for case in there), [case.site for case in there]
    listing = Listing((), names, np.zeros(len(there), dtype=np.int64), splits, sites, thing="case")
    rows = split_rows("brats", listing, Reading(0, "grey", *shares), np.arange(len(there)))
    return {name: present[chosen.numpy()] for name, chosen in rows.items()}


def _slices(
    cases: Sequence[Case], grids: Mapping[int, Grid], wanted: npt.NDArray[np.int64], size: int, max_voxels: int
) -> Tensor:
    """Slices uint8 ``[m, C, size, size]`` for the (case, z) pairs in ``wanted``; every volume is read once."""
    images = torch.empty(len(wanted), len(cases[0].volumes), size, size, dtype=torch.uint8)
    present = np.unique(wanted[:, 0])

    def read(number: int) -> None:
        case = cases[present[number]]
        rows = np.flatnonzero(wanted[:, 0] == present[number])
        planes = wanted[rows, 1]
        for channel, path in enumerate(case.volumes):
            values, grid = read_volume(path, max_voxels)
            grids[int(present[number])].check(grid)
            slices = torch.from_numpy(to_bytes(values)[planes])
            images[torch.from_numpy(rows), channel] = square(slices, size, smooth=True)

    run_in_threads(read, len(present))
    return images


def _nibabel() -> Any:
    return import_extra('data set "brats" reads NIfTI files with nibabel, which is not installed', "medical", "nibabel")
