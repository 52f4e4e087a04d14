"""Tests of tables as spreadsheets write them, and of one image or patient in two places."""

import csv
import gzip
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from fedkern.data import identity, load
from fedkern.data.images.detections import BoxesFile
from fedkern.data.sources.table import parse_table, read_file
from fedkern.errors import UserError
from python_tests.data.image_sets import COLUMNS, write_mask, write_table

TEXT = "image,größe\r\na.png,1\r\nb.png,2\r\n"
ROWS = [{"image": "a.png", "größe": "1"}, {"image": "b.png", "größe": "2"}]


def rows(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_table(path, "here")[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_utf_8_and_utf_16_are_read(tmp_path, encoding, separator, end):
    text = TEXT.replace(",", separator).replace("\r\n", end)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    assert rows(tmp_path / "list.csv", mark + text.encode(encoding)) == ROWS
    assert read_file(tmp_path / "list.csv", "here") == TEXT.replace(",", separator).replace("\r\n", "\n")


OTHERS = {
    "cp1252": (TEXT.encode("cp1252"), "line 1 has the byte 0xF6, which is not UTF-8"),
    "mac_roman": (f"a\nb\n{TEXT}".encode("mac_roman"), "line 3 has the byte 0x9A, which is not UTF-8"),
    "a mark": (b"\xef\xbb\xbf" + f"a\n{TEXT}".encode("cp1252"), "line 2 has the byte 0xF6, which is not UTF-8"),
    "utf-16 without a mark": ("a,b\n1,2\n".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    "utf-16-be without a mark": (TEXT.encode("utf-16-be"), "which is not UTF-8"),
    "utf-32": (TEXT.encode("utf-32"), "it holds zero bytes, as UTF-32 does"),
    "zero": (TEXT.encode().replace(b"a.png", b"a\0png"), "it holds zero bytes"),
    "half a letter": (b"\xff\xfea", "line 1 has the byte 0x61, which is not UTF-16"),
    "gzip": (gzip.compress(TEXT.encode()), "line 1 has the byte 0x8B, which is not UTF-8"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(40), "which is not UTF-8"),
    "xlsx": (None, "it is a workbook (xlsx, ods) or another zip archive"),
}


READERS = {
    "list.csv": lambda path: load("csv", root=path),
    "caption.txt": lambda path: load("pairs", root=path.parent),
    "boxes.csv": lambda path: BoxesFile(path, []),
    "boxes.json": lambda path: BoxesFile(path, []),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("source", READERS)
def test_other_files_are_named_with_the_way_out(tmp_path, kind, source):
    path, (content, words) = tmp_path / source, OTHERS[kind]
    if content is None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("xl/workbook.xml", TEXT)
    else:
        path.write_bytes(content)
    Image.new("L", (8, 8)).save(tmp_path / "caption.png")
    with pytest.raises(UserError) as caught:
        READERS[source](path)
    begin, _, told = str(caught.value).partition(f": cannot read {path}: ")
    assert begin in ('data set "csv"', 'data set "pairs"', "boxes file")
    assert words in told
    assert told.endswith('; save it as UTF-8 text, in Excel as "CSV UTF-8"')


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["sep=", "SEP="])
def test_the_first_line_may_tell_the_separator(tmp_path, separator, mark):
    # More values of a row stand between other separators.
    text = f'{mark}{separator}\r\nimage{separator}note\r\na.png{separator}"x,y;z,w;\tv"\r\n'
    assert parsed_lines(tmp_path / "list.csv", text) == [({"image": "a.png", "note": "x,y;z,w;\tv"}, 3)]


def parsed_lines(path, text):
    path.write_text(text, newline="")
    _, found, lines, _ = parse_table(path, "here")
    return list(zip(found, lines, strict=True))


@pytest.mark.parametrize("empty", [",,", " , ,", "", ",,,,,", '"",,'])
def test_rows_without_a_value_are_no_rows(tmp_path, empty):
    text = f"{empty}\npath,label,split\na.png,x,train\n{empty}\nb.png,y,test\n" + f"{empty}\n" * 20
    found = parsed_lines(tmp_path / "list.csv", text)
    assert [(row["path"], line) for row, line in found] == [("a.png", 3), ("b.png", 5)]


@pytest.mark.parametrize("name", ["~$list.csv", "._list.csv", ".~lock.list.csv"])
@pytest.mark.parametrize("data", ["csv", "pairs", "segmentation"])
def test_what_a_program_puts_beside_a_table_is_no_table(tmp_path, name, data):
    (tmp_path / name).write_bytes(b"\x05owner\0\0")
    (tmp_path / "list.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"list\.csv has no column"):
        load(data, root=tmp_path)
    (tmp_path / "list.csv").unlink()
    with pytest.raises(UserError) as caught:
        load(data if data != "csv" else "folder", root=tmp_path)
    assert name not in str(caught.value)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("begin", [2, 3, 90])
@pytest.mark.parametrize("closed", [True, False])
def test_a_field_that_is_too_long_is_named_with_its_line(tmp_path, separator, begin, closed):
    lines = [separator.join(("path", "label"))] + [separator.join(("a.png", "x"))] * (begin - 2)
    long = "a word; of a report,\twith more\n" * (csv.field_size_limit() // 20)
    row = separator.join(("b.png", f'"{long}"' if closed else f'"{long}'))
    (tmp_path / "list.csv").write_text("\n".join([*lines, row, "c.png", ""]))
    with pytest.raises(UserError, match=rf"list\.csv, line {begin}, begins a row .*than 131,072 characters$") as caught:
        load("csv", root=tmp_path)
    assert "\n" not in str(caught.value)


# -- listing -----------------------------------------------------------------------------------------------------------


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
    *((name, {"client": "B"}, r"4\.png belongs to two clients, A \(line 6\) and B \(line 26\)")
      for name in COLUMNS),
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


# -- copies ------------------------------------------------------------------------------------------------------------


SOURCES = ["folder", *COLUMNS]
COUNT = 24


def image(number, plain=False):
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
    return Image.fromarray(np.full_like(pixels, 7 * number) if plain else pixels)


def write_copy(source, root, *, label="", client="", split="", plain=False, content=0):
    """Write images of the classes a and b at the sites A and B, and a copy with another label, client or split.

    Returns the names of the first image and of its copy.
    """
    rows = []
    for i in [*range(COUNT), COUNT]:
        row = {"label": "ab"[i // 2 % 2], "client": "AB"[i % 2], "split": ("train", "train", "test", "val")[i // 4 % 4]}
        name = f"{i}.png"
        if i == COUNT:
            given = {"label": label, "client": client, "split": split}
            row, name = rows[0] | {key: value for key, value in given.items() if value}, "z.png"
        if source == "folder":
            name = f"{row['client']}/{row['split']}/{row['label']}/{name}"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(content if i == COUNT else i, plain).save(path)
        write_mask(root / f"m{i}.png", box=(0, 0, 4, 5 if row["label"] == "b" else 3))
        rows.append({**row, "name": name, "mask": f"m{i}.png"})
    if source != "folder":
        write_table(root, f"{source},client,split", rows, files=False)
    return rows[0]["name"], rows[-1]["name"]


def get_notices(source, root, options=None, **settings):
    said, options = [], {"size": 8, "colour": "grey", **(options or {})}
    load(source, root=root, options=options, identify=True, notice=said.append, **settings)
    return [text for text in said if text.startswith("Equal images")]


@pytest.mark.parametrize("source", SOURCES)
def test_an_image_with_two_labels(source, tmp_path):
    image, copy = write_copy(source, tmp_path, label="b")
    kind = "masks" if source == "segmentation" else "labels, a and b"
    with pytest.raises(UserError, match=f"{image} and {copy} are the same image with two {kind}; leave one of the two"):
        get_notices(source, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"partition": "iid", "clients": 2}, {"train_samples": 10}], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_an_image_at_two_clients(source, settings, tmp_path):
    original, copy = write_copy(source, tmp_path, client="B")
    (text,) = get_notices(source, tmp_path, **settings)
    where = "" if settings.get("partition") else " (at the clients A and B)"
    expected = f"Equal images under several names count as often: {original} and {copy}{where}."
    # Images that the run uses come before others of the file.
    assert sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", expected))


@pytest.mark.parametrize(("split", "where"), [("", ""), ("test", " (in the sets train and test)")])
@pytest.mark.parametrize("source", SOURCES)
def test_a_copy_in_the_same_set_or_in_another(source, split, where, tmp_path):
    original, copy = write_copy(source, tmp_path, split=split)
    assert get_notices(source, tmp_path) == [
        f"Equal images under several names count as often: {original} and {copy}{where}."
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_plain_pictures_are_alike_without_being_copies(source, tmp_path):
    original, copy = write_copy(source, tmp_path, label="b", plain=True)
    (text,) = get_notices(source, tmp_path)
    assert f"{original} and {copy} (with two {'masks' if source == 'segmentation' else 'labels, a and b'})" in text


@pytest.mark.parametrize("source", SOURCES)
def test_other_images_are_none(source, tmp_path):
    write_copy(source, tmp_path, content=COUNT)
    assert get_notices(source, tmp_path) == []


@pytest.mark.parametrize("settings", [{"train_samples": 15}, {"public_samples": 4}], ids=str)
def test_every_image_of_the_run_is_compared(settings, tmp_path, monkeypatch):
    """All images are compared, also where the data's identity rests on a few training images."""
    write_copy("csv", tmp_path, content=COUNT)
    with (tmp_path / "list.csv").open("a") as table:
        for copy in "wxyz":
            shutil.copy(tmp_path / "1.png", tmp_path / f"1{copy}.png")
            table.write(f"1{copy}.png,a,B,train\n")
    monkeypatch.setattr(identity, "SAMPLED_IMAGES", 1)
    (text,) = get_notices("csv", tmp_path, **settings)
    assert re.search(r": 1[wxyz]?.png and 1[wxyz].png\.$", text)


def test_many_copies_are_counted(tmp_path):
    write_copy("csv", tmp_path)
    with (tmp_path / "list.csv").open("a") as table:
        for i in range(1, 12):
            shutil.copy(tmp_path / f"{i}.png", tmp_path / f"again{i}.png")
            table.write(f"again{i}.png,{'ab'[i // 2 % 2]},{'AB'[i % 2]},{('train', 'train', 'test')[i // 4]}\n")
    (text,) = get_notices("csv", tmp_path)
    assert text.endswith(" more.")
    assert len(text) < 400


def test_images_on_disk_are_looked_at_as_well(tmp_path):
    root = tmp_path / "data"
    original, copy = write_copy("csv", root, client="B")
    for _ in range(2):
        (text,) = get_notices("csv", root, cache=tmp_path / "cache")
        assert f"{original} and {copy} (at the clients A and B)" in text
