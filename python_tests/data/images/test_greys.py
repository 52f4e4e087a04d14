"""Tests of grey images of more than eight bits, as scanners export them."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

import fedkern
from fedkern.data import load
from fedkern.data.images import image_files
from fedkern.data.sources import listing
from fedkern.downstream.model_export import export, of_images
from fedkern.downstream.prediction import Predictor
from fedkern.errors import UserError

RAMP = np.linspace(0, 1, 16 * 16).reshape(16, 16)


def write_grey(path, top, kind=np.uint16):
    values = RAMP * top if kind == np.float32 else np.rint(RAMP * top)
    Image.fromarray(values.astype(kind)).save(path)


def open_set(root, name="pairs", **options):
    return load(name, root=root, clients=2, partition="iid", options={"size": 16, "colour": "grey", **options})


def write_all(root, suffix, top, kind):
    lines = ["image,path,text,report,label"]
    for i in range(12):
        write_grey(root / f"{i}.{suffix}", top, kind)
        lines.append(f"{i}.{suffix},{i}.{suffix},number {i} is here,number {i} is here,{'ab'[i % 2]}")
        (root / f"{i}.txt").write_text("words")
    return lines


def assert_ramps(data, seen=255 * RAMP):
    for split in (*data.clients, data.validation, *data.tests.values()):
        for image in split.images:
            for channel in image:
                assert np.abs(channel.numpy() - seen).max() <= 1


@pytest.mark.sampled
@pytest.mark.parametrize("colour", ["grey", "rgb"])
@pytest.mark.parametrize(("suffix", "top", "kind"), [
    ("png", 65535, np.uint16), ("tif", 65535, np.uint16), ("png", 4095, np.uint16), ("png", 255, np.uint16),
    ("tif", 65535, np.int32), ("tif", 4095, np.int32), ("tif", 1, np.float32),
])  # fmt: skip
def test_no_grey_value_is_cut_off(tmp_path, suffix, top, kind, colour):
    lines = write_all(tmp_path, suffix, top, kind)
    assert_ramps(open_set(tmp_path, colour=colour))
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    for name in ("pairs", "csv"):
        assert_ramps(open_set(table, name, colour=colour))


def test_the_other_byte_order(tmp_path):
    write_all(tmp_path, "tif", 65535, np.uint16)
    Image.frombytes("I;16B", (16, 16), np.rint(RAMP * 65535).astype(">u2").tobytes()).save(tmp_path / "3.tif")
    with Image.open(tmp_path / "3.tif") as image:
        assert image.mode == "I;16B"
    assert_ramps(open_set(tmp_path))


@pytest.mark.parametrize(("image", "words"), [
    (
        RAMP.astype(np.float32) * 300,
        r"3\.tif holds grey values from 0 to 300, expected fractions from 0 to 1; choose",
    ),
    (RAMP.astype(np.float32) - 0.5, "values from -0.5 to 0.5"),
    (np.full((16, 16), np.nan, np.float32), "values from nan to nan"),
    ((RAMP * 3000 - 1000).astype(np.int32), "values from -1000 to 2000, expected whole numbers from 0 to 65535"),
    ((RAMP * 1e6).astype(np.int32), r"values from 0 to 1e\+06, expected whole numbers"),
])  # fmt: skip
def test_values_without_a_known_range_are_refused(tmp_path, image, words):
    write_all(tmp_path, "tif", 1, np.float32)
    Image.fromarray(image).save(tmp_path / "3.tif")
    with pytest.raises(UserError, match=words) as caught:
        open_set(tmp_path)
    assert "\n" not in str(caught.value)


def write_flat(root, top, marker=None):
    """Write twelve images of one value in every layout.

    With a ``marker`` one of them has a brighter corner.
    """
    lines = write_all(root, "png", 0, np.uint16)
    for i in range(12):
        values = np.full((16, 16), top, np.uint16)
        if i == 5 and marker is not None:
            values[0, 0] = marker
        Image.fromarray(values).save(root / f"{i}.png")
    (root / "table.csv").write_text("\n".join(lines))
    for label in "ab":
        (root / "classes" / label).mkdir(parents=True)
        for i in range(12):
            if "ab"[i % 2] == label:
                (root / "classes" / label / f"{i}.png").write_bytes((root / f"{i}.png").read_bytes())
    for part in ("images", "masks"):
        (root / "cells" / part).mkdir(parents=True)
    for i in range(12):
        (root / "cells" / "images" / f"{i}.png").write_bytes((root / f"{i}.png").read_bytes())
        Image.fromarray(np.eye(16, dtype=np.uint8) * (i > 0)).save(root / "cells" / "masks" / f"{i}.png")


SOURCES = {"pairs": "table.csv", "csv": "table.csv", "folder": "classes", "segmentation": "cells"}


@pytest.mark.sampled
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("marker", "options", "expected"), [
    (None, {}, 3000 / 4095), (65535, {}, 3000 / 65535), (4095, {}, 3000 / 4095), (None, {"bits": 16}, 3000 / 65535),
    (8000, {"bits": 13}, 3000 / 8191),
])  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
def test_a_value_has_one_brightness_in_a_data_set(tmp_path, name, marker, options, expected, cached):
    write_flat(tmp_path, 3000, marker)
    told = []
    data = load(
        name, root=tmp_path / SOURCES[name], clients=2, partition="iid", notice=told.append, progress=lambda text: None,
        options={"size": 16, "colour": "grey", **options}, cache=tmp_path / "cache" if cached else None,
    )  # fmt: skip
    splits = [*data.clients, data.validation, *data.tests.values()]
    assert {int(split.images[:, 0, 8, 8].clone()[i]) for split in splits for i in range(len(split))} == {
        round(255 * expected)
    }
    top = 2**data.form.grey_bits - 1
    assert f"0 to {top:,} become 0 to 255" in data.form.seen[0]
    assert not any("become" in text for text in told)


def test_a_value_beyond_the_bits_is_refused_with_the_way_out(tmp_path):
    write_flat(tmp_path, 3000, 5000)
    with pytest.raises(UserError, match=r"5\.png holds grey values from 3000 to 5000, expected .* 0 to 4095;.*bits=16"):
        open_set(tmp_path / "table.csv", "csv", bits=12)


def test_nothing_is_said_of_eight_bits(tmp_path):
    write_all(tmp_path, "png", 255, np.uint8)
    told = []
    assert load("pairs", root=tmp_path, clients=2, partition="iid", notice=told.append).form.grey_bits == 0
    assert not told


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "F"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_a_negative_looks_as_in_a_viewer(tmp_path, mode, compression, colour):
    """White is 0 in half of the files, as in radiographs of the kind MONOCHROME1."""
    levels = np.rint(RAMP * {"L": 255, "I;16": 4095}.get(mode, 1))
    stored = {"1": RAMP > 0.5, "L": levels.astype(np.uint8), "I;16": levels.astype(np.uint16), "F": np.float32(RAMP)}[
        mode
    ]
    seen = 255 * (RAMP > 0.5) if mode == "1" else 255 * RAMP
    for i in range(12):
        values = stored
        if i % 2 and mode in ("I;16", "F"):  # Pillow writes these as they are, and inverts the others
            values = ((4095 if mode == "I;16" else 1) - stored).astype(stored.dtype)
        Image.fromarray(values).save(tmp_path / f"{i}.tif", tiffinfo={262: i % 2 == 0}, compression=compression)
        (tmp_path / f"{i}.txt").write_text("words")
    for i in range(12):
        with Image.open(tmp_path / f"{i}.tif") as image:
            assert (image.mode, image.tag_v2[262]) == (mode, i % 2 == 0)
    assert_ramps(open_set(tmp_path, colour=colour), seen)


def test_a_run_scales_all_later_images_as_in_its_training(tmp_path, monkeypatch):
    """Predictions and figures on other data keep the run's depth, whatever depth the other images suggest."""
    write_all(tmp_path, "png", 4095, np.uint16)
    for i in range(12):
        values = np.rint(RAMP * 4095 if i % 2 else RAMP[::-1] * 4095).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(f"{i}.png,{'ab'[i % 2]}" for i in range(12)))
    run = fedkern.simulate(
        "fedavg", data="csv", data_root=tmp_path / "t.csv", clients=2, rounds=1, model="mlp", out=tmp_path / "run",
        partition="iid", progress=False, pictures=False,
        data_options={"size": 16, "colour": "grey"},
    )  # fmt: skip
    Image.fromarray(np.full((16, 16), 200, np.uint16)).save(tmp_path / "dark.png")
    predictor = Predictor.open(tmp_path / "run")
    assert int(predictor.read([tmp_path / "dark.png"])[0].max()) == round(200 / 4095 * 255)
    _, described = export(of_images(predictor), tmp_path / "network.pt", "state-dict")
    assert json.loads(described.read_text())["grey_bits"] == 12
    folder = tmp_path / "other"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(np.rint((RAMP if i % 2 else RAMP[::-1]) * 255).astype(np.uint16)).save(folder / f"{i}.png")
    (folder / "t.csv").write_text((tmp_path / "t.csv").read_text())
    figures = run.evaluate(data="csv", data_root=folder / "t.csv", data_options={"size": 16, "colour": "grey"})
    given = {"size": 16, "colour": "grey", "bits": 12}
    assert figures == run.evaluate(data="csv", data_root=folder / "t.csv", data_options=given)
    assert figures != run.evaluate(data="csv", data_root=folder / "t.csv", data_options={**given, "bits": 8})
    figures = run.evaluate()
    monkeypatch.setattr(listing, "grey_bits", lambda *_: pytest.fail("the bits are known"))
    assert run.evaluate() == figures


