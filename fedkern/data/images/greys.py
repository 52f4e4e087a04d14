"""Grey values of more than eight bits: their window, and the description of files in a run's output."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fedkern.data.images.image_files import BITS, is_deep, open_image, run_in_threads, upright_size
from fedkern.data.labels.spelling import SHOWN
from fedkern.errors import UserError, first_of, join_words

Window = tuple[float, float]
"""Stored values that become black and white."""
Set = tuple[str, str]
"""Split and site of a file, empty if unknown."""
MAX_FILES = 128
"""Most files, evenly spread, that are inspected of a data set."""
MAX_SAMPLED = 4096
"""Most pixels of a file, evenly spread, for percentiles."""
LINES = 4
"""Most lines on sets of files that differ."""
COLOURS = {"1": "black and white", "L": "grey", "LA": "grey", "F": "grey fractions", "P": "palette", "PA": "palette",
           "RGBA": "RGB"}  # fmt: skip
"""Colours by Pillow's modes."""
SPLITS = {"": "", "train": "training ", "validation": "validation ", "test": "test "}
"""Splits in words."""
ADVICE = "--data-option window=CENTRE,WIDTH keeps what matters"
STORED = "give --data-option window=CENTRE,WIDTH in stored values, often HU + 1024 (40,400 in HU is 1064,400 there)"
"""Advice where a window shows little."""
_NUMBER = r"(-?\d+(?:\.\d+)?)"


class Look(NamedTuple):
    """Facts of a file: Pillow's mode, depth and colour in words, width and height.

    For deep greys also sampled pixels, the largest value and both ends.
    """

    mode: str
    kind: str
    size: tuple[int, int]
    values: np.ndarray | None = None
    top: int | None = None
    ends: tuple[float, float] = (0.0, 0.0)


