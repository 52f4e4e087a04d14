"""Conversion of a table of files to a source: splits, sites, groups and notices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkern.data.images.full_masks import FullMasks
from fedkern.data.images.greys import MAX_FILES, Look, describe_files, inspect_files, pixels_outside, window_of
from fedkern.data.images.image_files import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    ImageFiles,
    ImageReader,
    check_distinct,
    grey_bits,
)
from fedkern.data.labels.spelling import SHOWN, sort_names
from fedkern.data.sharing.groups import hash_names
from fedkern.data.split import rows_of
from fedkern.data.types import DataRequest, Pool, Source
from fedkern.errors import UserError, first_of
from fedkern.streams import stream
from fedkern.tasks import Task, task_of

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "validation", "valid": "validation", "validation": "validation"}  # fmt: skip
Labels = npt.NDArray[np.int64] | npt.NDArray[np.uint8]
Masks = npt.NDArray[np.uint8] | npt.NDArray[np.int16] | Tensor
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # ImageNet's values, averaged over the channels


@dataclass(frozen=True)
class Reading:
    """Options on how files are read as images, see `fedkern.data.READING`.

    Attributes:
        size: side in pixels to which images are resized.
        colour: ``"rgb"`` or ``"grey"``.
        test_share: 0: no test set is drawn, and the test set may be empty; 1: all images are the test set, and the
            training set too.
        validation_share: 0: no validation set is drawn.
        pad: keep the proportions of images that are not square, with black bars on both sides.
        crop: side of the image window that a network sees, at most ``size``; 0 for the whole image.
        max_image_pixels: most pixels of an image, as its file announces them.
        bits: bits of a grey value in files with more than eight; 0: as the values need.
        window: ``CENTRE,WIDTH`` or percentiles of such files, see `fedkern.data.READING`; empty: none.
        cache: folder that keeps decoded files, see `fedkern.data.load`.
        progress: called with messages during a long decoding.
    """

    size: int
    colour: str
    test_share: float
    validation_share: float
    pad: bool = False
    crop: int = 0
    max_image_pixels: int = MAX_PIXELS
    bits: int = 0
    window: str = ""
    cache: str | Path | None = None
    progress: Callable[[str], None] | None = None

    @classmethod
    def of(cls, request: DataRequest) -> Reading:
        """Return the reading that a request asks for, ignoring its other options."""
        options = {name: request.options[name] for name in cls.__dataclass_fields__ if name in request.options}
        return cls(**options | {"cache": request.cache, "progress": request.progress})


@dataclass(frozen=True)
class Listing:
    """Files of a data set, one entry per image in every sequence.

    Attributes:
        paths: the image files.
        ids: names of the images.
        labels: int64 ``[n]``; or uint8 ``[n, L]``, 1 where the image has the label.
        splits: ``"train"``, ``"validation"`` or ``"test"``; or ``""`` everywhere, and a fixed split is drawn.
        clients: name of the client that holds the image; ``""`` everywhere if the files name no clients.  Images that
            are not trained on need none.
        masks: uint8 or int16 ``[n, H, W]``, the class of every pixel (or `IGNORE`), for segmentation; or
            `fedkern.files.image_rows.PixelClasses` if masks are in a file.
        texts: text of every image; an image with several texts has an entry for each, all under one name in ``ids``.
        patients: patient of every image, ``""`` where unknown; a fixed split keeps all images of a patient on one side.
        named_by: the column or layout that names the clients, in words, see `Source.named_by`.
        own_tests: whether every test image belongs to the own test set of its client.
        lines: line of every image in its table, for messages; empty without a table.
        notices: sentences for the user, see `Source.notices`.
        full: masks at their original size, see `fedkern.data.Split`.
        thing: noun for an entry, for messages.
        task: as in `fedkern.data.Split`.
    """

    paths: Sequence[Path]
    ids: tuple[str, ...]
    labels: Labels
    splits: Sequence[str]
    clients: Sequence[str]
    masks: Masks | None = None
    texts: Sequence[str] | None = None
    patients: Sequence[str] | None = None
    named_by: str = ""
    own_tests: bool = False
    lines: Sequence[int] = ()
    notices: Sequence[str] = ()
    full: FullMasks | None = None
    thing: str = "image"
    task: Task = None  # type: ignore[assignment]  # never None afterwards

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.task or task_of(self.labels, self.texts, self.masks))


def to_source(data: str, listing: Listing, classes: tuple[str, ...], reading: Reading) -> Source:
    """Make the pools of a listed data set.

    Args:
        data: name of the data set, for messages.
        listing: the files.
        classes: class names, in label order.
        reading: how files are read as images; they are decoded when a split needs them.

    Returns:
        A source whose test pool is named ``""``.

    Raises:
        UserError: an empty training or test set, too few images to hold some out, an image with two labels, clients,
            patients, splits or names, a patient in two splits, or a window larger than the images.
    """
    check_distinct(data, listing.paths, listing.ids)
    if reading.crop > reading.size:
        raise UserError(f'data set "{data}": crop is {reading.crop}, more than size, {reading.size}')
    _check_single(data, listing, classes)
    units = _units(listing)
    rows = split_rows(data, listing, reading, units)
    trained = [listing.clients[row] for row in rows["train"].tolist()]
    names = sort_names(trained)
    unnamed = trained.count("") if names != ("",) else 0
    sites = () if "" in names else names
    numbers = {name: k for k, name in enumerate(sites)}
    groups = torch.tensor([numbers.get(name, -1) for name in listing.clients]) if sites else None
    patients = None if listing.patients is None else torch.from_numpy(units)
    trained_on = {listing.paths[row] for row in rows["train"].tolist()}
    files, seen, notices = _image_files(data, listing, reading, trained_on)
    places = {path: place for place, path in enumerate(files.paths)}
    images = torch.tensor([places[path] for path in listing.paths], dtype=torch.int64)

    def pool(chosen: Tensor) -> Pool:
        masks = listing.masks
        return Pool(
            labels=torch.from_numpy(listing.labels)[chosen], ids=tuple(listing.ids[row] for row in chosen.tolist()),
            read=ImageReader(files, images[chosen]), groups=None if groups is None else groups[chosen],
            targets=None if masks is None else lambda part: _targets(masks, chosen[part]),
            texts=rows_of(listing.texts, chosen), patients=None if patients is None else patients[chosen],
            full=rows_of(listing.full, chosen), task=listing.task,
        )  # fmt: skip

    drawn = not any(listing.splits)
    return Source(
        classes=classes, train=pool(rows["train"]), validation=pool(rows["validation"]), tests={"": pool(rows["test"])},
        mean=GREY_MEAN if files.grey else IMAGENET_MEAN, std=GREY_STD if files.grey else IMAGENET_STD,
        augment="window" if 0 < reading.crop < reading.size else "none", groups=len(sites) or None, crop=reading.crop,
        sites=sites, named_by=listing.named_by if sites or unnamed else "", unnamed=unnamed,
        lost=tuple(sorted({*listing.clients} - {"", *sites})) if sites and drawn else (),
        own_tests=bool(sites) and listing.own_tests, drawn_validation="validation" not in listing.splits,
        notices=(*listing.notices, *notices, *_describe_repeats(listing), *_report_missing_sites(listing, rows)),
        files={**seen, "sites": sites}, compared=True,
    )  # fmt: skip


def _image_files(
    data: str, listing: Listing, reading: Reading, trained_on: Collection[Path]
) -> tuple[ImageFiles, dict[str, object], list[str]]:
    """Return the distinct files, their entries in `Source.files`, and notices on greys."""
    paths = tuple(dict.fromkeys(listing.paths))
    looks = inspect_files(paths, reading.max_image_pixels, not reading.bits or bool(reading.window))
    bits = reading.bits or grey_bits(look.top for look in looks.values() if look.top is not None)
    training = [path for path in paths if path in trained_on] if "%" in reading.window else ()
    window = window_of(reading.window, inspect_files(training, reading.max_image_pixels, True).values())
    sets = dict(zip(listing.paths, zip(listing.splits, listing.clients, strict=True), strict=True))
    first_path = {set_name: path for path, set_name in reversed(sets.items())}
    lacking = [first_path[name] for name in first_path.keys() - {sets[path] for path in looks}]
    all_looks = looks | inspect_files(sorted(lacking)[:MAX_FILES], reading.max_image_pixels, False)
    sides = " of ".join(f"{side} x {side}" for side in dict.fromkeys((reading.crop or reading.size, reading.size)))
    grey = reading.colour == "grey"
    seen = describe_files(sets, all_looks, (sides, "grey" if grey else "RGB"), bits, window)
    files = ImageFiles(paths, reading.size, data, grey, reading.pad, reading.max_image_pixels, bits, window)
    sentences = [*_report_darker_sites(listing, looks, bits)] if window is None else []
    if reading.window and all_looks and not any(look.mode.startswith(("I", "F")) for look in all_looks.values()):
        sentences.append(f"The data option window={reading.window} has no effect: no file has greys of over 8 bits.")
    outside = pixels_outside(window, looks.values())
    return files, {"grey_bits": bits, "window": window, "seen": seen, "outside": outside}, sentences


def _targets(masks: Masks, rows: Tensor) -> Tensor:
    return masks[rows] if isinstance(masks, Tensor) else torch.from_numpy(masks[rows.numpy()]).long()


def _report_darker_sites(listing: Listing, looks: Mapping[Path, Look], bits: int) -> Iterator[str]:
    """Yield a notice on sites whose deep greys have fewer bits than the data set's."""
    tops: dict[str, list[int]] = {}
    for path, site in zip(listing.paths, listing.clients, strict=True):
        if site and path in looks and (top := looks[path].top) is not None:
            tops.setdefault(site, []).append(top)
    depths = {site: grey_bits(values) for site, values in sorted(tops.items())}
    if darker := [f"{site} ({2 ** (bits - depth)} times)" for site, depth in depths.items() if depth < bits]:
        yield (
            "Images are darker than those of other sites, as their files have fewer bits: "
            f"{first_of(darker, SHOWN)}. Scale these files where equal values do not mean equal brightness."
        )


