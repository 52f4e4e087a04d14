"""Tables of images in folders, with splits and sites.

A data set may have folders ``train`` and ``test`` (`SPLITS` has other names), each with the layout of the set without
splits; else a fixed split is drawn.  ``val`` beside ``test`` is the validation set, without ``test`` the test set.
Each site has a folder with the layout of the data set; its test folder is that client's own test set, and the run's
test set joins them.
"""

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
from fedkern.files.filesystem import real_file

LAYOUTS = "auto", "sites", "patients"
"""Values of the option ``layout``: the meaning of the outer of two levels of folders.

``sites``: sites.  ``patients``: patients, as folders below classes or labels or, for segmentation, folders of images
and masks.  ``auto``: sites, unless names look like patients.
"""
_PATIENT = re.compile(r"(patient|pat|subject|subj|sub|case|person|participant|study|exam|series|scan|pid|mrn)[ _-]*\d+")
_NUMBER = re.compile(r"(?!n\d{8}$)([a-z]{0,3}[ _-]?\d{3,}|[ps][ _-]?\d+)")
"""Names of patients, hardly of classes; n and eight digits are ImageNet's classes."""
TEXTS = frozenset({"", ".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".pdf", ".txt", ".xml", ".yaml", ".yml"})
"""Suffixes that are not reported as unread."""
MAC = "._* of macOS"  # metadata that macOS writes on other file systems


Image = Mapping[str, Path | str]
"""Columns of an image: its files and texts."""


class Tree(NamedTuple):
    """Folder of images with its split and site, ``""`` if unknown."""

    site: str
    split: str
    folder: Path


def _split_trees(site: str, base: Path, data: str) -> list[Tree]:
    """Return the trees of split folders, or none without a training folder."""
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
    named = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not is_hidden(path.name))
    return any(not path.is_dir() for path in named)


def holds_classes(folder: Path) -> bool:
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
    """Return the image folders under ``base``, one per site and split.

    Sites are recognised by structure: no folder is ``plain`` (belongs to a tree without sites, such as a class folder
    with images), and several (or their split folders) are ``is_site`` (have the layout without splits).  ``mixed``:
    plain folders beside possible sites mean a tree without sites, instead of an error.  ``single`` rules sites out.
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
    """Return the trees of a site folder, or none for another folder."""
    splits = _split_trees(site, folder, data)
    if any(is_site(tree.folder) for tree in splits):
        return splits
    return [Tree(site, "", folder)] if is_site(folder) else []


def _check_names(base: Path, data: str, sites: Sequence[str], trees: Sequence[Tree]) -> None:
    """Raise UserError if site folders, or all folders in them, are named like patients."""
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
    """Return the table of the images in ``trees``, which ``read`` yields as rows without split and client.

    With the layout ``patients``, sites are read as patients.
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
    return Table(data, base, rows, notices=describe_unread_files(base, used))


def nested_images(folder: Path, layout: str) -> list[tuple[Path, str]]:
    """Return a class folder's images with their patients, ``""`` for images directly in the folder.

    Subfolders are read only with the layout ``patients``; the outermost names the patient.
    """
    images = [(path, "") for path in list_images(folder)]
    for name in subfolders(folder) if layout == "patients" else ():
        images += [(path, name) for place, _ in _walk(folder / name) for path in list_images(place)]
    return images


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield visible folders from ``folder`` down, each once, with their sorted file names, following links."""
    seen = {real_file(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        ways = {real_file(Path(place, name)): name for name in sorted(folders, reverse=True) if not is_hidden(name)}
        folders[:] = sorted(name for real, name in ways.items() if real not in seen)
        seen.update(ways)
        yield Path(place), sorted(names)


def describe_unread_files(base: Path, used: Iterable[Path] | None = None) -> list[str]:
    """Describe files under ``base`` that are not in ``used``, by suffix, except hidden files and texts.

    macOS metadata files are counted too, and without ``used`` only these.
    """
    read, counts_mac = set(used or ()), used is None
    counts: Counter[str] = Counter()
    example = None
    for place, names in _walk(base):
        for name in names:
            mac = name.startswith("._")
            if mac or not (counts_mac or is_hidden(name)):  # skip paths of files that do not count, which may be many
                path = place / name
                kind = MAC if mac else path.suffix.lower()
                if mac or (kind not in TEXTS and path not in read):
                    counts[kind] += 1
                    example = example or path
    if example is None:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return [f"Files under {base} that are not read: {kinds}, such as {example.relative_to(base)}."]
