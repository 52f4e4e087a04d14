"""Openclipart's drawings with titles, keywords and artists: real pairs, real clients, and exact object masks.

The drawings are in the public domain.  Debian packages them: unpack openclipart-svg (titles, keywords, artists) and
openclipart-png (pixels) with ``dpkg-deb -x PACKAGE DIR``.  Small pictures are rendered once, in some minutes, and kept.

FedDRA on drawings and their titles, where every artist is a client:

    python -m fedkern.run feddra --data examples/papers/openclipart.py:openclipart --data-root DIR \\
        --local-steps 10 --method-option alignment_steps=10

Fed-LPFM on the folders as classes, and FedGID where a client shows every class on a photograph of its own:

    python -m fedkern.run fedlpfm --data examples/papers/openclipart.py:openclipart_classes --data-root DIR
    python -m fedkern.run fedgid --data examples/papers/openclipart.py:openclipart_scenes --data-root DIR
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fedkern import FederatedData, UserError, register_data
from fedkern.data import Option, Pool, Source, Split
from fedkern.data.images.image_files import MAX_PIXELS, list_images, open_image, run_in_threads, unreadable
from fedkern.data.sources.table import need_root
from fedkern.files import atomic
from fedkern.files.filesystem import absolute, cache_folder
from fedkern.streams import stream

Rows = npt.NDArray[np.int64]
FOLDERS = ("usr/share/openclipart", "openclipart", "")
DUBLIN = "{http://purl.org/dc/elements/1.1/}"
MEAN, STD = (0.75, 0.74, 0.72), (0.34, 0.33, 0.35)
"""Of drawings on white, per channel."""
_SIZE = Option(64, "side in pixels to which drawings are fitted", low=16, high=512)
_SERIES = Option(20, "drawings with more namesakes by their artist are left out, as a set's name tells nothing", low=1)
_RENDERED = Option("", "folder that keeps the small pictures (default: in the user's cache)", path=absolute)


@dataclass(frozen=True)
class Drawings:
    """Drawings with a title, keywords and an artist.

    Attributes:
        pixels: uint8 ``[n, 4, S, S]``, red, green, blue and opacity.
        ids: path below the folder ``svg``, whose first part is the class.
        artists, titles, keywords: of every drawing; an artist has one spelling, and keywords are joined by commas.
    """

    pixels: npt.NDArray[np.uint8]
    ids: npt.NDArray[np.str_]
    artists: npt.NDArray[np.str_]
    titles: npt.NDArray[np.str_]
    keywords: npt.NDArray[np.str_]

    def subset(self, rows: npt.NDArray[np.bool_]) -> Drawings:
        return Drawings(*(column[rows] for column in vars(self).values()))

    def without_series(self, longest: int) -> Drawings:
        """Return the drawings whose title at most ``longest`` drawings of their artist have."""
        names = [*zip(self.artists.tolist(), self.titles.tolist(), strict=True)]
        counts = Counter(names)
        return self.subset(np.array([counts[name] <= longest for name in names]))

    @property
    def folders(self) -> npt.NDArray[np.str_]:
        return np.array([name.partition("/")[0].replace("_", " ") for name in self.ids.tolist()])

    def on_white(self) -> Tensor:
        """Return the pictures without transparency, uint8 ``[n, 3, S, S]``."""
        opacity = self.pixels[:, 3:].astype(np.uint16)
        return torch.from_numpy(((self.pixels[:, :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8))


@register_data("openclipart", clients=12, partition="attribute", task="retrieval", prompts="{class}")
def openclipart(
    root: str | Path | None = None,
    *,
    clients: int,
    size: int = _SIZE,
    series: int = _SERIES,
    rendered: str = _RENDERED,
    own_test: int = Option(16, "drawings of every client's own test set", low=2),
) -> Source:
    """Drawings with titles and keywords by the most productive artists, who are the clients; test by other artists.

    The test set joins the clients' own ones, which are of one size, so that their recall compares.  The test set
    ``unseen`` has all drawings of other artists.

    Args:
        root: the folder with ``svg`` and ``png``, or the one into which the packages were unpacked.

    Raises:
        UserError: the folders are missing, a picture is damaged, or an artist has too few drawings.
    """
    return _source(_read(root, size, rendered).without_series(series), clients, own_test, has_texts=True)


@register_data("openclipart-classes", clients=20, partition="attribute")
def openclipart_classes(
    root: str | Path | None = None,
    *,
    clients: int,
    size: int = _SIZE,
    series: int = _SERIES,
    rendered: str = _RENDERED,
    own_test: int = Option(8, "drawings of every client's own test set", low=2),
) -> Source:
    """Drawings in the 22 classes that their folders name; clients and tests as in openclipart."""
    return _source(_read(root, size, rendered).without_series(series), clients, own_test, has_texts=False)


@register_data("openclipart-scenes", clients=5, partition="iid")
def openclipart_scenes(
    root: str | Path | None = None,
    *,
    clients: int,
    seed: int,
    size: int = _SIZE,
    series: int = _SERIES,
    rendered: str = _RENDERED,
    artists: int = Option(24, "artists whose drawings train; all others' are for tests", low=1),
    least: int = Option(100, "classes with fewer training drawings are left out", low=1),
    grounds: str = Option("", "folder of photographs (default: grounds beside svg)", path=absolute),
    correlation: float = Option(0.8, "share of images on their client's photograph of their class", low=0, high=1),
) -> FederatedData:
    """Drawings on photographs that are tied to class and client; out-of-distribution test on random ones.

    A client shows every class on crops of a photograph of its own.  Tests show drawings of other artists on the right
    third of the photographs, which trains no client.  Masks are exact.

    Raises:
        UserError: as openclipart; there are fewer photographs than classes, or none is wide enough.
    """
    drawings = _read(root, size, rendered).without_series(series)
    shown = drawings.pixels[:, 3].mean((1, 2)) / 255
    drawings = drawings.subset((shown > 0.02) & (shown < 0.95))  # the others hide their ground, or are not seen
    train, held, _, unseen = _parts(drawings, artists, 0)
    counts = Counter(drawings.folders[np.concatenate(train)].tolist())
    classes = tuple(sorted(name for name, count in counts.items() if count >= least))
    folder = Path(grounds) if grounds else _folder(root) / "grounds"
    photographs = _photographs(folder, size, len(classes))
    maps = np.stack([stream(seed, "class-grounds", client=k).permutation(len(photographs)) for k in range(clients)])

    def place(purpose: str, rows: Rows, client: int = -1) -> Split:
        rows = rows[np.isin(drawings.folders[rows], classes)]
        labels = np.searchsorted(classes, drawings.folders[rows])
        rng = stream(seed, f"grounds/{purpose}", client=client)
        homes = rng.integers(clients, size=len(rows)) if client < 0 else np.full(len(rows), client)
        tied = rng.random(len(rows)) < (0 if purpose == "ood" else correlation)
        chosen = np.where(tied, maps[homes, labels], rng.integers(len(photographs), size=len(rows)))
        crops = np.stack([_crop(photographs[number], size, rng, purpose in ("id", "ood")) for number in chosen])
        opacity = drawings.pixels[rows, 3:].astype(np.uint16)
        images = (drawings.pixels[rows, :3] * opacity + crops * (255 - opacity) + 127) // 255
        masks = torch.from_numpy(opacity[:, 0] > 127)
        return Split(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels), masks)

    shares = np.array_split(stream(seed, "share").permutation(np.concatenate(train)), clients)
    splits = [place("train", np.sort(rows), k) for k, rows in enumerate(shares)]
    sets = [place("validation", np.concatenate(held)), place("id", unseen), place("ood", unseen)]
    *pairs, validation, inside, outside = [(split.images, split.labels) for split in (*splits, *sets)]
    data = FederatedData.from_arrays(
        pairs, {"id": inside, "ood": outside}, validation=validation, classes=classes, mean=(0.5,) * 3, std=(0.3,) * 3
    )
    return replace(data, clients=tuple(splits))


# -- drawings by artist ------------------------------------------------------------------------------------------------


def _source(drawings: Drawings, clients: int, own_test: int, *, has_texts: bool) -> Source:
    train, held, own, unseen = _parts(drawings, clients, own_test)
    classes, numbers = np.unique(drawings.folders, return_inverse=True)
    texts = [f"{title}: {words}" for title, words in zip(drawings.titles, drawings.keywords, strict=True)]
    images, labels = drawings.on_white(), torch.from_numpy(numbers)
    names = tuple(str(drawings.artists[rows[0]]) for rows in train)

    def pool(parts: Sequence[Rows], *, is_grouped: bool = True) -> Pool:
        rows = torch.from_numpy(np.concatenate(parts))
        sizes = torch.tensor([len(part) for part in parts])
        return Pool(
            labels=labels[rows],
            ids=tuple(drawings.ids[rows].tolist()),
            read=lambda positions: (images[rows[positions]], None),
            groups=torch.repeat_interleave(torch.arange(len(parts)), sizes) if is_grouped else None,
            texts=tuple(texts[row] for row in rows.tolist()) if has_texts else None,
        )

    return Source(
        classes=tuple(classes.tolist()),
        train=pool(train),
        validation=pool(held),
        tests={"": pool(own), "unseen": pool([unseen], is_grouped=False)},
        mean=MEAN,
        std=STD,
        groups=clients,
        sites=names,
        named_by="the artist",
        own_tests=True,
        drawn_validation=True,
    )


def _parts(drawings: Drawings, clients: int, own_test: int) -> tuple[list[Rows], list[Rows], list[Rows], Rows]:
    """Return every client's rows for training, validation and its own test, and the rows of artists without a client.

    Drawings by a client under a longer or shorter name ("Rollandin Francesco") are in none of them.
    """
    counts = sorted(Counter(drawings.artists.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))
    fewest = counts[min(clients, len(counts)) - 1][1]
    if clients > len(counts) or fewest < own_test + 4:
        raise UserError(
            f'data set "openclipart": {clients} clients need as many artists with {own_test + 4} drawings, and there '
            f"are {sum(count >= own_test + 4 for _, count in counts)}: give fewer --clients"
        )
    train, held, own = [], [], []
    for name, count in counts[:clients]:
        order = stream(0, f"split/openclipart/{name}").permutation(np.flatnonzero(drawings.artists == name))
        end = own_test + max(2, round(0.15 * (count - own_test)))
        for part, rows in zip((own, held, train), np.split(order, [own_test, end]), strict=True):
            part.append(np.sort(rows))
    persons = [_person(name) for name, _ in counts[:clients]]
    others = [
        name for name, _ in counts if not any(_person(name) <= known or known <= _person(name) for known in persons)
    ]
    return train, held, own, np.flatnonzero(np.isin(drawings.artists, others))


def _person(name: str) -> frozenset[str]:
    """Return the words of a name in small letters, without accents and marks."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return frozenset(re.sub(r"[^\w ]", "", plain).split())


