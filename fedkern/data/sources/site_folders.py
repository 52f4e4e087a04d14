"""Tables of images in folders.

The folder of a data set may hold the folders ``train`` and ``test`` (`SPLITS` has the other names, in any case), each
laid out as the data set without splits; else a fixed split is drawn.  ``val`` beside ``test`` is the validation set;
without ``test`` it is the test set.

Where clients are sites, each has a folder that is laid out as the data set itself.  The test folder of a site is the
own test set of that client, and the test set of the run joins them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedkern.data.images.image_files import SUFFIXES, is_hidden, list_images, subfolders
from fedkern.data.sources.listing import SPLITS
from fedkern.data.sources.table import CLIENT, PATIENT, Table
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


Image = Mapping[str, Path | str]
"""Columns of an image: its files and what is known of it."""


class Tree(NamedTuple):
    """A folder that is read, and its split and site, ``""`` where the layout does not tell."""

    site: str
    split: str
    folder: Path


def _split_trees(site: str, base: Path, data: str) -> list[Tree]:
    """Return the trees of the splits in ``base``, whose names are in `SPLITS` in any case.

    None without a training folder.

    Raises:
        UserError: a training folder without a test folder, or two folders for one split.
    """
    folders: dict[str, str] = {}
    named = [(SPLITS[name.lower()], name) for name in subfolders(base) if name.lower() in SPLITS]
    if "train" not in dict(named):
        return []
    for split, name in named:
        if split in folders:
            raise UserError(f'data set "{data}": {base} has two folders for one split, {folders[split]} and {name}')
        folders[split] = name
    if "test" not in folders:
        if "validation" not in folders:
            raise UserError(f'data set "{data}": {base} has a folder {folders["train"]}, but no folder test or val')
        folders["test"] = folders.pop("validation")
    return [Tree(site, split, base / name) for split, name in folders.items()]


def holds_images(folder: Path) -> bool:
    """Return whether an image lies directly in ``folder``."""
    named = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not is_hidden(path.name))
    return any(not path.is_dir() for path in named)


def holds_classes(folder: Path) -> bool:
    """Return whether a folder in ``folder`` holds images."""
    return any(holds_images(folder / name) for name in subfolders(folder))


def find_trees(
    base: Path,
    data: str,
    layout: str,
    *,
    plain: Callable[[Path], bool],
    is_site: Callable[[Path], bool],
    mixed: bool,
    single: bool = False,
) -> list[Tree]:
    """Return the folders under ``base`` that hold the images, one for every site and split.

    Sites are recognised by structure: no folder in ``base`` is ``plain``, and several folders are ``is_site``, or have
    split folders that are.

    Args:
        layout: one of `LAYOUTS`.
        plain: whether a folder in ``base`` is part of a tree without sites, such as a class folder with images.
        is_site: whether a folder has the layout of the data set without splits, such as class folders with images.
        mixed: whether a tree with plain folders beside whole ones is read as one without sites; otherwise it is an
            error.
        single: whether no folder in ``base`` is a site, whatever it looks like.

    Raises:
        UserError: a single site, a folder beside the sites that is none, sites of which some have split folders and
            others have not, plain folders beside sites, or names that look like patients under ``auto``.
    """
    splits, whole_tree = _split_trees("", base, data), [Tree("", "", base)]
    if splits or single:
        return splits or whole_tree
    names = subfolders(base)
    parts = [name for name in names if plain(base / name)]
    if parts and mixed:
        return whole_tree
    layouts = {name: _site_trees(name, base / name, data, is_site) for name in names if name not in parts}
    sites = {name: trees for name, trees in layouts.items() if trees}
    if not sites:
        return whole_tree
    model = next(iter(sites))
    if parts:
        raise UserError(
            f'data set "{data}": {base / parts[0]} holds images and {base / model} holds folders of images, so that '
            "the folders are neither all classes nor all sites; lay them out alike"
        )
    unlike = [name for name in layouts if name not in sites]
    if unlike:
        raise UserError(
            f'data set "{data}": {base / model} is laid out as a site and {base / unlike[0]} beside it is not; lay it '
            "out alike, or take it away"
        )
    if len(sites) == 1:
        raise UserError(
            f'data set "{data}": {base} holds the single site {model}; name {base / model} with --data-root to share '
            "its images out, or put the folders of other sites beside it"
        )
    for trees in sites.values():
        less, longer = sorted((sites[model], trees), key=len)
        splits_of_less = {tree.split for tree in less}
        if lacking := [tree for tree in longer if tree.split not in splits_of_less]:
            raise UserError(
                f'data set "{data}": the site {longer[0].site} has a folder {lacking[0].folder.name} and the site '
                f"{less[0].site} has none for that split; lay all sites out alike"
            )
    trees = [tree for site_trees in sites.values() for tree in site_trees]
    if layout == "auto":
        _check_names(base, data, [*sites], trees)
    return trees


def _site_trees(site: str, folder: Path, data: str, is_site: Callable[[Path], bool]) -> list[Tree]:
    """Return the trees of the site in a folder.

    None where the folder is no site.
    """
    splits = _split_trees(site, folder, data)
    if any(is_site(tree.folder) for tree in splits):
        return splits
    return [Tree(site, "", folder)] if is_site(folder) else []


def _check_names(base: Path, data: str, sites: Sequence[str], trees: Sequence[Tree]) -> None:
    """Raise UserError where the folders of sites, or all folders in them, have names of patients."""
    inner = [(tree.folder / name).relative_to(base) for tree in trees for name in subfolders(tree.folder)]
    for paths, patterns in ((inner, (_PATIENT, _NUMBER)), ([*map(Path, sites)], (_PATIENT,))):
        if paths and all(any(pattern.fullmatch(path.name.lower()) for pattern in patterns) for path in paths):
            raise UserError(
                f'data set "{data}": {paths[0]} in {base} looks like the folder of a patient, and '
                f"{first_of(sites, 4)} would be sites; give --data-option layout=sites if that is right, or "
                "layout=patients to keep the images of a patient together"
            )


def tree_table(
    base: Path, data: str, layout: str, trees: Sequence[Tree], read: Callable[[Tree], Iterable[Image]]
) -> Table:
    """Return the table of the images in folders.

    Args:
        layout: with ``patients`` what would be sites are patients.
        trees: the folders, from `find_trees`.
        read: the images of a folder, each as a row without split and client.

    Raises:
        UserError: a site has no image of a split; or what ``read`` raises.
    """
    rows: list[dict[str, str]] = []
    used: list[Path] = []
    owner = PATIENT[0] if layout == "patients" else CLIENT[0]
    for tree in trees:
        images = [*read(tree)]
        if tree.site and tree.split != "validation" and not images:
            raise UserError(
                f'data set "{data}": the site {tree.site} has no image in {tree.folder}; add some, or leave it out'
            )
        for image in images:
            used += [path for path in image.values() if isinstance(path, Path)]
            texts = {
                name: value.relative_to(base).as_posix() if isinstance(value, Path) else value
                for name, value in image.items()
            }
            rows.append({owner: tree.site, **texts, "split": tree.split})
    return Table(data, base, rows, notices=left_out(base, used))


def nested_images(folder: Path, layout: str) -> list[tuple[Path, str]]:
    """Return the images of a class folder and the patient of each, ``""`` for an image that lies directly in it.

    Only with the layout ``patients`` folders in ``folder`` are read; the outermost one names the patient.
    """
    images = [(path, "") for path in list_images(folder)]
    for name in subfolders(folder) if layout == "patients" else ():
        images += [(path, name) for place, _ in _walk(folder / name) for path in list_images(place)]
    return images


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from ``folder`` down that is not hidden, each once, and the names of its files, in order.

    Links are followed, as `subfolders` follows them.
    """
    seen = {real_file(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        ways = {real_file(Path(place, name)): name for name in sorted(folders, reverse=True) if not is_hidden(name)}
        folders[:] = sorted(name for real, name in ways.items() if real not in seen)
        seen.update(ways)
        yield Path(place), sorted(names)


def left_out(base: Path, used: Iterable[Path] | None = None) -> list[str]:
    """Describe the files under ``base`` that are not read, by their endings.

    Hidden files and texts are left out.

    Files that macOS puts beside others are counted too, and without ``used``, the files that are read, they alone.
    """
    read, counts_mac = set(used or ()), used is None
    counts: Counter[str] = Counter()
    example = None
    for place, names in _walk(base):
        for name in names:
            mac = name.startswith("._")
            if mac or not (counts_mac or is_hidden(name)):  # no path of each of many files where they do not count
                path = place / name
                kind = MAC if mac else path.suffix.lower()
                if mac or (kind not in TEXTS and path not in read):
                    counts[kind] += 1
                    example = example or path
    if example is None:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return [f"Files under {base} that are not read: {kinds}, such as {example.relative_to(base)}."]
