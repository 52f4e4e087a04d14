"""Folders of sites: a data root with a folder for every hospital, each laid out as the data set itself."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedkern.data.images.image_files import SUFFIXES, hidden, list_images, subfolders
from fedkern.data.labels.spelling import unified
from fedkern.data.sources.listing import SPLITS
from fedkern.errors import UserError, first_of
from fedkern.files.inputs import real_file

LAYOUTS = "auto", "sites", "patients"
"""Values of the option ``layout``: what the outer of two levels of folders are.

``sites``: folders of sites.  ``patients``: in no set are folders sites; the folders below classes (or labels), for
segmentation those that hold images and masks, are patients.  ``auto``: sites, unless names look like patients.
"""
_PATIENT = re.compile(r"(patient|pat|subject|subj|sub|case|person|participant|study|exam|series|scan|pid|mrn)[ _-]*\d+")
_NUMBER = re.compile(r"(?!n\d{8}$)([a-z]{0,3}[ _-]?\d{3,}|[ps][ _-]?\d+)")
"""Names that a patient has and a class hardly; n and eight digits are the classes of ImageNet."""
TEXTS = frozenset({"", ".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".pdf", ".txt", ".xml", ".yaml", ".yml"})
"""Endings of files that are not counted as left out."""
MAC = "._* of macOS"  # what another file system has no place for
Splits = dict[str, str]
"""The folder of every split; empty where a fixed split is drawn."""


def split_folders(base: Path, data: str) -> Splits:
    """Maps every split to the name of its folder, one of `SPLITS` in any case; empty without a training folder.

    Raises:
        UserError: a training folder without a test folder, or two folders for one split.
    """
    found: Splits = {}
    names = subfolders(base)
    if not any(SPLITS.get(name.lower()) == "train" for name in names):
        return found
    for name in names:
        split = SPLITS.get(name.lower())
        if split in found:
            raise UserError(f'data set "{data}": {base} has two folders for one split, {found[split]} and {name}')
        if split is not None:
            found[split] = name
    if "test" not in found:
        if "validation" not in found:
            raise UserError(f'data set "{data}": {base} has a folder {found["train"]}, but no folder test or val')
        found["test"] = found.pop("validation")
    return found


def holds_images(folder: Path) -> bool:
    """Whether an image lies directly in ``folder``."""
    named = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not hidden(path.name))
    return any(not path.is_dir() for path in named)


def holds_classes(folder: Path) -> bool:
    """Whether a folder in ``folder`` holds images."""
    return any(holds_images(folder / name) for name in subfolders(folder))


def find_sites(
    base: Path, data: str, layout: str, *, plain: Callable[[Path], bool], whole: Callable[[Path], bool], mixed: bool
) -> dict[str, Splits]:
    """The folders of sites under ``base``, each with its split folders; ``{"": splits}`` for a tree without sites.

    Sites are recognised by structure: no folder in ``base`` is ``plain``, and several folders are ``whole``, or have
    split folders that are.

    Args:
        layout: one of `LAYOUTS`; with ``patients`` the folders are read alike and the caller knows better.
        plain: whether a folder in ``base`` is part of a tree without sites, such as a class folder with images.
        whole: whether a folder has the layout of the data set without splits, such as class folders with images.
        mixed: whether a tree with plain folders beside whole ones is read as one without sites; otherwise it is an
            error.

    Raises:
        UserError: a single site, a folder beside the sites that is none, sites of which some have split folders and
            others have not, plain folders beside sites, or names that look like patients under ``auto``.
    """
    splits = split_folders(base, data)
    if splits:
        return {"": splits}
    names = subfolders(base)
    single = [name for name in names if plain(base / name)]
    if single and mixed:
        return {"": {}}
    own = {name: _splits(base / name, data, whole) for name in names if name not in single}
    sites = {name: found for name, found in own.items() if found is not None}
    if not sites:
        return {"": {}}
    first = next(iter(sites))
    if single:
        raise UserError(
            f'data set "{data}": {base / single[0]} holds images and {base / first} holds folders of images, so that '
            "the folders are neither all classes nor all sites; lay them out alike"
        )
    others = [name for name, found in own.items() if found is None]
    if others:
        raise UserError(
            f'data set "{data}": {base / first} is laid out as a site and {base / others[0]} beside it is not; lay it '
            "out alike, or take it away"
        )
    if len(sites) == 1:
        raise UserError(
            f'data set "{data}": {base} holds the single site {first}; name {base / first} with --data-root to share '
            "its images out, or put the folders of other sites beside it"
        )
    for name, found in sites.items():
        if set(found) != set(sites[first]):
            more, less = (name, first) if len(found) > len(sites[first]) else (first, name)
            split = next(iter(set(sites[more]) - set(sites[less])))
            raise UserError(
                f'data set "{data}": the site {more} has a folder {sites[more][split]} and the site {less} has none '
                "for that split; lay all sites out alike"
            )
    if layout == "auto":
        _check_names(base, data, sites)
    return dict(sites)


def _check_names(base: Path, data: str, sites: dict[str, Splits]) -> None:
    """Raises UserError where the folders of sites, or all folders in them, have names of patients."""
    inner = [(folder / name).relative_to(base) for _, _, folder in trees(base, sites) for name in subfolders(folder)]
    outer = [Path(name) for name in sites]
    for found, patterns in ((inner, (_PATIENT, _NUMBER)), (outer, (_PATIENT,))):
        if found and all(any(each.fullmatch(path.name.lower()) for each in patterns) for path in found):
            raise UserError(
                f'data set "{data}": {found[0]} in {base} looks like the folder of a patient, and '
                f"{first_of([*sites], 4)} would be sites; give --data-option layout=sites if that is right, or "
                "layout=patients to keep the images of a patient together"
            )


def check_folders(data: str, layout: str, table: Path) -> None:
    """Raises UserError where a layout of folders is asked for, though a table lists the images."""
    if layout != "auto":
        raise UserError(
            f'data set "{data}": the option layout is for folders, and {table} lists the images; leave it out'
        )


def nested_images(folder: Path, layout: str) -> list[tuple[Path, str]]:
    """The images of a class folder and the patient of each, ``""`` for an image that lies directly in it.

    Only with the layout ``patients`` folders in ``folder`` are read; the outermost one names the patient.
    """
    found = [(path, "") for path in list_images(folder)]
    for name in subfolders(folder) if layout == "patients" else ():
        found += [(path, name) for place, _ in _walk(folder / name) for path in list_images(place)]
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from ``folder`` down that is not hidden, each once, and the names of its files, in order.

    Links are followed, as `subfolders` follows them.
    """
    known = {real_file(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        ways = {real_file(Path(place, name)): name for name in sorted(folders, reverse=True) if not hidden(name)}
        folders[:] = sorted(name for real, name in ways.items() if real not in known)
        known.update(ways)
        yield Path(place), sorted(names)


def left_out(base: Path, used: Iterable[Path] | None = None) -> list[str]:
    """A sentence on the files under ``base`` that are not read, by their endings, without hidden files and texts.

    Files that macOS puts beside others are counted too, and without ``used``, the files that are read, they alone.
    """
    read, alone = set(used or ()), used is None
    counts: Counter[str] = Counter()
    example = None
    for place, names in _walk(base):
        for name in names:
            mac = name.startswith("._")
            if mac or not (alone or hidden(name)):  # no path of each of many files where they do not count
                path = place / name
                kind = MAC if mac else path.suffix.lower()
                if mac or (kind not in TEXTS and path not in read):
                    counts[kind] += 1
                    example = example or path
    if example is None:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return [f"Files under {base} that are not read: {kinds}, such as {example.relative_to(base)}."]


def trees(base: Path, sites: dict[str, Splits]) -> list[tuple[str, str, Path]]:
    """The (site, split, folder) of every tree to read, where ``sites`` comes from `find_sites`."""
    return [
        (site, split, base / site / name)
        for site, splits in sites.items()
        for split, name in (splits.items() if splits else [("", "")])
    ]


class Found(NamedTuple):
    """An image in folders; names that the layout does not tell are ``""``."""

    path: Path
    split: str
    site: str
    label: str = ""
    patient: str = ""


def check_images(base: Path, data: str, sites: dict[str, Splits], found: Iterable[Found]) -> None:
    """Raises UserError where a site has no image of a split."""
    there = {(image.site, image.split) for image in found}
    for site, split, folder in trees(base, sites) if "" not in sites else ():
        if split != "validation" and (site, split) not in there:
            raise UserError(f'data set "{data}": the site {site} has no image in {folder}; add some, or leave it out')


def listed(base: Path, sites: dict[str, Splits], found: Sequence[Found], masks: Sequence[Path] = ()) -> dict[str, Any]:
    """What the layout says of every image beside its label: attributes of a `fedkern.data.sources.listing.Listing`.

    ``sites`` come from `find_sites`; ``masks`` are other files that are read.
    """
    clients, told = unified([image.site for image in found], f"The layout of {base}")
    paths, patients = [image.path for image in found], [image.patient for image in found]
    splits = [image.split for image in found]
    return {
        "paths": paths,
        "ids": tuple(path.relative_to(base).as_posix() for path in paths),
        "splits": splits,
        "clients": clients,
        "patients": patients if any(patients) else None,
        "named_by": "" if "" in sites else f"the layout of {base}",
        "own_tests": "" not in sites and "test" in splits,
        "notices": [*told, *left_out(base, [*paths, *masks])],
    }


def _splits(folder: Path, data: str, whole: Callable[[Path], bool]) -> Splits | None:
    """The split folders of a site, {} where it has none; None where the folder is no site."""
    splits = split_folders(folder, data)
    if any(whole(folder / name) for name in splits.values()):
        return splits
    return {} if whole(folder) else None