# -- files -------------------------------------------------------------------------------------------------------------


def _folder(root: str | Path | None) -> Path:
    base = need_root(root, "openclipart", "svg/animals/owl.svg and png/animals/owl.png")
    for folder in FOLDERS:
        if (base / folder / "svg").is_dir() and (base / folder / "png").is_dir():
            return base / folder
    raise UserError(
        f'data set "openclipart": {base} has no folders svg and png: unpack both packages, openclipart-svg and '
        "openclipart-png, there with dpkg-deb -x"
    )


def _read(root: str | Path | None, size: int, rendered: str) -> Drawings:
    """Return all drawings with title, keywords and artist, from the file that an earlier run left or from the packages.

    A link is another name of a drawing, and is not followed.
    """
    folder = _folder(root)
    pairs = {path: folder / "png" / path.relative_to(folder / "svg").with_suffix(".png")
             for path in sorted((folder / "svg").rglob("*.svg"))}  # fmt: skip
    pairs = {svg: png for svg, png in pairs.items() if png.is_file() and not svg.is_symlink() and not png.is_symlink()}
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for pair in pairs.items() for path in pair]
    kept = Path(rendered) if rendered else cache_folder("openclipart")
    file = kept / f"{size}-{sha256(repr(listing).encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(file) as stored:
            return Drawings(**stored)
    except (OSError, EOFError, ValueError, TypeError, BadZipFile):  # there is none, or it is damaged
        drawings = _render(folder / "svg", pairs, size)
    atomic.make_folder(kept)
    atomic.write(file, lambda temporary: _save(temporary, drawings))
    return drawings


