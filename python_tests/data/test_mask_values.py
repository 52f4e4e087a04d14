"""Tests of masks as a viewer shows them, and of their class numbers: palettes, negatives."""

import struct

import numpy as np
import pytest
from PIL import Image

from fedkern.data import load
from fedkern.data.images.image_files import read_mask
from fedkern.errors import UserError

SHOWN = (np.indices((8, 8)).sum(0) % 3 == 0).astype(np.uint8)
"""1 where the masks show an object."""
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128]


def write_palette(path, indices, palette, **options):
    """Write an image of the mode P with a ``palette`` of any length."""
    image = Image.frombytes("P", indices.shape[::-1], np.ascontiguousarray(indices, dtype=np.uint8).tobytes())
    image.putpalette(palette)
    image.save(path, **options)


def values(path):
    Image.new("L", (8, 8)).save(path.with_name("image.png"))
    return read_mask(path.with_name("image.png"), path, "segmentation", size=8)


@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
@pytest.mark.parametrize(
    ("indices", "palette", "expected"),
    [
        (SHOWN, [0, 0, 0, 255, 255, 255], SHOWN * 255),
        (1 - SHOWN, [255, 255, 255, 0, 0, 0], SHOWN * 255),
        (SHOWN * 0, [255, 255, 255], SHOWN * 0 + 255),
        (SHOWN * 0, [0, 0, 0], SHOWN * 0),
        (1 - SHOWN, [1, 1, 1, 0, 0, 0], SHOWN),
        (2 - 2 * SHOWN, [2, 2, 2, 1, 1, 1, 0, 0, 0], 2 * SHOWN),
        (SHOWN * 2, VOC, SHOWN * 2),
        (SHOWN * 7, VOC, SHOWN * 7),  # black and grey of a palette with colours
        (SHOWN, [255, 255, 255, 255, 0, 0], SHOWN),
        (SHOWN * 0, VOC, SHOWN * 0),
    ],
)
def test_greys_of_a_palette_count_as_shown_and_colours_by_position(tmp_path, suffix, indices, palette, expected):
    path = tmp_path / f"mask.{suffix}"
    write_palette(path, indices, palette, **({"optimize": False} if suffix == "gif" else {}))
    assert np.array_equal(values(path), expected)


@pytest.mark.parametrize(("indices", "palette", "options", "words"), [
    (1 - SHOWN, [255, 255, 255, 0, 0, 0, 255, 0, 0], {}, "shows greys alone, in another order than its values"),
    (SHOWN, [9, 9, 9, 9, 9, 9], {}, "does not give every value a colour of its own"),
    (SHOWN, [9, 0, 0, 9, 0, 0], {}, "does not give every value a colour of its own"),
    (SHOWN, [0, 0, 0, 255, 255, 255], {"transparency": 1}, "has a transparent grey"),
])  # fmt: skip
def test_a_palette_that_can_be_read_in_two_ways_is_refused(tmp_path, indices, palette, options, words):
    path = tmp_path / "mask.png"
    write_palette(path, indices, palette, **options)
    with pytest.raises(UserError, match=f"{words}, in the mask .*mask.png; save it as a grey image") as caught:
        values(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.uint8, bool])
def test_a_negative_mask_is_read_as_shown(tmp_path, kind):
    path = tmp_path / "mask.tif"
    Image.fromarray((SHOWN * 255).astype(kind)).save(path, tiffinfo={262: 0})
    assert np.array_equal(values(path) > 0, SHOWN)


def test_a_negative_mask_of_16_bits_is_refused(tmp_path):
    path = tmp_path / "mask.tif"
    Image.fromarray(SHOWN.astype(np.uint16)).save(path, tiffinfo={262: 0})
    with pytest.raises(UserError, match=r"mask\.tif says that 0 is white"):
        values(path)


NUMBERS = np.arange(23 * 37, dtype=np.int64).reshape(23, 37) % 250
"""Masks of more pixels than they are resized to."""


def tiff(path, array, order="<"):
    """Return an uncompressed TIFF of one band.

    ``order`` is the byte order of its numbers and of the file.
    """
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = {256: array.shape[1], 257: array.shape[0], 258: 8 * array.dtype.itemsize, 259: 1, 262: 1, 273: 8, 277: 1,
            278: array.shape[0], 279: array.nbytes, 339: kind}  # fmt: skip
    pixels = array.astype(array.dtype.newbyteorder(order)).tobytes()
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(pixels))
    path.write_bytes(head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))
    Image.new("L", array.shape[::-1]).save(path.with_name("image.png"))
    return path


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize(("kind", "order"), [
    ("u1", "<"), ("u2", "<"), ("u2", ">"), ("i2", "<"), ("i2", ">"), ("i4", ">"), ("u4", "<"), ("f4", "<"), ("f4", ">"),
])  # fmt: skip
def test_masks_of_more_bits_hold_the_same_numbers(tmp_path, kind, order, size):
    path = tiff(tmp_path / "mask.tif", NUMBERS.astype(kind), order)
    found = read_mask(tmp_path / "image.png", path, "segmentation", size=size)
    plain = Image.fromarray(NUMBERS.astype(np.uint8))
    resized = plain if size is None else plain.resize((size, size), Image.Resampling.NEAREST)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(resized))


