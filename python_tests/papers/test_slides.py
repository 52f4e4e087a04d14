"""Tests of digits on crops of drawn slides: textures tied to class and client, exact masks, tests without ties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from fedkern.data import Split, load
from fedkern.errors import UserError
from fedkern.run import main
from python_tests.data.conftest import idx_bytes
from python_tests.papers_data import SLIDES

BARS = torch.zeros(10, 28, 28, dtype=torch.bool)
for digit in range(10):
    BARS[digit, 6:22, 2 * digit + 3 : 2 * digit + 7] = True


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write eight slides with spots of about twelve pixels, and digits that are bars."""
    write_slides(tmp_path, [(300, 300)] * 8)
    for name, count in (("train", 1200), ("t10k", 400)):
        labels = np.arange(count) % 10
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(255 * BARS[labels].numpy()))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


def write_slides(root: Path, sizes: list[tuple[int, int]]) -> None:
    (root / "image").mkdir()
    for number, size in enumerate(sizes):
        spots = torch.rand(1, 1, size[0] // 12, size[1] // 12, generator=torch.Generator().manual_seed(number))
        grey = (255 * interpolate(spots, size, mode="bilinear")[0, 0]).byte().numpy()
        Image.fromarray(grey).save(root / "image" / f"{number}.png")


def texture(split: Split) -> torch.Tensor:
    """Return how much every ground changes down and across, [n, 2]: a crop's height and width."""
    ground, seen = split.images[:, 0].float(), ~BARS[split.labels]
    ground = ground.masked_fill(~seen, torch.nan)
    return torch.stack([ground.diff(dim=axis).abs().nanmean((1, 2)).log() for axis in (1, 2)], 1)


def explain(splits: list[Split]) -> float:
    """Return the share of the textures' variance that lies between the classes of the clients."""
    groups = [texture(split)[split.labels == label] for split in splits for label in range(10)]
    inside = sum(((group - group.mean(0)) ** 2).sum() for group in groups)
    rows = torch.cat(groups)
    return float(1 - inside / ((rows - rows.mean(0)) ** 2).sum())


def test_textures_are_tied_to_class_and_client_and_not_in_the_test(root: Path) -> None:
    tied, free, half = (
        load(SLIDES, root=root, options={"samples": 1000, "correlation": share}) for share in (1.0, 0.0, 0.5)
    )
    assert tied.client_sizes == (200,) * 5
    assert explain(list(tied.clients)) > 0.8
    assert explain([tied.clients[0].plus(tied.clients[1:])]) < 0.4  # clients have ties of their own
    assert explain(list(free.clients)) < 0.2
    assert 0.2 < explain(list(half.clients)) < explain(list(tied.clients)) - 0.2
    assert explain([tied.tests["ood"]]) < 0.2
    assert len(tied.tests["id"]) == len(tied.tests["ood"]) == 400


def test_masks_are_exact_and_ink_is_black_or_white(root: Path) -> None:
    data = load(SLIDES, root=root, options={"samples": 300})
    for split in data.clients:
        assert torch.equal(split.masks, BARS[split.labels])
        ink = torch.stack([image[0][mask] for image, mask in zip(split.images, split.masks, strict=True)])
        white, black = (ink >= 178).all(1), (ink <= 77).all(1)
        assert bool((white | black).all())
        assert 0.2 < white.double().mean() < 0.8


def test_grounds_have_one_brightness_and_contrast(root: Path) -> None:
    split = load(SLIDES, root=root, options={"samples": 1000}).clients[0]
    ground = split.images[:, 0].float().masked_fill(split.masks, torch.nan)
    means = ground.nanmean((1, 2))
    assert (means - 128).abs().mean() < 10
    assert ((ground - means[:, None, None]) ** 2).nanmean((1, 2)).sqrt().sub(45).abs().mean() < 6


def test_the_seed_decides_and_tests_show_slides_that_no_client_has(root: Path) -> None:
    drawn, again, reseeded = (load(SLIDES, root=root, seed=seed, options={"samples": 100}) for seed in (0, 0, 1))
    for a, b, c in zip(
        [*drawn.clients, *drawn.tests.values()], [*again.clients, *again.tests.values()],
        [*reseeded.clients, *reseeded.tests.values()], strict=True,
    ):  # fmt: skip
        assert torch.equal(a.images, b.images)
        assert not torch.equal(a.images, c.images)
    for number in (6, 7):  # the last quarter
        Image.new("L", (300, 300), 7).save(root / "image" / f"{number}.png")
    changed = load(SLIDES, root=root, seed=0, options={"samples": 100})
    assert all(torch.equal(a.images, b.images) for a, b in zip(drawn.clients, changed.clients, strict=True))
    assert torch.equal(drawn.validation.images, changed.validation.images)
    flat = changed.tests["ood"].images[:, 0][~BARS[changed.tests["ood"].labels]]
    assert flat.unique().tolist() == [128]


@pytest.mark.usefixtures("undrawn")
def test_a_run_replaces_backgrounds(root: Path, tmp_path: Path) -> None:
    words = "--data-option samples=100 --rounds 1 --width 2 --method-option intervene=image --grad-cam 0"
    folders = ["--data", SLIDES, "--data-root", str(root), "--out", str(tmp_path / "run")]
    assert main(["fedgid", *folders, *words.split()]) == 0


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(300, 300)], r"at least 216 pixels a side, in .*image, found 1 of the sizes \[\(300, 300\)\]"),
        ([(300, 300), (300, 200)], r"found 2 of the sizes \[\(300, 200\), \(300, 300\)\]"),
        ([(200, 300)] * 2, r"found 2 of the sizes \[\(200, 300\)\]"),
        (None, "found 0 of the sizes"),
    ],
)
def test_slides_that_do_not_do(root: Path, sizes: list[tuple[int, int]] | None, said: str) -> None:
    for path in (root / "image").iterdir():
        path.unlink()
    (root / "image").rmdir()
    if sizes is not None:
        write_slides(root, sizes)
    with pytest.raises(UserError, match=said):
        load(SLIDES, root=root)
