"""Radiographs with their reports, listed in a CSV file like the tables of MIMIC-CXR.

FedDRA as near to its released code as the paper's data allow (docs/methods/feddra.md, 9):

    python -m fedkern.run feddra --data examples/papers/reports.py:reports --data-root DIR \\
        --image-encoder FOLDER --text-encoder FOLDER --client-test 0.2 \\
        --rounds 25 --local-steps 50 --batch-size 72 --lr 2e-5 --buffers average \\
        --data-option size=256 --data-option crop=224 --data-option colour=rgb --data-option views=frontal \\
        --method-option dro_apply=loss_code --method-option loss_split=train
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedkern import UserError, register_data
from fedkern.data import Option, Reading, Source, to_source
from fedkern.data.labels.spelling import parse_number
from fedkern.data.sources.table import AUTO, Table, open_table

IMAGE = ("image", "path", "image_path", "filename", "file")
REPORT = ("report", "text", "caption", "note")
LABEL = ("label", "finding", "diagnosis")
VIEW = ("view", "viewposition", "view_position")
# Columns of the CheXpert labeller, which come with MIMIC-CXR: 1 positive, 0 negative, -1 uncertain, or empty.
CHEXPERT = (
    "atelectasis", "cardiomegaly", "consolidation", "edema", "enlarged cardiomediastinum", "fracture", "lung lesion",
    "lung opacity", "no finding", "pleural effusion", "pleural other", "pneumonia", "pneumothorax", "support devices",
)  # fmt: skip
FRONTAL = ("pa", "ap")
# Words beside PA or AP that keep an image frontal.  All other words exclude it, such as MIMIC-CXR's "AP AXIAL"
# (lordotic) and "AP LLD" (lying on one side).
POSTURES = {
    "bedside", "chest", "erect", "frontal", "mobile", "portable", "projection", "semi", "semierect", "semiupright",
    "single", "sitting", "standing", "supine", "upright", "view",
}  # fmt: skip
UNLABELLED = "unlabelled"
_WORD = re.compile("[a-z0-9]+")
_COLUMN = "CSV column with {}, by default found by its name"

SECTIONS = ("impression", "findings")
# Sections beside `SECTIONS`.  Any other word before a colon ("Lungs:", "LINES AND TUBES:") is part of the text.
OTHERS = (
    "addendum", "attending", "clinical data", "clinical details", "clinical history", "clinical impression",
    "clinical indication", "clinical information", "comment", "comments", "comparison", "comparison exam",
    "comparison film", "comparisons", "conclusion", "conclusions", "dictated by", "dose", "electronically signed by",
    "exam", "exam type", "examination", "history", "indication", "indications", "interpreted by", "medical condition",
    "notification", "notifications", "patient history", "prior studies", "procedure", "provisional findings impression",
    "reason for exam", "reason for examination", "reason for study", "reason for this examination", "recommendation",
    "recommendations", "recommendation(s)", "reference exam", "referring physician", "reviewed by", "signed by",
    "study", "technique", "transcribed by", "type of exam", "type of examination", "wet read",
)  # fmt: skip
_NAME = "|".join(
    [r"(?:(?:additional|final|limited|other|preliminary)[ \t]+)?(?:impressions?|findings?)"]
    + [re.escape(name) for name in sorted(OTHERS, key=len, reverse=True)]
)
_BETWEEN = r"[ \t]*(?:\band\b|\bor\b|[&/,+])[ \t]*"
# "FINDINGS AND IMPRESSION:", "Findings (chest):".  A header may stand anywhere: some tables have lost the line breaks.
_HEADER = re.compile(
    rf"(?im)(?<![a-z0-9])((?:{_NAME})(?:{_BETWEEN}(?:{_NAME}))*)(?:[ \t]*\([^()\n]{{1,40}}\))?"
    r"(?:[ \t]*(:)|[ \t*_]*\r?$)"
)
_ENDS = "\n.;:!?)*_"  # of a line or sentence
_NUMBERED = re.compile(r"(?:^|(?<=\s))\d+[.)](?=\s)")
_BLANKED = re.compile(r"_{2,}")  # what MIMIC's de-identification leaves


@register_data("reports", clients=5, partition="dirichlet:0.5", task="retrieval", prompts="{class}")
def reports(
    root: str | Path | None = None,
    *,
    reading: Reading,
    colour: str = Option("grey", "three channels, or one", choices=("rgb", "grey")),
    crop: int = Option(
        0,
        "side of the window that networks see, anywhere in training images, central in others; 0: whole images",
        low=0,
    ),
    views: str = Option(
        "known", "PA and AP alone, these and rows that name no view, or all", choices=("frontal", "known", "all")
    ),
    longest: int = Option(112, "tokens kept of a report", low=1),
    shortest: int = Option(3, "rows with fewer tokens are left out", low=1),
    image: str = Option("", _COLUMN.format("the image files")),
    report: str = Option("", _COLUMN.format("the reports")),
    label: str = Option("", _COLUMN.format("the labels")),
    view: str = Option("", _COLUMN.format("the views")),
    split: str = Option("", _COLUMN.format("the splits")),
    patient: str = Option(
        AUTO, "CSV column with the patients, auto: found by its name, empty: no column names patients"
    ),
    client_column: str = Option(
        "", "CSV column that names every row's client; by default client, site or hospital where there is one"
    ),
) -> Source:
    """Radiographs with reports as in MIMIC-CXR: a CSV file with image,report[,label][,view][,site][,split].

    Columns (upper or lower case; only image and report are required):

    - ``image`` (or path, filename): the image file, relative to the CSV file's folder.
    - ``impression`` and ``findings``, or ``report`` (or text, note): the report.  Of a whole report only the sections
      impression and findings are kept, if it has them.
    - ``label`` (or finding), or CheXpert's fourteen columns, of which the first positive one is the label.  Without a
      positive one, the label is "unlabelled" where a finding is uncertain (-1), else "no finding".
    - ``view`` (or ViewPosition).
    - those of `fedkern.data.sources.table.open_table`.

    Reports become lower-cased tokens (:func:`clean`).

    Args:
        root: the CSV file, or a folder with that one CSV file.
        reading: how files become images, with black bars where they are not square.
        views: which rows are kept.  ``"frontal"``: rows whose view is PA or AP, alone or with the patient's posture
            ("AP portable"), but not lying on one side or axial ("AP LLD", "AP AXIAL").  ``"known"``: frontal rows and
            rows that name no view.  ``"all"``: all rows.
        image, report, label, view, split, patient, client_column: columns of the file, see `table.open_table`; a named
            ``report`` replaces ``impression`` and ``findings`` too.

    Raises:
        UserError: anything wrong with the file or an image it names, or no row left.
    """
    columns = {"image": image, "report": report, "label": label, "view": view, "split": split, "patient": patient,
               "client_column": client_column}  # fmt: skip
    table = open_table(root, "reports", ("image", "report"), columns)
    path = table.path
    images, texts = _column(table, IMAGE), _reports(table)
    if images is None or texts is None:
        missing = "image" if images is None else "report (or impression and findings)"
        option = missing.split()[0]
        raise UserError(
            f'data set "reports": {path} has no column "{missing}"; it has {", ".join(table.rows[0])}: name the column '
            f"to take for it with --data-option {option}=COLUMN"
        )
    if shortest > longest:
        raise UserError(f'data set "reports": shortest is {shortest}, more than longest, {longest}')
    texts = [clean(text, longest) for text in texts]
    long_enough = [len(text.split()) >= shortest for text in texts]
    seen = _seen(table, views)
    rows = [row for row in range(len(texts)) if long_enough[row] and seen[row]]
    if not rows:
        raise UserError(
            f'data set "reports": none of the {len(texts)} rows of {path} is left: {sum(seen)} have a view that counts '
            f"(views={views}) and {sum(long_enough)} a report of at least {shortest} tokens"
        )
    table = replace(table, rows=[table.rows[row] for row in rows], lines=[table.lines[row] for row in rows])
    labels = _labels(table)
    classes, numbers = table.classes(labels)
    listing = table.listing(images, numbers, [texts[row] for row in rows])
    return to_source("reports", listing, classes, replace(reading, pad=True))


def _column(table: Table, names: Sequence[str]) -> str | None:
    """Return the first of ``names`` that is a column of the table; None if none is."""
    return next((name for name in names if name in table.rows[0]), None)


def _reports(table: Table) -> list[str] | None:
    present = [name for name in SECTIONS if name in table.rows[0]] if "report" not in table.chosen else []
    parts = [table.column(name) for name in present]
    joined = [" ".join(part for part in row if part) for row in zip(*parts, strict=True)] if parts else None
    whole = _column(table, REPORT)
    if whole is None:
        return joined
    texts = [impression_and_findings(text) for text in table.column(whole)]
    return texts if joined is None else [own or text for own, text in zip(joined, texts, strict=True)]


def _seen(table: Table, views: str) -> list[bool]:
    column = _column(table, VIEW)
    if views == "all" or (column is None and views == "known"):
        return [True] * len(table.rows)
    if column is None:
        raise UserError(
            f'data set "reports": {table.path} has no column "view" to tell frontal images by; take views=all'
        )
    named = [_WORD.findall(view.lower()) for view in table.column(column)]
    return [_frontal(words) if words else views == "known" for words in named]


def _frontal(words: Sequence[str]) -> bool:
    return words[0] in FRONTAL and POSTURES.union(FRONTAL).issuperset(words)


def _labels(table: Table) -> list[str]:
    column = _column(table, LABEL)
    if column is not None:
        return [label or UNLABELLED for label in table.column(column)]
    findings = [name for name in table.rows[0] if name in CHEXPERT]
    if not findings:
        return [UNLABELLED] * len(table.rows)
    labels, uncertain = [], 0
    for row in table.rows:
        values = {name: parse_number(row[name]) for name in findings}
        label = next((name for name, value in values.items() if value == 1), None)
        unsure = label is None and -1 in values.values()
        uncertain += unsure
        labels.append(label or (UNLABELLED if unsure else "no finding"))
    if uncertain:
        table.notices.append(
            f"Rows of {table.path.name} without a positive finding and with an uncertain one (-1): {uncertain}; their "
            f'label is "{UNLABELLED}", not "no finding".'
        )
    return labels


def sections(report: str) -> dict[str, str]:
    """Return the sections of a report by name; a section headed impression and findings together counts as impression.

    A header is a name of `SECTIONS` or `OTHERS` in one of these forms:

    - with a capital first letter and a colon, anywhere;
    - with a small first letter and a colon, where a line or sentence begins;
    - with a capital first letter and without a colon, on a line of its own.
    """
    headers = [header for header in _HEADER.finditer(report) if _heads(header)]
    bounds = [header.start() for header in headers] + [len(report)]
    found: dict[str, str] = {}
    for header, end in zip(headers, bounds[1:], strict=True):
        name = _section(header.group(1).lower())
        found[name] = f"{found.get(name, '')} {report[header.end() : end]}".strip()
    return found


def _heads(header: re.Match[str]) -> bool:
    before, capital = header.string[: header.start()].rstrip(" \t"), header.group(1)[0].isupper()
    if header.group(2):
        return capital or before[-1:] in _ENDS
    return capital and before.rstrip(" \t*_#")[-1:] in "\n"


def _section(header: str) -> str:
    named = {part.split()[-1].removesuffix("s") for part in re.split(_BETWEEN, header) if part not in OTHERS}
    return next((name for name in SECTIONS if name.removesuffix("s") in named), header)


def impression_and_findings(report: str) -> str:
    """Return the sections impression and findings of a report, in this order; the whole report if it has neither."""
    parts = sections(report)
    wanted = [parts[name] for name in SECTIONS if parts.get(name)]
    return " ".join(wanted) if wanted else report


def clean(text: str, longest: int) -> str:
    r"""Lower-cased ``\w+`` tokens, at most ``longest`` of them.

    The numbers of a numbered list and the blanks of de-identified reports are left out.
    """
    words = re.findall(r"\w+", _NUMBERED.sub(" ", _BLANKED.sub(" ", text)).lower())
    return " ".join(words[:longest])