def _save(path: Path, drawings: Drawings) -> None:
    with path.open("wb") as file:
        np.savez(file, **vars(drawings))


def _render(folder: Path, pairs: dict[Path, Path], size: int) -> Drawings:
    described = [(svg, png, *facts) for svg, png in pairs.items() if (facts := _describe(svg)) is not None]
    pixels = np.zeros((len(described), 4, size, size), dtype=np.uint8)
    run_in_threads(lambda row: _draw(described[row][1], pixels[row]), len(described))
    ids = [svg.relative_to(folder).as_posix() for svg, *_ in described]
    spellings: dict[frozenset[str], str] = {}
    artists = [spellings.setdefault(_person(artist), artist) for *_, artist, _, _ in described]
    texts = [[facts[place] for facts in described] for place in (3, 4)]
    drawings = Drawings(pixels, *(np.array(column, dtype=np.str_) for column in (ids, artists, *texts)))
    return drawings.subset(pixels[:, 3].any((1, 2)))


def _describe(svg: Path) -> tuple[str, str, str] | None:
    """Return artist, title and keywords of a drawing's RDF metadata; None if it lacks one of them or is no XML."""
    try:
        with svg.open("rb") as file:
            work = next(element for _, element in ElementTree.iterparse(file) if element.tag.endswith("}Work"))
    except (ElementTree.ParseError, StopIteration):
        return None
    artist = re.sub(r"[\[(<].*", "", work.findtext(f"{DUBLIN}creator/*/{DUBLIN}title") or "").strip()
    title = re.sub("^Clipart by .* - ", "", work.findtext(f"{DUBLIN}title") or "").replace("_", " ").strip()
    words = [(word.text or "").strip().lower() for word in work.iter() if word.tag.endswith("}li")]
    keywords = ", ".join(word.replace("_", " ") for word in words if not re.match("hash|0x|$", word))
    is_human = _person(artist) and _person(artist) != _person(title) and not artist.startswith("HASH")
    return (artist, title, keywords) if is_human and title and keywords else None


