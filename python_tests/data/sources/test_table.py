"""Tests of tables and texts as spreadsheets write them: encodings, workbooks, Excel's marks, long fields."""

import csv
import gzip
import zipfile

import pytest
from PIL import Image

from fedkern.data import load
from fedkern.data.images.detections import BoxesFile
from fedkern.data.sources.table import parse_table, read_file
from fedkern.errors import UserError

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