def _describe_repeats(listing: Listing) -> Iterator[str]:
    counts = Counter(zip(listing.ids, listing.texts or listing.ids, strict=True))
    if repeated := [f"{name} ({count} times)" for (name, _), count in counts.items() if count > 1]:
        yield f"Images that are listed more than once count as often: {first_of(repeated, SHOWN)}."


def _report_missing_sites(listing: Listing, rows: dict[str, Tensor]) -> Iterator[str]:
    """Yield a notice per held-out set that names sites but misses some of the training set's."""
    sites = {name: {listing.clients[row] for row in chosen.tolist()} - {""} for name, chosen in rows.items()}
    for name in ("test", "validation"):
        absent = sorted(sites["train"] - sites[name])
        if absent and sites[name]:
            yield f"The {name} set has no image of {first_of(absent, SHOWN)}."


def check_one(
    data: str, keys: Sequence[str], values: Sequence[str], phrase: str, lines: Sequence[int], advice: str = "name one"
) -> None:
    """Raise UserError if two rows of one key have different values that are not empty.

    ``phrase`` describes the conflict, such as ``"the image {} has two labels"``.
    """
    first_rows: dict[str, int] = {}
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key and value and values[earlier := first_rows.setdefault(key, row)] != value:
            pair = (f"{values[k]} (line {lines[k]})" if lines else values[k] for k in (earlier, row))
            raise UserError(f'data set "{data}": {phrase.format(key)}, {" and ".join(pair)}; {advice}')


