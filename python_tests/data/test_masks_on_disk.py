"""Tests of segmentation masks in a cache folder or a temporary file: the same classes, decoded once."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.data.images import image_cache
from fedkern.data.images.image_files import MaskFiles
from fedkern.errors import UserError
from fedkern.files.image_rows import PixelClasses
from python_tests.image_files import watch_decoded

IMAGES, SIDE = 24, 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "home"))


def write_masks(root, values, sites=("",)):
    """Write images of random sizes with masks of random pixels out of ``values``."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        base = root / sites[number % len(sites)]
        height, width = rng.integers(8, 20, 2)
        for name in ("images", "masks"):
            (base / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).save(base / "images" / f"{number}.png")
        mask = rng.choice(np.array(values, dtype=np.uint8), (height, width), p=shares(len(values)))
        Image.fromarray(mask).save(base / "masks" / f"{number}.png")
    return root


def shares(count):
    return np.arange(count, 0, -1) / (count * (count + 1) / 2)


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
