"""Tests of normalisation and augmentation: against plain per-sample code, exact fills, memory formats, seeds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkern.data import AUGMENTATIONS, IGNORE, augment, augment_pairs, normalise
from fedkern.data.images.transforms import crop, rotate, window
from fedkern.errors import UserError

STILL = ("none", "window")  # what leaves images alone that are no larger than what a network sees


def images(batch=7, channels=3, height=9, width=13, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
    return values if dtype == torch.uint8 else values.to(dtype) / 100 + 0.5


def crop_slowly(batch: Tensor, rng: np.random.Generator, padding: int, flip: bool, fill: Tensor) -> Tensor:
    """Crop one sample after another, with draws in the documented order."""
    n, _, height, width = batch.shape
    top, left = rng.integers(0, 2 * padding + 1, size=n), rng.integers(0, 2 * padding + 1, size=n)
    coins = rng.random(n) < 0.5 if flip else np.zeros(n, dtype=bool)
    out = torch.empty_like(batch)
    for b in range(n):
        padded = fill.to(batch.dtype).view(-1, 1, 1).repeat(1, height + 2 * padding, width + 2 * padding)
        padded[:, padding : padding + height, padding : padding + width] = batch[b]
        window = padded[:, top[b] : top[b] + height, left[b] : left[b] + width]
        out[b] = window.flip(2) if coins[b] else window
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip(dtype: torch.dtype, channels_last: bool, flip: bool, channels: int) -> None:
    batch = images(channels=channels, dtype=dtype)
    given = batch.contiguous(memory_format=torch.channels_last) if channels_last else batch
    fill = torch.tensor([3.0, 5.0, 7.0][:channels])
    made = crop(given, np.random.default_rng(1), flip=flip, fill=fill.tolist())
    assert torch.equal(made, crop_slowly(batch, np.random.default_rng(1), 4, flip, fill))
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_crop_covers_all_offsets_and_half_of_the_images_flip() -> None:
    # A single bright pixel at the centre tells where the window was cut.
    batch = torch.zeros(4_000, 1, 17, 17)
    batch[:, :, 8, 8] = 1
    position = crop(batch, np.random.default_rng(0)).flatten(1).argmax(1)
    assert len(set(position.tolist())) == 81
    lopsided = torch.arange(6.0).expand(4_000, 1, 1, 6)
    flipped = crop(lopsided, np.random.default_rng(0), padding=0, flip=True)[:, 0, 0, 0] == 5
    assert 0.46 < flipped.double().mean() < 0.54


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_window(dtype: torch.dtype, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = images(height=9, width=13, dtype=dtype).contiguous(memory_format=layout)
    made = window(batch, (6, 13), np.random.default_rng(1))
    tops = np.random.default_rng(1).integers(0, 4, size=len(batch))
    assert torch.equal(made, torch.stack([image[:, top : top + 6] for image, top in zip(batch, tops, strict=True)]))
    assert torch.equal(window(batch, (6, 8)), batch[:, :, 1:7, 2:10])
    for cut in (made, window(batch, (6, 8))):
        assert cut.dtype == dtype
        assert cut.is_contiguous(memory_format=layout)
    assert window(batch, (9, 13), np.random.default_rng(1)) is batch
    assert window(batch[:0], (6, 8), np.random.default_rng(1)).shape == (0, 3, 6, 8)
    with pytest.raises(ValueError, match="sides: expected at most 9 x 13, got 10 x 8"):
        window(batch, (10, 8))


def test_a_window_is_anywhere() -> None:
    batch = torch.arange(30.0).view(1, 1, 5, 6).expand(2_000, -1, -1, -1)
    corners = window(batch, (3, 5), np.random.default_rng(0))[:, 0, 0, 0]
    found, counts = corners.unique(return_counts=True)
    assert found.tolist() == [0, 1, 6, 7, 12, 13]
    assert counts.min() > 270


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_outside_is_exactly_zero_after_normalisation(kind: str) -> None:
    batch = images(batch=64, dtype=torch.float32)  # no zero inside
    made = augment(batch, kind, np.random.default_rng(0))
    assert made.shape == batch.shape
    if kind in STILL:
        assert made is batch
    elif kind != "jitter":
        assert (made == 0).any()
    if kind in ("crop", "crop-flip"):
        # Every pixel is the fill or a pixel of its own image.
        for crop, original in zip(made, batch, strict=True):
            assert torch.isin(crop, torch.cat([original.flatten(), torch.zeros(1)])).all()


def test_rotation_by_nothing_keeps_the_images() -> None:
    batch = images()
    torch.testing.assert_close(rotate(batch, np.random.default_rng(0), degrees=0), batch, rtol=1e-5, atol=1e-5)


class _Quarter:
    """Generator that always turns by 90 degrees."""

    def uniform(self, low: float, high: float, size: int) -> np.ndarray:
        return np.full(size, high)


def test_rotation_by_a_right_angle_moves_every_pixel() -> None:
    batch = images(height=11, width=11)
    made = rotate(batch, _Quarter(), degrees=90)
    assert any(torch.allclose(made, turned, atol=1e-4) for turned in (batch.rot90(1, (2, 3)), batch.rot90(-1, (2, 3))))


def test_rotation_keeps_angles_in_images_that_are_not_square() -> None:
    # The distance of a blob from the centre must not change, whatever the aspect ratio.
    batch = torch.zeros(1, 1, 41, 81)
    batch[0, 0, 20, 60] = 1.0
    made = rotate(torch.nn.functional.avg_pool2d(batch, 3, 1, 1), _Quarter(), degrees=30)[0, 0]
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(81.0) - 40, indexing="ij")
    weight = made / made.sum()
    centre_y, centre_x = float((weight * y).sum()), float((weight * x).sum())
    assert np.hypot(centre_x, centre_y) == pytest.approx(20, abs=0.3)
    assert abs(np.degrees(np.arctan2(centre_y, centre_x))) == pytest.approx(30, abs=1)


@pytest.mark.parametrize("fill", [0.0, 40.0, (10.0, 200.0, 90.0)])
def test_uint8_rotation_fills_the_corners(fill: float | tuple[float, ...]) -> None:
    batch = torch.full((5, 3, 20, 20), 120, dtype=torch.uint8)
    made = rotate(batch, _Quarter(), degrees=45, fill=fill)
    assert made.dtype == torch.uint8
    assert torch.equal(made[0, :, 0, 0], torch.as_tensor(fill).expand(3).to(torch.uint8))
    assert (made[:, :, 10, 10] == 120).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in AUGMENTATIONS]
    + [(kind, torch.uint8) for kind in AUGMENTATIONS if kind != "jitter"],
)
def test_the_generator_decides_everything(kind: str, dtype: torch.dtype) -> None:
    batch = images(dtype=dtype)
    before = batch.clone()
    crops, again, otherwise = (augment(batch, kind, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(crops, again)
    assert torch.equal(batch, before)
    assert kind in STILL or not torch.equal(crops, otherwise)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_kept_and_empty_batches_pass(kind: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = augment(images().contiguous(memory_format=layout), kind, np.random.default_rng(0))
    assert made.is_contiguous(memory_format=layout)
    assert augment(images(batch=0), kind, np.random.default_rng(0)).shape == (0, 3, 9, 13)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_masks_follow_their_images(kind: str, channels_last: bool) -> None:
    """An image that shows its own class numbers still does afterwards.

    The image does not depend on whether labels are given.
    """
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.integers(1, 5, (6, 12, 12))).repeat_interleave(2, 1).repeat_interleave(2, 2)
    batch = labels[:, None].float().repeat(1, 2, 1, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = batch.contiguous(memory_format=layout)
    made, moved = augment_pairs(batch, labels, kind, np.random.default_rng(1))
    assert torch.equal(made, augment(batch, kind, np.random.default_rng(1)))
    assert made.is_contiguous(memory_format=layout)
    assert moved.dtype == torch.int64
    if kind in ("nico", "flip-rotate"):  # bilinear beside nearest: alike but at borders
        inside = moved != IGNORE
        assert ((made[:, 0] - moved).abs()[inside] < 0.51).double().mean() > 0.75
        assert set(moved.unique().tolist()) <= {IGNORE, 1, 2, 3, 4}
    elif kind == "jitter":
        assert torch.equal(moved, labels)
    else:
        assert torch.equal(made[:, 0], moved.masked_fill(moved == IGNORE, 0).float())
        assert bool((moved == IGNORE).any()) == (kind in ("crop", "crop-flip"))


def test_pairs_must_fit() -> None:
    with pytest.raises(ValueError, match=r"labels: expected int64 \[7, 9, 13\] .* got torch.int64 \[7, 13, 9\]"):
        augment_pairs(images(), torch.zeros(7, 13, 9, dtype=torch.int64), "crop", np.random.default_rng(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_scales_and_shifts_every_channel_of_every_image(channels: int) -> None:
    batch = images(dtype=torch.float32)[:, :channels]
    made = augment(batch, "jitter", np.random.default_rng(5)).double()
    rng = np.random.default_rng(5)
    scale, shift = (
        torch.from_numpy(rng.uniform(low, high, (len(batch), channels)))[..., None, None]
        for low, high in ((0.2, 1.8), (-1, 1))
    )
    torch.testing.assert_close(made, scale * batch + shift, rtol=1e-5, atol=1e-5)
    assert len({tuple(channels) for channels in scale.flatten(1).tolist()}) == len(batch)


def test_jitter_is_for_normalised_images() -> None:
    with pytest.raises(ValueError, match=r"expected normalised floats .* for jitter, got torch.uint8"):
        augment(images(dtype=torch.uint8), "jitter", np.random.default_rng(0))


def test_unknown_augmentation() -> None:
    with pytest.raises(UserError, match=r'unknown augmentation "crop-flp".*Did you mean "crop-flip"'):
        augment(images(), "crop-flp", np.random.default_rng(0))


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalise(channels_last: bool) -> None:
    batch = images(dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    made = normalise(batch, mean, std, channels_last=channels_last)
    expected = (batch.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=1e-6)
    assert made.dtype == torch.float32
    assert made.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_normalise_refuses_other_input() -> None:
    with pytest.raises(ValueError, match=r"images: expected uint8 \[B, C, H, W\], got torch.float32"):
        normalise(images(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="expected 3 numbers each, got 1 and 3"):
        normalise(images(dtype=torch.uint8), (0.5,), (0.5,) * 3)