def _draw(png: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Fit a picture into the middle of ``pixels``, uint8 ``[4, S, S]``; a picture that is too large stays empty."""
    size = pixels.shape[1]
    try:
        with Image.open(png) as image:
            if image.width * image.height > MAX_PIXELS:
                return
        with open_image(png, MAX_PIXELS) as image:
            picture = image.convert("RGBA")
            scale = size / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            small = np.asarray(picture.resize((width, height), Image.Resampling.BOX, reducing_gap=4))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise unreadable("openclipart", "picture", png, error) from error
    top, left = (size - height) // 2, (size - width) // 2
    pixels[:, top : top + height, left : left + width] = small.transpose(2, 0, 1)


def _photographs(folder: Path, size: int, classes: int) -> list[npt.NDArray[np.uint8]]:
    """Return the photographs uint8 ``[3, H, W]``, each four crops high."""
    photographs = []
    for path in list_images(folder) if folder.is_dir() else ():
        with open_image(path, MAX_PIXELS) as image:
            image.draft("RGB", (8 * size, 8 * size))
            wide = image.convert("RGB").resize((max(1, round(image.width * 4 * size / image.height)), 4 * size))
            photographs.append(np.asarray(wide).transpose(2, 0, 1))
    photographs = [photograph for photograph in photographs if photograph.shape[2] >= 4 * size]
    if len(photographs) < max(classes, 1):
        raise UserError(
            f'data set "openclipart-scenes": {classes} classes need as many photographs, at least as wide as high, and '
            f"{folder} has {len(photographs)}: name another folder with --data-option grounds=DIR, or raise least"
        )
    return photographs


def _crop(
    photograph: npt.NDArray[np.uint8], size: int, rng: np.random.Generator, is_test: bool
) -> npt.NDArray[np.uint8]:
    """Cut a square from the right third of a photograph for tests, and from the rest for training."""
    border = photograph.shape[2] * 2 // 3
    low, high = (border, photograph.shape[2]) if is_test else (0, border)
    top, left = rng.integers(photograph.shape[1] - size + 1), rng.integers(low, high - size + 1)
    return photograph[:, top : top + size, left : left + size]