@pytest.mark.parametrize(("kind", "order", "value", "words"), [
    ("f4", "<", 0.5, "holds 0.5, expected class numbers from 0 to 255"),
    ("f4", ">", np.nan, "holds nan, expected"),
    ("f4", "<", np.inf, "holds inf, expected"),
    ("f4", ">", 256, "holds 256, expected"),
    ("u2", ">", 700, "holds 700, expected"),
    ("i2", ">", -1, "holds -1, expected"),
    ("i4", "<", -100, "holds -100, expected"),
    ("f8", "<", 1, r"mask\.tif \(a TIFF of 1 bands of 64 bits, floats, expected grey"),
    ("f2", "<", 1, "of 16 bits, floats, expected grey"),
    ("u4", ">", 1, "of 32 bits, expected grey"),
])  # fmt: skip
def test_masks_of_other_numbers_are_named_for_what_they_are(tmp_path, kind, order, value, words):
    numbers = NUMBERS.astype(kind)
    numbers[11, 5] = value
    path = tiff(tmp_path / "mask.tif", numbers, order)
    for size in (None, 16):
        with pytest.raises(UserError, match=words) as caught:
            read_mask(tmp_path / "image.png", path, "segmentation", size=size)
        assert "colours (mode" not in str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_white_first_masks_have_the_objects_that_they_show(tmp_path, cached, suffix):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(12):
        Image.fromarray(SHOWN * 200).save(tmp_path / "images" / f"{i}.png")
        write_palette(tmp_path / "masks" / f"{i}.{suffix}", 1 - SHOWN, [255, 255, 255, 0, 0, 0])
    data = load(
        "segmentation", root=tmp_path, clients=2, options={"size": 8}, cache=tmp_path / "cache" if cached else None
    )
    for split in (*data.clients, data.validation, *data.tests.values()):
        assert (split.labels == 0).clone().logical_not().to(int).tolist() == [SHOWN.tolist()] * len(split)


def listed_masks(root, masks, table, suffix="png", **options):
    """Write a set of these masks, in folders or listed in a table."""
    names = [f"{i}.{suffix}" for i in range(len(masks))]
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i, (name, mask) in enumerate(zip(names, masks, strict=True)):
        Image.fromarray(SHOWN * np.uint8(20 * i)).save(root / "images" / f"{i}.png")
        Image.fromarray(np.asarray(mask, np.uint8)).save(root / "masks" / name, **options)
    if table:
        lines = ["image,mask", *(f"images/{i}.png,masks/{name}" for i, name in enumerate(names))]
        (root / "list.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(("suffix", "options"), [
    ("jpg", {"quality": 100}),
    ("png", {"format": "JPEG", "quality": 75}),
    ("webp", {"quality": 90}),
    ("png", {"format": "WEBP"}),
    ("tif", {"compression": "jpeg"}),
])  # fmt: skip
def test_masks_that_compression_changes_are_refused(tmp_path, suffix, options, table):
    listed_masks(tmp_path, [SHOWN * 128] * 12, table, suffix, **options)
    with pytest.raises(UserError, match=r"masks/\d+\.\w+ is compressed as \w+, .*; save masks as PNG"):
        load("segmentation", root=tmp_path, clients=2, options={"size": 8, "names": "a|b"})


ROWS = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(("values", "advice"), [
    (lambda i: SHOWN * 128, ""),
    (lambda i: SHOWN * 2, ""),
    (lambda i: SHOWN + 1, ""),
    (lambda i: SHOWN * (1 + 2 * (i % 2)), "ignore=3"),  # a gap between two masks
    (lambda i: ROWS, ""),  # 64 values without a gap
    (lambda i: np.minimum(ROWS * 6, 255), ""),  # soft edges to 255
    (lambda i: np.where(ROWS < 8, 255, ROWS % 3), "ignore=255"),
    (lambda i: np.where(ROWS < 8, 9, ROWS % 2), "ignore=9"),
])  # fmt: skip
def test_values_that_are_no_class_numbers_are_refused(tmp_path, values, advice, table):
    listed_masks(tmp_path, [values(i) for i in range(12)], table)
    with pytest.raises(UserError, match=r"expected 0 and 255, .*names=a\|b\|c;.*interpolation") as caught:
        load("segmentation", root=tmp_path, clients=2, options={"size": 8})
    assert str(caught.value).partition("ignore=")[2] == advice.partition("=")[2]
    if advice:
        options = {"size": 8, "ignore": int(advice.partition("=")[2])}
        data = load("segmentation", root=tmp_path, clients=2, options=options)
        assert len(data.classes) == int(data.clients[0].labels.max()) + 1
    elif "255" in str(caught.value):  # an advice that would not help is not given, and not followed in vain
        with pytest.raises(UserError, match="expected 0 and 255"):
            load("segmentation", root=tmp_path, clients=2, options={"size": 8, "ignore": 255})


@pytest.mark.parametrize(
    ("values", "options", "classes"),
    [
        (lambda i: SHOWN, {}, 2),
        (lambda i: SHOWN * 255, {}, 2),
        (lambda i: np.minimum(ROWS // 8, 2), {}, 3),  # a border class between two others, as in a trimap
        (lambda i: np.minimum(np.minimum(ROWS // 8, ROWS % 8), 3), {}, 4),  # nested rings
        (lambda i: np.where(ROWS < 8, [1, 2, 4][i % 3], 0), {"names": "none|core|oedema|absent|enhancing"}, 5),
        (lambda i: SHOWN * (1 + i // 6), {}, 3),  # a class that half of the masks lack
        (lambda i: ROWS // 2, {}, 32),
        (lambda i: ROWS, {"names": "|".join(map(str, range(64)))}, 64),
    ],
)
def test_class_numbers_train_as_they_are(tmp_path, values, options, classes):
    masks = [np.asarray(values(i), np.uint8) for i in range(12)]
    listed_masks(tmp_path, masks, False)
    data = load("segmentation", root=tmp_path, clients=2, options={"size": 8, **options})
    assert len(data.classes) == classes
    seen = {
        int(value)
        for split in (*data.clients, data.validation, *data.tests.values())
        for value in split.labels.unique()
    }
    assert seen == {1 if value == 255 else int(value) for mask in masks for value in np.unique(mask)}
