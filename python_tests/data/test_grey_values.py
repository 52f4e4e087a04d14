"""Grey images of more than eight bits, as scanners export them."""

import numpy as np
import pytest
from PIL import Image

from fedkern.data import load
from fedkern.errors import UserError

RAMP = np.linspace(0, 1, 16 * 16).reshape(16, 16)


def written(path, top, kind=np.uint16):
    values = RAMP * top if kind == np.float32 else np.rint(RAMP * top)
    Image.fromarray(values.astype(kind)).save(path)


def opened(root, name="pairs", **options):
    return load(name, root=root, clients=2, partition="iid", options={"size": 16, "colour": "grey", **options})


def write_all(root, suffix, top, kind):
    lines = ["image,path,text,report,label"]
    for i in range(12):
        written(root / f"{i}.{suffix}", top, kind)
        lines.append(f"{i}.{suffix},{i}.{suffix},number {i} is here,number {i} is here,{'ab'[i % 2]}")
        (root / f"{i}.txt").write_text("words")
    return lines


def big_endian(path, top):
    """A TIFF of the other byte order: Pillow's mode I;16B."""
    Image.frombytes("I;16B", (16, 16), np.rint(RAMP * top).astype(">u2").tobytes()).save(path)


def assert_ramps(data):
    for split in (*data.clients, data.validation, *data.tests.values()):
        for image in split.images:
            for channel in image:
                assert np.abs(channel.numpy() - 255 * RAMP).max() <= 1


@pytest.mark.parametrize("colour", ["grey", "rgb"])
@pytest.mark.parametrize(
    ("suffix", "top", "kind"),
    [
        ("png", 65535, np.uint16),
        ("tif", 65535, np.uint16),
        ("png", 4095, np.uint16),
        ("png", 255, np.uint16),
        ("tif", 65535, np.int32),
        ("tif", 4095, np.int32),
        ("tif", 1, np.float32),
    ],
)
def test_no_grey_value_is_cut_off(tmp_path, suffix, top, kind, colour):
    lines = write_all(tmp_path, suffix, top, kind)
    assert_ramps(opened(tmp_path, colour=colour))
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    for name in ("pairs", "reports", "csv"):
        assert_ramps(opened(table, name, colour=colour))


def test_no_grey_value_is_cut_off_in_class_folders(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            written(tmp_path / label / f"{i}.png", 65535)
    assert_ramps(opened(tmp_path, "folder"))


def test_the_other_byte_order(tmp_path):
    write_all(tmp_path, "tif", 65535, np.uint16)
    big_endian(tmp_path / "3.tif", 65535)
    with Image.open(tmp_path / "3.tif") as image:
        assert image.mode == "I;16B"
    assert_ramps(opened(tmp_path))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            RAMP.astype(np.float32) * 300,
            r"3\.tif holds grey values from 0 to 300, expected fractions from 0 to 1; choose",
        ),
        (RAMP.astype(np.float32) - 0.5, "values from -0.5 to 0.5"),
        (np.full((16, 16), np.nan, np.float32), "values from nan to nan"),
        ((RAMP * 3000 - 1000).astype(np.int32), "values from -1000 to 2000, expected whole numbers from 0 to 65535"),
        ((RAMP * 1e6).astype(np.int32), r"values from 0 to 1e\+06, expected whole numbers"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, image, words):
    write_all(tmp_path, "tif", 1, np.float32)
    Image.fromarray(image).save(tmp_path / "3.tif")
    with pytest.raises(UserError, match=words) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