@pytest.mark.parametrize(("tops", "said"), [
    ({"Ulm": 4095, "Trier": 65535}, "fewer bits: Ulm (16 times)"),
    ({"Ulm": 65535, "Trier": 4095, "Jena": 255}, "fewer bits: Jena (256 times), Trier (16 times)"),
    ({"Ulm": 255, "Trier": 4095}, "fewer bits: Ulm (16 times)"),
    ({"Ulm": 4095, "Trier": 3000}, ""),
])  # fmt: skip
def test_sites_with_fewer_bits_are_named(tmp_path, tops, said):
    lines = ["path,label,site"]
    for i, (site, top) in enumerate([*tops.items()] * 8):
        write_grey(tmp_path / f"{i}.png", top)
        lines.append(f"{i}.png,{'ab'[i // len(tops) % 2]},{site}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    for options in ({}, {"bits": 16}):
        told = []
        load("csv", root=tmp_path, options={"size": 16, **options}, notice=told.append)
        darker = [text for text in told if "darker" in text]
        assert len(darker) == bool(said and not options)  # who gives the bits knows them
        assert all(said in text for text in darker)


@pytest.mark.parametrize("extra", [None, 0, 1, 2])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_fourth_band_is_transparency_where_the_file_says_so(tmp_path, extra, kind):
    """The TIFF has three bands of 200 and a fourth of 0, with or without a tag that says what it means."""
    scale = 257 if kind == np.uint16 else 1
    pixels = np.full((16, 16, 4), 200 * scale, kind)
    pixels[..., 3] = 0
    path = tmp_path / "bands.tif"
    path.write_bytes(tiff(pixels, 2, extra))
    if extra is None:
        with pytest.raises(UserError, match=r"bands\.tif has 4 bands and does not say that the last is transparency"):
            image_files.ImageFiles([path], 16, "csv").read()
    else:
        seen = image_files.ImageFiles([path], 16, "csv").read()[0]
        assert set(seen.flatten().tolist()) == {255 if extra else 200}


def test_the_bands_of_a_tiff_are_counted(tmp_path):
    path = tmp_path / "bands.tif"
    for bands in (5, 13):
        path.write_bytes(tiff(np.zeros((16, 16, bands), np.uint8), 1, 0))
        with pytest.raises(UserError, match=rf"bands\.tif \(a TIFF of {bands} bands of 8 bits, expected grey"):
            image_files.ImageFiles([path], 16, "csv").read()


def tiff(pixels, photometric, extra):
    """Return an uncompressed little-endian TIFF.

    ``extra`` is the meaning of its bands beyond the third, or None.
    """
    height, width, bands = pixels.shape
    beyond = bands - (3 if photometric == 2 else 1)
    tags = {
        256: [width], 257: [height], 258: [8 * pixels.itemsize] * bands, 259: [1], 262: [photometric], 273: [8],
        277: [bands], 278: [height], 279: [pixels.nbytes], 284: [1],
    }  # fmt: skip
    if extra is not None:
        tags[338] = [extra] * beyond
    start = 8 + pixels.nbytes
    lists, entries = b"", b""
    for tag, values in tags.items():
        kind, form = (4, "<I") if tag in (273, 279) else (3, "<H")
        packed = b"".join(struct.pack(form, value) for value in values)
        if len(packed) > 4:
            where = start + 2 + 12 * len(tags) + 4 + len(lists)
            lists += packed + b"\0" * (len(packed) % 2)
            packed = struct.pack("<I", where)
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", start)
    return head + pixels.tobytes() + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + lists
