"""Radiographs with their reports, listed in a CSV file like the tables of MIMIC-CXR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedkern.data.labels.spelling import number
from fedkern.data.sources.listing import Listing, Reading, to_source
from fedkern.data.sources.table import Table, open_table
from fedkern.data.sources.texts import clean, impression_and_findings, length
from fedkern.data.types import Source
from fedkern.errors import UserError

IMAGE = ("image", "path", "image_path", "filename", "file")
REPORT = ("report", "text", "caption", "note")
SECTION = ("impression", "findings")
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


def open_reports(
    root: str | Path | None, reading: Reading, views: str, longest: int, shortest: int, **chosen: str
) -> Source:
    """Reads a CSV file of radiographs and reports.

    Columns (upper or lower case; only image and report are required):

    - ``image`` (or path, filename): the image file, relative to the CSV file's folder.
    - ``impression`` and ``findings``, or ``report`` (or text, note): the report.  Of a whole report only the sections
      impression and findings are kept, if it has them.
    - ``label`` (or finding), or CheXpert's fourteen columns, of which the first positive one is the label.  Without a
      positive one, the label is "unlabelled" where a finding is uncertain (-1), else "no finding".
    - ``view`` (or ViewPosition).
    - those of `fedkern.data.sources.table.open_table`.

    Reports become lower-cased tokens (:func:`fedkern.data.sources.texts.clean`).

    Args:
        root: the CSV file, or a folder with that one CSV file.
        reading: how files become images, with black bars where they are not square.  The published crop is 224 of 256
            pixels (FedDRA; docs/methods/baselines.md, 6.5).
        views: which rows are kept.  ``"frontal"``: rows whose view is PA or AP, alone or with the patient's posture
            ("AP portable"), but not lying on one side or axial ("AP LLD", "AP AXIAL").  ``"known"``: frontal rows and
            rows that name no view.  ``"all"``: all rows.
        **chosen: columns of the file, see `table.open_table`; a chosen ``report`` replaces ``impression``
            and ``findings`` too.

    The other arguments are options of the data set (`fedkern.data.registry.DATASETS`).

    Raises:
        UserError: anything wrong with the file or an image it names, or no row left.
    """
    table = open_table(root, "reports", ("image", "report"), chosen, required=())
    path = table.path
    image = _column(table, IMAGE)
    reports = _reports(table)
    if image is None or reports is None:
        missing = "image" if image is None else "report (or impression and findings)"
        option = missing.split()[0]
        raise UserError(
            f'data set "reports": {path} has no column "{missing}"; it has {", ".join(table.rows[0])}: name the column '
            f"to take for it with --data-option {option}=COLUMN"
        )
    if shortest > longest:
        raise UserError(f'data set "reports": shortest is {shortest}, more than longest, {longest}')
    texts = [clean(report, longest) for report in reports]
    long_enough = [length(text) >= shortest for text in texts]
    seen = _seen(table, views)
    rows = [row for row in range(len(texts)) if long_enough[row] and seen[row]]
    if not rows:
        raise UserError(
            f'data set "reports": none of the {len(texts)} rows of {path} is left: {sum(seen)} have a view that counts '
            f"(views={views}) and {sum(long_enough)} a report of at least {shortest} tokens"
        )
    table = table.only(rows)
    labels = _labels(table)
    classes, numbers = table.classes(labels)
    listing = Listing(labels=numbers, texts=[texts[row] for row in rows], **table.listed(image))
    return to_source("reports", listing, classes, replace(reading, pad=True))


def _column(table: Table, names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column of the table; None if none is."""
    return next((name for name in names if name in table.rows[0]), None)


def _reports(table: Table) -> list[str] | None:
    present = [name for name in SECTION if name in table.rows[0]] if "report" not in table.chosen else []
    parts = [table.column(name) for name in present]
    joined = [" ".join(part for part in row if part) for row in zip(*parts, strict=True)] if parts else None
    whole = _column(table, REPORT)
    if whole is None:
        return joined
    texts = [impression_and_findings(report) for report in table.column(whole)]
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
        values = {name: number(row[name]) for name in findings}
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