def _check_single(data: str, listing: Listing, classes: Sequence[str]) -> None:
    """Raise UserError for an image trained on as two, or a patient in two splits."""
    labels = [listing.task.label_text(label, classes) for label in listing.labels]
    for phrase, values in (
        ("is in two splits", listing.splits),
        ("belongs to two patients", listing.patients or ()),
        ("has two labels", labels),
        ("belongs to two clients", listing.clients),
    ):
        if values:
            check_one(data, listing.ids, values, f"the image {{}} {phrase}", listing.lines)
    if listing.patients is not None:
        check_one(
            data, listing.patients, listing.splits, "the patient {} has images in two splits", listing.lines,
            "keep a patient's images in one, or, where the column names no patients, give --data-option patient=",
        )  # fmt: skip


def _units(listing: Listing) -> npt.NDArray[np.int64]:
    """Return the unit of every row, int64 ``[n]``, which stays on one side of a split.

    A unit is a patient or else an image with all texts, numbered by a hash of its name: other patients change neither
    the number nor draws keyed by it.
    """
    owners: dict[str, str] = {}
    for name, patient in zip(listing.ids, listing.patients or (), strict=False):
        owners[name] = patient or owners.get(name, "")
    return hash_names(f"patient/{owners[name]}" if owners.get(name) else f"image/{name}" for name in listing.ids)