def inspect_files(paths: Sequence[Path], max_pixels: int, pixels: bool) -> dict[Path, Look]:
    """Inspect up to `MAX_FILES` readable files, with ``pixels`` including the values of deep greys."""
    paths = paths[:: max(1, -(-len(paths) // MAX_FILES))]
    looks: list[Look | None] = [None] * len(paths)

    def look(row: int) -> None:
        # Unreadable files are reported when they are decoded, if they are needed at all.
        with suppress(Exception), open_image(paths[row], max_pixels) as image:
            looks[row] = _look(image, pixels)

    run_in_threads(look, len(paths))
    return {path: look for path, look in zip(paths, looks, strict=True) if look is not None}


def _look(image: Image.Image, pixels: bool) -> Look:
    deep = is_deep(image)
    bits = re.search(r";(\d+)", f"{image.mode} {image.tile}")  # type: ignore[attr-defined]  # RGB;16B and such
    depth = bits[1] if bits else {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)
    colour = "grey" if deep else COLOURS.get(image.mode, image.mode)
    flat = Look(image.mode, f"{depth}-bit {colour}", upright_size(image))
    if not pixels or not (deep or image.mode == "F"):
        return flat
    values, top = np.asarray(image).reshape(-1), None
    low, high = float(values.min()), float(values.max())
    if deep:
        top = int(high) if low >= 0 else 2 ** BITS[-1]  # refused when it is decoded
    spread = values[:: max(1, -(-len(values) // MAX_SAMPLED))].astype(np.float64)
    return flat._replace(values=spread, top=top, ends=(low, high))


def window_of(text: str, looks: Collection[Look]) -> Window | None:
    """Parse ``CENTRE,WIDTH`` or percentiles ``LOW%,HIGH%`` of the pixels of ``looks``, or return None if empty."""
    if not text:
        return None
    if match := re.fullmatch(rf"{_NUMBER}\s*,\s*{_NUMBER}", text.strip()):
        centre, width = map(float, match.groups())
        low, high = centre - width / 2, centre + width / 2
    elif match := re.fullmatch(rf"{_NUMBER}%\s*,\s*{_NUMBER}%", text.strip()):
        ends = [float(end) for end in match.groups()]
        if not 0 <= ends[0] < ends[1] <= 100:
            raise UserError(
                f"the data option window has percentiles {text}: give two from 0 to 100, the lower one first"
            )
        values = [look.values for look in looks if look.values is not None]
        if not values:
            return None
        low, high = map(float, np.percentile(np.concatenate(values), ends))
    else:
        raise UserError(
            f'the data option window must be CENTRE,WIDTH such as 1064,400, or percentiles such as 1%,99%, not "{text}"'
        )
    if not low < high:
        raise UserError(f"the data option window={text} holds no value between {low:g} and {high:g}: give a wider one")
    return low, high


def format_window(window: Window | None) -> str:
    """Return a window as :func:`window_of` parses it."""
    return "" if window is None else f"{(window[0] + window[1]) / 2!r},{window[1] - window[0]!r}"


def pixels_outside(window: Window | None, looks: Collection[Look], advice: str = STORED) -> str:
    """Return a warning if most pixels of deep greys lie outside the window, else ``""``."""
    deep = [look for look in looks if look.values is not None]
    if window is None or not deep:
        return ""
    pixels = np.concatenate([look.values for look in deep])
    shares = {"below": np.mean(pixels < window[0]), "above": np.mean(pixels > window[1])}
    if sum(shares.values()) <= 0.5:
        return ""
    sides = [f"{100 * share:.0f} % of pixels lie {side}" for side, share in shares.items() if share >= 0.005]
    low, high = min(look.ends[0] for look in deep), max(look.ends[1] for look in deep)
    return f"{' and '.join(sides)} the window; stored values {low:,.6g} to {high:,.6g}: {advice}."


def describe_files(
    sets: Mapping[Path, Set], looks: Mapping[Path, Look], seen: tuple[str, str], bits: int, window: Window | None
) -> tuple[str, ...]:
    """Return lines on depth, size and colour of files: one for all, then at most `LINES` where sets differ.

    ``looks`` has some files of every set; ``seen`` is the size and colour of the network's input.
    """
    scaled = f"0 to {2**bits - 1:,} become 0 to 255 ({ADVICE})"
    if window is not None:
        scaled = f"window {(window[0] + window[1]) / 2:g},{window[1] - window[0]:g}"
    modes = ("I",) if window is None else ("I", "F")
    by_set: dict[Set, list[Look]] = {}
    for path in sorted(looks, key=lambda path: ([*SPLITS].index(sets[path][0]), sets[path][1])):
        by_set.setdefault(sets[path], []).append(looks[path])
    all_sites = _sites(by_set)

    def words(chosen: Collection[Set]) -> str:
        files = [look for set_name in chosen for look in by_set[set_name]]
        sizes = sorted({look.size for look in files}, key=lambda sides: (sides[0] * sides[1], sides))
        ends = dict.fromkeys(f"{width} x {height}" for width, height in (sizes[0], sizes[-1]))
        stored = f"{join_words(sorted({look.kind for look in files}))}, {' to '.join(ends)}"
        how = f", {scaled}" if any(look.mode.startswith(modes) for look in files) else ""
        return stored + how + (f" -> {' '.join(seen)}" if stored != f"8-bit {seen[1]}, {seen[0]}" else "")

    def line(chosen: Collection[Set]) -> str:
        of = {
            split: "" if sites == all_sites[split] else f" of {first_of(sites, SHOWN)}"
            for split, sites in _sites(chosen).items()
        }
        if of.keys() == all_sites.keys() and len({*of.values()}) == 1:  # the same sites of every split
            of = {"": of.popitem()[1]}
        return f"{'; '.join(f'{SPLITS[split]}images{where}' for split, where in of.items())}: {words(chosen)}"

    alike: dict[str, list[Set]] = {}
    for set_name in by_set:
        alike.setdefault(words([set_name]), []).append(set_name)
    groups = [*alike.values()]
    if len(groups) > LINES:
        groups[LINES - 1 :] = [sorted(line for group in groups[LINES - 1 :] for line in group)]
    return (line(by_set), *(line(group) for group in groups if len(groups) > 1)) if by_set else ()


def _sites(sets: Collection[Set]) -> dict[str, list[str]]:
    return {split: [site or "no site" for part, site in sets if part == split] for split, _ in sets}
