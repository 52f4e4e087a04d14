"""Labels in cells and folder names: several per image, and values written in several ways (numbers, Unicode, case)."""

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from fedkern.errors import UserError, first_of

ANY = "any"
"""Class of images with a text and no label."""
MISSING = frozenset({
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
"""Values that pandas reads as missing, besides an empty cell."""
SHOWN = 3
"""Most values in a sentence."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


def clean_cell(value: str) -> str:
    """Strip a cell, and return ``""`` for a missing value."""
    value = value.strip()
    return "" if value in MISSING else value


def describe_missing(cells: Iterable[str], noun: str) -> list[str]:
    """Return a sentence on cells that count as empty, if there are any."""
    counts = Counter(value for cell in cells if (value := cell.strip()) in MISSING)
    values = ", ".join(f"{value} ({count})" for value, count in counts.most_common())
    return [f"{noun} that count as empty: {values}."] if counts else []


def parse_number(value: str) -> Decimal | None:
    """Return the exact number that a text is, or None."""
    return Decimal(value) if _NUMBER.fullmatch(value) else None


def unify_spelling(values: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """Return the values in their shortest spelling, and notices on other spellings.

    Equal numbers and texts with equal Unicode normal forms are one value.  Values that differ only in case or spaces
    stay separate, with a notice.
    """
    spellings: dict[Hashable, list[str]] = {}
    for value in dict.fromkeys(values):
        spellings.setdefault(_key(value), []).append(value)
    spelling_of = {key: min(spelled, key=lambda text: (len(text), text)) for key, spelled in spellings.items()}
    alike: dict[Hashable, list[str]] = {}
    for text in spelling_of.values():
        alike.setdefault(_fold_text(text), []).append(text)
    notices = []
    for groups, phrase in (
        (spellings, "writes one value in several ways, which count as one"),
        (alike, "has values that differ only in case or spaces and do not count as one"),
    ):
        if several := [sorted(texts) for texts in groups.values() if len(texts) > 1]:
            examples = [", ".join(_quote_text(text, group) for text in group[:SHOWN]) for group in several]
            notices.append(f"{where} {phrase}: {first_of(examples, SHOWN, '; ')}.")
    return [spelling_of[_key(value)] for value in values], notices


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return distinct names, sorted by value if all are numbers, else as texts."""
    distinct = set(names)
    numbers = {name: value for name in distinct if (value := parse_number(name)) is not None}
    return tuple(sorted(distinct, key=numbers.__getitem__ if len(numbers) == len(distinct) else None))


def classes_of(
    labels: Sequence[str], where: str, order: str = ""
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], list[str]]:
    """Return class names, every row's class, int64 ``[n]``, and notices.

    ``order`` lists all classes once, joined by ``|``; empty: sorted, see :func:`sort_names`.
    """
    labels, notices = unify_spelling(labels, where)
    classes = _in_order(order, sort_names(labels), where) if order else sort_names(labels)
    place = {name: label for label, name in enumerate(classes)}
    return classes, np.array([place[name] for name in labels], dtype=np.int64), notices


def _in_order(order: str, classes: Sequence[str], where: str) -> tuple[str, ...]:
    names = {_key(name): name for name in classes}
    written = [name.strip() for name in order.split("|")]
    counts = Counter(map(_key, written))
    wrong = [f'"{name}" is no class' for name in dict.fromkeys(written) if _key(name) not in names]
    wrong += [f'"{names[key]}" is there {count} times' for key, count in counts.items() if count > 1 and key in names]
    wrong += [f'"{name}" is missing' for key, name in names.items() if key not in counts]
    if wrong:
        raise UserError(
            f"order must name every class once, and of those of {where[:1].lower()}{where[1:]}, {', '.join(wrong)}."
        )
    return tuple(names[key] for key in counts)


def _key(value: str) -> Hashable:
    amount = parse_number(value)
    return unicodedata.normalize("NFC", value) if amount is None else amount


def _fold_text(value: str) -> str:
    """Remove invisible differences: case, spaces, zero-width characters, compatible forms."""
    plain = unicodedata.normalize("NFKC", value).casefold()
    return "".join(char for char in plain if not char.isspace() and unicodedata.category(char)[0] != "C")


def _quote_text(text: str, among: Sequence[str]) -> str:
    """Quote a text, or return its ascii() if it looks on screen like another one: two Unicode forms may."""
    plain_forms = {unicodedata.normalize("NFKC", "".join(text_of_group.split())) for text_of_group in among}
    return f'"{text}"' if len(plain_forms) == len(among) else ascii(text)


COLUMN = "labels"
"""Column with several labels per image; a column ``label`` with one class per image takes precedence."""
SEPARATOR = "|"


def check_several(counts: Sequence[int], task: str, where: str, single: str, several: str) -> None:
    """Raise UserError for one-hot labels that the user has not declared as several labels per image.

    They look like classes, which have another loss and other metrics and methods.  ``single`` and ``several``: advice
    for both cases.
    """
    if task == "auto" and len(counts) and set(counts) == {1}:
        raise UserError(
            f"{where}: every image has exactly one label; where these are classes, {single}; where an image may have "
            f"several labels or none, {several}"
        )


def parse_label_sets(
    cells: Sequence[str], where: str, data: str, order: str = ""
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8], list[str]]:
    """Return label names, uint8 ``[n, L]`` (1 where the row has the label), and notices on spelling.

    ``order`` is as in `classes_of`.
    """
    parts = [[part.strip() for part in cell.split(SEPARATOR)] for cell in cells]
    split = [[part for part in row if clean_cell(part)] for row in parts]
    names, numbers, notices = classes_of([name for row in split for name in row], where[:1].upper() + where[1:], order)
    if not names:
        raise UserError(f'data set "{data}": {where} names no label, expected two or more, joined by "{SEPARATOR}"')
    notices = [*describe_missing((part for row in parts for part in row), f"Labels of {where}"), *notices]
    sets = np.zeros((len(split), len(names)), dtype=np.uint8)
    sets[np.repeat(np.arange(len(split)), [len(row) for row in split]), numbers] = 1
    return names, sets, notices