def split_rows(data: str, listing: Listing, reading: Reading, units: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    """Return the sorted rows of every split.

    Drawn rows keep the shares of sites and classes, and units whole.
    """
    splits = np.array(listing.splits)
    rows = {name: np.flatnonzero(splits == name) for name in ("train", "validation", "test")}
    everything = np.arange(len(splits))
    if not any(listing.splits) and reading.test_share == 1:
        rows["test"] = everything
    elif not any(listing.splits):
        rows["test"], rows["train"] = _held_out(data, everything, listing, units, reading.test_share, "test")
    if reading.test_share == 1 and not len(rows["train"]):
        rows["train"] = rows["test"]  # only to know sites and classes
    for name in ("train", "test") if reading.test_share else ("train",):
        if len(rows[name]) == 0:
            raise UserError(f'data set "{data}": no {listing.thing} belongs to the {name} split')
    if len(rows["validation"]) == 0 and rows["train"] is not rows["test"]:
        rows["validation"], rows["train"] = _held_out(
            data, rows["train"], listing, units, reading.validation_share, "validation"
        )
    return {name: torch.from_numpy(chosen.astype(np.int64)) for name, chosen in rows.items()}


def _held_out(
    data: str, rows: npt.NDArray[np.int64], listing: Listing, units: npt.NDArray[np.int64], share: float, purpose: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows of a fixed choice of units, and all others, sorted."""
    if not share:
        return np.arange(0), rows
    by_unit: dict[int, list[int]] = {}
    for row in rows.tolist():
        by_unit.setdefault(int(units[row]), []).append(row)
    groups = list(by_unit.values())
    homes = [listing.clients[group[0]] for group in groups]
    kinds = listing.task.kinds(listing.labels[[group[0] for group in groups]], len(set(homes)) > 1)
    key = f"split/{data}/{purpose}"
    if 1 < max(Counter(homes).values(), default=0) < len(homes):
        chosen = _by_site(kinds, homes, share, stream(0, key))
    else:  # a single site, or a site per unit: draw from all units
        chosen = interleave_classes(kinds, key)[: max(1, round(share * len(homes)))]
    if not 0 < len(chosen) < len(groups):
        noun = listing.thing if listing.patients is None else "patient"
        raise UserError(f'data set "{data}": {len(groups)} {noun}s are too few to hold some out as {purpose} set')
    held_out = np.array(sorted(row for i in chosen for row in groups[i]), dtype=np.int64)
    return held_out, np.setdiff1d(rows, held_out)


def interleave_classes(labels: npt.NDArray[np.int64], purpose: str) -> list[int]:
    """Return a fixed random order in which any stretch has about the same class shares."""
    order = stream(0, purpose).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        position[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return [int(row) for row in np.argsort(position, kind="stable")]


def _by_site(kinds: npt.NDArray[np.int64], homes: Sequence[str], share: float, rng: np.random.Generator) -> list[int]:
    """Choose each site's share of units, at least one of two or more.

    Each choice takes the site's class that is furthest below its share of the whole set; single units of a class stay
    in training if possible.  ``kinds``, int64 ``[m]``: class of every unit.
    """
    total = np.bincount(kinds)
    due = np.where(total > 1, np.maximum(share * total, 1), 0)
    taken = np.zeros(len(total))
    units: dict[str, dict[int, list[int]]] = {}
    for unit in rng.permutation(len(kinds)).tolist():
        units.setdefault(homes[unit], {}).setdefault(int(kinds[unit]), []).append(unit)
    chosen: list[int] = []
    for _, by_kind in sorted(units.items()):
        size = sum(map(len, by_kind.values()))
        room = {kind: math.ceil(share * len(members)) for kind, members in by_kind.items()}
        for _ in range(min(max(1, round(share * size)), size - 1)):
            able = [kind for kind, places in room.items() if places]
            kind = min(able, key=lambda kind: (taken[kind] / due[kind] if due[kind] else math.inf, total[kind], kind))
            chosen.append(by_kind[kind].pop())
            room[kind] -= 1
            taken[kind] += 1
    return chosen
