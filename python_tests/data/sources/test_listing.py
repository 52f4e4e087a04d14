"""Tests of one image or patient in two places: two labels, masks, clients, patients or splits are refused."""

import pytest
from PIL import Image

from fedkern.data import load
from fedkern.errors import UserError
from python_tests.data.image_sets import COLUMNS, write_table


def read(name, root, change=lambda line, row: None, again=(), said=None, rows=24, **options):
    """Read a table of ``rows`` images, two per patient.

    ``change`` edits a row, and ``again`` holds further rows.
    """
    listed = []
    for i in [*range(rows), *again]:
        row = {
            "name": f"{i}.png",
            "value": i,
            "box": (0, 0, 4, 4 + i % 4),
            "label": "ab"[i // 2 % 2],
            "text": f"text {i}",
        }
        row |= {
            "client": "AB"[i % 2],
            "patient_id": f"p{i // 2}",
            "split": ["train", "train", "test", "val"][i // 2 % 4],
        }
        if len(listed) >= rows or i not in again:
            change(len(listed) + 1, row)
        listed.append(row)
    write_table(root, f"{name},client,patient_id,split", listed)
    return load(name, root=root, options={"size": 8, "colour": "grey", **options}, notice=said)


def edit(**values):
    """Return a change of the row in line 6 (image 4.png, patient p2) and of the further rows."""

    def change(line, row):
        if line == 5 or line > 24:
            row.update(values)

    return change


@pytest.mark.sampled
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(("split", "second"), [("train", "test"), ("val", "test"), ("test", "train"), ("train", "val")])
def test_a_patient_in_two_splits(tmp_path, name, split, second):
    def change(line, row):
        if row["patient_id"] == "p2":
            row["split"] = split if line == 5 else second

    words = {"val": "validation"}
    with pytest.raises(
        UserError,
        match=rf"the patient p2 has images in two splits, {words.get(split, split)} \(line 6\) and "
        rf"{words.get(second, second)} \(line 7\); .* give --data-option patient=$",
    ):
        read(name, tmp_path, change)
    data = read(name, tmp_path, change, patient="")
    assert all(part.patients is None for part in (*data.clients, *data.tests.values()))


def test_a_patient_in_two_splits_of_a_chosen_column(tmp_path):
    change = edit(split="test", client="x")
    with pytest.raises(UserError, match="the patient x has images in two splits"):
        read("csv", tmp_path, lambda line, row: (change(line, row), row.update(client="x")), patient="client")
    assert read("csv", tmp_path, change, patient="split").tests  # every split is a patient


@pytest.mark.parametrize(("name", "values", "words"), [
    ("csv", {"label": "c"}, r"4\.png has two labels, a \(line 6\) and c \(line 26\)"),
    ("pairs", {"label": "c"}, r"4\.png has two labels, a \(line 6\) and c \(line 26\)"),
    ("segmentation", {"mask": "m5.png"}, r"4\.png has two masks, m4.png \(line 6\) and m5.png \(line 26\)"),
    *(
        (name, {"client": "B"}, r"4\.png belongs to two clients, A \(line 6\) and B \(line 26\)")
        for name in COLUMNS
    ),
    *((name, {"patient_id": "p9"}, r"4\.png belongs to two patients, p2 \(line 6\) and p9") for name in COLUMNS),
    *((name, {"split": "train"}, r"4\.png is in two splits, test \(line 6\) and train") for name in COLUMNS),
])  # fmt: skip
def test_an_image_in_two_places(tmp_path, name, values, words):
    change = edit(**values)
    with pytest.raises(UserError, match=f"the image {words}.*; name one$"):
        read(name, tmp_path, lambda line, row: change(line, row) if line > 24 else None, again=[4])


def test_an_image_with_two_sets_of_labels(tmp_path):
    for i in range(12):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    cells = ["a|b", "", "b"] * 4
    lines = ["path,labels", *(f"{i}.png,{cell}" for i, cell in enumerate(cells)), "./0.png,"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"the image 0\.png has two labels, a\|b \(line 2\) and none \(line 14\)"):
        load("csv", root=tmp_path)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_row_that_stands_twice_is_told(tmp_path, name):
    said = []
    data = read(name, tmp_path, again=[0, 8, 0], said=said.append)
    assert said == ["Images that are listed more than once count as often: 0.png (3 times), 8.png (2 times)."]
    assert sum(map(len, data.clients)) == 12 + 3
