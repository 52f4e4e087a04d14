"""Tests of images as viewers show them: turned by their EXIF orientation, and on white behind an alpha channel."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from fedkern.data import load
from fedkern.data.images.image_files import ImageFiles, read_mask
from fedkern.errors import UserError

SIZE = 16
ORIENTATIONS = range(1, 9)


def scene(width=24, height=16):
    """Return an image that is brighter to the right and has a coloured corner, so that no turn equals another."""
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0] = np.linspace(0, 200, width)[None]
    values[: height // 2, : width // 2, 1] = 255
    return Image.fromarray(values)


def make_exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def save(image, path, orientation=None, **options):
    if orientation is not None:
        options["exif"] = make_exif(orientation)
    image.save(path, **options)
    return path


def read(*paths, size=SIZE, **options):
    return ImageFiles(paths, size, "test", **options).read()


# orientation


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_is_turned_as_its_orientation_says(suffix, orientation, tmp_path):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(scene(), tmp_path / f"turned.{suffix}", orientation, **options)
    shown = ImageOps.exif_transpose(Image.open(path))
    images, sizes = read(path)
    expected = np.asarray(shown.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(images[0].numpy(), expected)
    assert tuple(sizes[0].tolist()) == shown.size == ((24, 16) if orientation < 5 else (16, 24))


def test_a_large_jpeg_is_turned_too(tmp_path):
    """The size is known before the image is decoded at a fraction."""
    path = save(scene(960, 640), tmp_path / "large.jpg", 6, quality=95)
    images, sizes = read(path)
    expected = ImageOps.exif_transpose(Image.open(path)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert sizes.tolist() == [[640, 960]]
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).mean() < 3


def test_grey_values_of_many_bits_are_turned(tmp_path):
    ramp = np.rint(np.linspace(0, 65535, SIZE * SIZE)).astype(np.uint16).reshape(SIZE, SIZE)
    path = save(Image.fromarray(ramp), tmp_path / "deep.png", 3)
    assert np.array_equal(read(path, grey=True)[0][0, 0], np.rint(ramp / 257)[::-1, ::-1].astype(np.uint8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damage", [b"Exif\0\0no TIFF at all", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0"])
def test_damaged_exif_data_say_nothing(damage, tmp_path):
    scene().save(tmp_path / "plain.png")
    scene().save(tmp_path / "damaged.png", exif=damage)
    plain, damaged = read(tmp_path / "plain.png", tmp_path / "damaged.png")[0]
    assert torch.equal(plain, damaged)


def test_a_truncated_png_is_named(tmp_path):
    path = save(scene(200, 200), tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=r"cannot read the image .*cut\.png"):
        read(path)


# alpha


def see_through(mode):
    """Return an image whose left half is transparent, the middle half-transparent red and the right opaque red."""
    alpha = np.repeat(np.array([0, 0, 128, 255], np.uint8), SIZE // 4)[None].repeat(SIZE, 0)
    red = Image.new("RGB", (SIZE, SIZE), (255, 0, 0))
    red.paste((10, 20, 30), (0, 0, SIZE // 2, SIZE))
    red.putalpha(Image.fromarray(alpha))
    return red.convert(mode)


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("LA", "png")])
def test_an_alpha_channel_is_on_white(mode, suffix, tmp_path):
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = save(see_through(mode), tmp_path / f"clear.{suffix}", **options)
    columns = read(path)[0][0, :, 8].T.tolist()
    red, half = ((255, 0, 0), (255, 127, 127)) if mode == "RGBA" else ((76,) * 3, (165,) * 3)
    assert columns[0] == columns[5] == [255, 255, 255]
    assert np.abs(np.array(columns[9]) - half).max() <= 2
    assert columns[14] == list(red)
    grey = read(path, grey=True)[0][0, 0, 8].tolist()
    assert (grey[0], grey[14]) == (255, 76)


@pytest.mark.parametrize("sides", [(130, 1), (1, 130), (128, 1), (30, 21), (16, 16), (7, 90), (200, 33)])
def test_bars_leave_something_of_a_thin_image(sides, tmp_path):
    pixels = np.random.default_rng(0).integers(100, 255, (sides[1], sides[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = read(save(image, tmp_path / "thin.png"), size=64, pad=True)[0][0].permute(1, 2, 0).numpy()
    if min(sides) > 1:
        assert np.array_equal(found, np.asarray(ImageOps.pad(image, (64, 64), Image.Resampling.BICUBIC)))
    else:
        assert (found > 90).all(2).sum() == 64


def test_a_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    values = np.full((SIZE, SIZE), 40_000, np.uint16)
    values[:, : SIZE // 2] = 1_000
    path = save(Image.fromarray(values), tmp_path / "key.png", transparency=1_000)
    row = read(path, grey=True, bits=16)[0][0, 0, 8].tolist()
    assert (row[0], row[-1]) == (255, 156)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_transparent_colour_is_white(suffix, tmp_path):
    values = np.zeros((SIZE, SIZE), np.uint8)
    values[:, SIZE // 2 :] = 1
    image = Image.fromarray(values)
    image.putpalette([10, 20, 30, 200, 0, 0])
    path = save(image, tmp_path / f"key.{suffix}", transparency=0)
    row = read(path)[0][0, :, 8].T.tolist()
    assert (row[0], row[-1]) == ([255] * 3, [200, 0, 0])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("grey", [False, True])
def test_nothing_else_changes(suffix, grey, tmp_path):
    """An image without orientation is, opaque or not, the result of Pillow's conversion."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (21, 33, 3), dtype=np.uint8))
    paths = [save(image, tmp_path / f"plain.{suffix}", quality=95)]
    if suffix != "jpg":
        image.putalpha(255)
        paths.append(save(image, tmp_path / f"opaque.{suffix}"))
        paths.append(save(image.convert("P"), tmp_path / f"palette.{suffix}"))
    mode = "L" if grey else "RGB"
    for path, found in zip(paths, read(*paths, grey=grey)[0], strict=True):
        with Image.open(path) as stored:
            stored.draft(mode, (2 * SIZE, 2 * SIZE))  # a grey JPEG is that of its decoder
            expected = np.atleast_3d(stored.convert(mode).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


# masks and whole data sets


def test_masks_are_of_the_turned_image(tmp_path):
    image = save(scene(24, 16), tmp_path / "image.jpg", 6)
    values = np.arange(16 * 24, dtype=np.uint8).reshape(24, 16) % 7
    upright = save(Image.fromarray(values), tmp_path / "upright.png")
    lying = save(Image.fromarray(values).transpose(Image.Transpose.ROTATE_90), tmp_path / "lying.png", 6)
    plain = save(Image.fromarray(values).transpose(Image.Transpose.ROTATE_90), tmp_path / "plain.png")
    a, b = (read_mask(image, mask, "test", size=24) for mask in (upright, lying))
    assert np.array_equal(a, np.asarray(Image.fromarray(values).resize((24, 24), Image.Resampling.NEAREST)))
    assert np.array_equal(a, b)
    with pytest.raises(UserError, match=r"has 24x16 pixels, its image .* 16x24, as its EXIF orientation turns it"):
        read_mask(image, plain, "test", size=24)


@pytest.mark.parametrize("name", ["folder", "csv", "pairs"])
def test_every_reader_sees_them_so(name, tmp_path):
    lines = ["path,label"]
    for i in range(12):
        own = tmp_path / ("a", "b")[i % 2]
        own.mkdir(exist_ok=True)
        save(see_through("RGBA"), own / f"{i}.png", 3)
        (own / f"{i}.txt").write_text("words")
        lines.append(f"{own.name}/{i}.png,{own.name}")
    if name == "csv":
        (tmp_path / "data.csv").write_text("\n".join(lines))
    data = load(name, root=tmp_path, clients=2, partition="iid", options={"size": SIZE, "colour": "rgb"})
    for split in (*data.clients, data.validation, *data.tests.values()):
        for image in split.images:
            assert image[:, 8, 1].tolist() == [255, 0, 0]  # upside down: right is left
            assert image[:, 8, -1].tolist() == [255, 255, 255]
