"""Data set of images with captions: a text file beside every image, or a CSV file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fedkern.data.images import MAX_PIXELS, subfolders
from fedkern.data.listing import Listing, Reading, to_source
from fedkern.data.site_folders import (
    Splits,
    check_folders,
    check_images,
    find_sites,
    holds_classes,
    holds_images,
    listed,
    nested_images,
    split_folders,
    trees,
)
from fedkern.data.spelling import classes_of
from fedkern.data.table import check_unchosen, find_table, read_table
from fedkern.data.types import Source
from fedkern.errors import UserError
from fedkern.files import expand
from fedkern.inputs import read_text

ANY = "any"


def open_pairs(
    root: str | Path | None,
    size: int = 64,
    colour: str = "rgb",
    longest: int = 112,
    test_share: float = 0.2,
    validation_share: float = 0.1,
    crop: int = 0,
    max_image_pixels: int = MAX_PIXELS,
    bits: int = 0,
    layout: str = "auto",
    **chosen: str,
) -> Source:
    """Reads images and their texts; images are decoded when a split needs them.

    CSV file: the columns are ``image``, ``text`` and optionally ``label``, ``split``, ``client`` and ``patient_id``.
    An image with several captions has one row for each.  All images of a patient are held out together and go to one
    client.

    Folder: every image has a text file of the same name beside it, as ``cat.jpg`` and ``cat.txt``.  Images lie directly
    in the folder or under ``train`` and ``test`` (and ``val``), optionally in a folder for each label.  Or there is a
    folder for every site, with splits or labels in it.

    Args:
        root: the CSV file, a folder with one CSV file, or the folder of images.
        size: side in pixels to which every image is resized, with black bars where it is not square.
        layout: one of `fedkern.data.site_folders.LAYOUTS`; with ``patients``, ``LABEL/PATIENT/image``.
        **chosen: columns of the CSV file, see `fedkern.data.table.read_table`.

    The other arguments are options of the data set (`fedkern.data.registry.DATASETS`).

    Raises:
        UserError: anything wrong with a file, an image without a text, or an empty text.
    """
    columns = ("image", "text")
    path = find_table(root, "pairs", columns)
    if path is not None:
        check_folders("pairs", layout, path)
        table = read_table(path, "pairs", columns, chosen)
        images, names, texts = table.files("image", "pairs"), table.names_of("image"), table.column("text")
        classes, labels = table.classes([label or ANY for label in table.column("label")])
        rest = table.listed("pairs")
    else:
        check_unchosen("pairs", chosen, root)
        base = expand(str(root))
        sites = _sites(base, layout)
        images, labelled, splits, clients, patients = _found(base, sites, layout)
        names = tuple(one.relative_to(base).as_posix() for one in images)
        texts = [_read(image) for image in images]
        classes, labels, told = classes_of([label or ANY for label in labelled], f"The layout of {base}")
        rest = listed(base, sites, splits, clients, images)
        rest["patients"] = patients if any(patients) else None
        rest["notices"] += told
    listing = Listing(
        paths=images,
        ids=names,
        labels=labels,
        texts=[" ".join(text.split()[:longest]) for text in texts],
        **rest,
    )
    return to_source(
        "pairs",
        listing,
        classes,
        Reading(
            size, colour, test_share, validation_share, pad=True, crop=crop, max_pixels=max_image_pixels, bits=bits
        ),
    )


def _sites(base: Path, layout: str) -> dict[str, Splits]:
    if holds_images(base) or layout == "patients":
        return {"": split_folders(base, "pairs")}
    whole = lambda folder: holds_images(folder) or holds_classes(folder)  # noqa: E731
    return find_sites(base, "pairs", layout, plain=holds_images, whole=whole, mixed=True)


def _found(
    base: Path, sites: dict[str, Splits], layout: str
) -> tuple[list[Path], list[str], list[str], list[str], list[str]]:
    """The images under ``base``, their labels (``""`` without label folders), splits, sites and patients."""
    images: list[Path] = []
    labels: list[str] = []
    belongs: list[str] = []
    clients: list[str] = []
    patients: list[str] = []
    for site, split, folder in trees(base, sites):
        for label in ("", *subfolders(folder)):
            found = nested_images(folder / label, layout if label else "")
            images += [path for path, _ in found]
            patients += [patient for _, patient in found]
            labels += [label] * len(found)
            belongs += [split] * len(found)
            clients += [site] * len(found)
    check_images(base, "pairs", sites, Counter(zip(clients, belongs, strict=True)))
    if not images:
        raise UserError(f'data set "pairs": no image found in {base} (expected image.jpg with image.txt beside it)')
    return images, labels, belongs, clients, patients


def _read(image: Path) -> str:
    path = image.with_suffix(".txt")
    try:
        text = read_text(path, "utf-8-sig").strip()
    except FileNotFoundError:
        raise UserError(f'data set "pairs": the image {image} has no text {path.name} beside it') from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f'data set "pairs": cannot read {path}: {reason}') from None
    if not text:
        raise UserError(f'data set "pairs": the text {path} is empty')
    return text
