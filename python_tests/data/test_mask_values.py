"""Tests of segmentation masks as viewers show them, of their class numbers, and of masks in a cache."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.data.images import image_cache
from fedkern.data.images.image_files import MaskFiles, read_mask
from fedkern.errors import UserError
from fedkern.files.image_rows import PixelClasses
from python_tests.image_files import watch_decoded

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
def test_a_negative_mask_is_read_as_shown_or_refused_where_it_has_16_bits(tmp_path, kind):
    path = tmp_path / "mask.tif"
    Image.fromarray((SHOWN * 255).astype(kind)).save(path, tiffinfo={262: 0})
    assert np.array_equal(values(path) > 0, SHOWN)
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


# -- masks on disk -----------------------------------------------------------------------------------------------------


IMAGES, SIDE = 24, 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "home"))


def write_masks(root, values, sites=("",)):
    """Write images of random sizes with masks of random pixels out of ``values``."""
    rng, shares = np.random.default_rng(0), np.arange(len(values), 0, -1)
    for number in range(IMAGES):
        base = root / sites[number % len(sites)]
        height, width = rng.integers(8, 20, 2)
        for name in ("images", "masks"):
            (base / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).save(base / "images" / f"{number}.png")
        mask = rng.choice(np.array(values, dtype=np.uint8), (height, width), p=shares / shares.sum())
        Image.fromarray(mask).save(base / "masks" / f"{number}.png")
    return root


def open_set(root, cache=None, **settings):
    options = {"size": SIDE, "colour": "grey", **settings.pop("options", {})}
    if "partition" not in settings:
        settings |= {"partition": "iid", "clients": 2}
    return load("segmentation", root=root, options=options, cache=cache, **settings)


def splits(data):
    return [*data.clients, data.validation, *data.tests.values(), *data.client_tests]


@pytest.fixture
def decodes(monkeypatch):
    """Return the list of decoded masks."""
    return watch_decoded(monkeypatch, MaskFiles)


CASES = {
    "two classes": ((0, 255), {}),
    "numbers": ((0, 1, 2, 3), {}),
    "numbers with a partition by classes": ((0, 1, 2, 3), {"partition": "dirichlet:1:min=1", "clients": 2}),
    "ignored 255": ((0, 1, 2, 255), {"options": {"ignore": "255"}}),
    "ignored 255 of two": ((0, 255), {"options": {"ignore": "255", "names": "ground|cell"}}),
    "ignored background": ((1, 2, 0), {"options": {"ignore": "0"}}),
    "ignored in the middle": ((0, 3, 2), {"options": {"ignore": "3", "names": "a|b|c|d"}}),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("values", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("folder", [True, False], ids=["cache", "temporary"])
def test_the_classes_of_a_set_in_memory(tmp_path, monkeypatch, decodes, values, settings, folder):
    root = write_masks(tmp_path / "root", values)
    expected = open_set(root, **{**settings, "options": dict(settings.get("options", {}))})
    assert not any(isinstance(split.labels, PixelClasses) for split in splits(expected))
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 5 * SIDE**2)
    if not folder:
        monkeypatch.setattr(image_cache, "MEMORY_BYTES", 0)
    decodes.clear()
    for count in (IMAGES, 0 if folder else IMAGES):
        options = dict(settings.get("options", {}))
        found = open_set(root, tmp_path / "cache" if folder else None, **{**settings, "options": options})
        assert len(decodes) == count
        decodes.clear()
        assert found.classes == expected.classes
        assert np.array_equal(found.statistics.counts, expected.statistics.counts)
        for got, wanted in zip(splits(found), splits(expected), strict=True):
            assert isinstance(got.labels, PixelClasses)
            assert torch.equal(got.labels, wanted.labels)
            assert torch.equal(got.images, wanted.images)
            assert torch.equal(got.image_labels, wanted.image_labels)
            assert got.ids == wanted.ids


def test_masks_have_files_beside_the_images(tmp_path):
    root = write_masks(tmp_path / "root", (0, 1, 2))
    said = []
    open_set(root, tmp_path / "cache", notice=said.append)
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.rpartition(".")[2] for name in files] == ["images", "lock", "sizes"] * 2
    assert said[0] == f"decoding 24 masks (0.0 MB) into {tmp_path / 'cache'}"
    assert said[1].startswith("decoding 24 images")
    open_set(root, tmp_path / "cache", notice=said.append)
    assert said[2].startswith("24 decoded masks are read from")
    assert said[3].startswith("24 decoded images are read from")


def test_a_changed_image_or_mask_is_looked_at_again(tmp_path, decodes):
    root = write_masks(tmp_path / "root", (0, 1))
    open_set(root, tmp_path / "cache")
    Image.new("L", (9, 9), 3).save(root / "images" / "4.png")
    with pytest.raises(UserError, match=r"masks/4\.png has .* pixels, its image .*4\.png 9x9"):
        open_set(root, tmp_path / "cache")
    Image.new("L", (9, 9), 2).save(root / "masks" / "4.png")
    decodes.clear()
    data = open_set(root, tmp_path / "cache")
    assert len(decodes) == IMAGES
    assert data.classes == ("0", "1", "2")


def test_small_masks_stay_in_memory(tmp_path, monkeypatch):
    root = write_masks(tmp_path / "root", (0, 1))
    monkeypatch.setattr(image_cache, "MEMORY_BYTES", 8 * IMAGES * SIDE**2)
    assert not isinstance(open_set(root).clients[0].labels, PixelClasses)
    monkeypatch.setattr(image_cache, "MEMORY_BYTES", 8 * IMAGES * SIDE**2 - 1)
    assert isinstance(open_set(root).clients[0].labels, PixelClasses)


def test_sites_and_own_tests(tmp_path):
    for split in ("train", "test"):
        write_masks(tmp_path / "root", (0, 1, 2), (f"north/{split}", f"south/{split}"))
    expected, found = (
        open_set(tmp_path / "root", partition=None),
        open_set(tmp_path / "root", tmp_path / "c", partition=None),
    )
    assert found.client_names == ("north", "south")
    assert [len(split) for split in found.client_tests] == [12, 12]
    for got, wanted in zip(splits(found), splits(expected), strict=True):
        assert isinstance(got.labels, PixelClasses)
        assert torch.equal(got.labels, wanted.labels)


@pytest.mark.parametrize("folder", [True, False], ids=["cache", "memory"])
@pytest.mark.parametrize(("values", "options", "said"), [
    (
        (0, 1, 255),
        {},
        r"hold 0, 1, 255 \(255 in .*\), expected .*; where 255 marks unknown .* --data-option ignore=255$",
    ),
    ((0, 1, 5), {"names": "a|b"}, "holds 5, expected 0 to 1; where 5 marks unknown"),
    ((5,), {"names": "a|b"}, "holds 5, expected 0 to 1$"),
    ((4,), {"ignore": "4"}, "holds nothing but 4, which is ignored"),
])  # fmt: skip
def test_wrong_classes_are_one_sentence(tmp_path, folder, values, options, said):
    root = write_masks(tmp_path / "root", values)
    with pytest.raises(UserError, match=said):
        open_set(root, tmp_path / "cache" if folder else None, options=options)
