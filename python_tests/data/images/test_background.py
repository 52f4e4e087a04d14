"""Tests of the sources of object masks, and of the boxes file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkern.data import BoxesFile, Split, extract_background, load
from fedkern.data.images.background import bounding_boxes, rasterise
from fedkern.errors import UserError


def split_of(n: int = 6, size: tuple[int, int] = (8, 10), sizes: torch.Tensor | None = None) -> Split:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (n, 3, *size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 3, ids=tuple(f"train/{i}" for i in range(n)), sizes=sizes)


def test_rasterise_takes_pixels_whose_centre_is_inside() -> None:
    rng = np.random.default_rng(0)
    boxes = [torch.from_numpy(np.sort(rng.uniform(-3, 13, (k, 2, 2)), axis=1).reshape(k, 4)) for k in (0, 1, 2, 3)]
    boxes.append(torch.tensor([[1.5, 2.5, 3.5, 4.5]]))  # edges on pixel centres: left and top in, right and bottom out
    masks = rasterise(boxes, 8, 10)
    for mask, rows in zip(masks, boxes, strict=True):
        for i in range(8):
            for j in range(10):
                inside = any(x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2 for x1, y1, x2, y2 in rows.tolist())
                assert bool(mask[i, j]) == inside
    assert masks[4].nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]


def test_bounding_box_of_an_empty_mask_is_empty() -> None:
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[1, 3, 1] = masks[1, 1, 4] = True
    expected = torch.zeros(2, 5, 6, dtype=torch.bool)
    expected[1, 1:4, 1:5] = True
    assert torch.equal(bounding_boxes(masks), expected)


def test_any_callable_is_a_source() -> None:
    data = load("digits", clients=3, partition="iid")
    made = extract_background(data, lambda images, labels: (images[:, 0] > 99) & (labels != 4)[:, None, None])
    for split in made.clients:
        assert torch.equal(split.masks, (split.images[:, 0] > 99) & (split.labels != 4)[:, None, None])
        assert torch.equal(split.masks.flatten(1).any(1), split.labels != 4)
    assert made.tests[""].masks is None


def test_callables_are_checked() -> None:
    data = load("digits", clients=2, partition="iid")
    with pytest.raises(ValueError, match=r"masks: expected \[600, 32, 32\] from the callable, got \[600, 1, 32, 32\]"):
        extract_background(data, lambda images, labels: images > 0)
    with pytest.raises(ValueError, match="0/1"):
        extract_background(data, lambda images, labels: images[:, 0])
    numbers = extract_background(data, lambda images, labels: (images[:, 0] > 50).float())
    assert numbers.clients[0].masks.dtype == torch.bool


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_boxes_file(tmp_path: Path, suffix: str) -> None:
    split = split_of()
    boxes = {"train/0": [[1, 2, 4, 5], [6, 0, 9.4, 3]], "train/2": [[-5, -5, 2, 2]], "train/5": [[0, 0, 10, 8]]}
    path = tmp_path / f"boxes.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({"boxes": {**boxes, "train/1": []}}))
    else:
        lines = [f"{name},0.9,{','.join(map(str, box))}" for name, rows in boxes.items() for box in rows]
        path.write_text("\ufeffimage,score,x1,y1,x2,y2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    masks = BoxesFile(path, split.ids).masks(split, ("a", "b", "c"))
    assert torch.equal(masks, rasterise([torch.tensor(boxes.get(name, [])) for name in split.ids], 8, 10))
    assert masks.flatten(1).any(1).tolist() == [True, False, True, False, False, True]
    assert int(masks[5].sum()) == 80


def test_names_with_line_ends(tmp_path: Path) -> None:
    names = ["a\u2028b.png", "c\nd.png"]
    path = tmp_path / "boxes.csv"
    path.write_text("image,x1,y1,x2,y2\n" + "".join(f'"{name}",0,0,2,3\r\n' for name in names), encoding="utf-8")
    assert BoxesFile(path, names).boxes == {name: [(0, 0, 2, 3)] for name in names}


def test_boxes_are_in_pixels_of_the_stored_image_or_in_fractions(tmp_path: Path) -> None:
    split = split_of(1, sizes=torch.tensor([[40, 16]]))  # stored 40 wide and 16 high, loaded 10 x 8
    pixels, fractions = tmp_path / "p.json", tmp_path / "f.json"
    pixels.write_text(json.dumps({"boxes": {"train/0": [[8, 4, 20, 12]]}}))
    fractions.write_text(json.dumps({"units": "fraction", "boxes": {"train/0": [[0.2, 0.25, 0.5, 0.75]]}}))
    expected = torch.zeros(1, 8, 10, dtype=torch.bool)
    expected[0, 2:6, 2:5] = True
    for path in (pixels, fractions):
        assert torch.equal(BoxesFile(path, split.ids).masks(split, ()), expected)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("b.json", '{"boxes": {"train/0": [[1, 2, 3, 4]', "not valid JSON"),
    ("b.json", "[1]", r'expected \{"boxes"'),
    ("b.json", '{"boxes": {"train/0": 3}}', 'image "train/0" needs a list'),
    ("b.json", '{"boxes": {"train/0": [[1, 2, 3]]}}', "expected four numbers"),
    ("b.json", '{"boxes": {"train/0": [[1, 2, 3, "x"]]}}', "expected four numbers"),
    ("b.json", '{"boxes": {"train/0": [[1, 2, 3, NaN]]}}', "is empty; expected x1 < x2"),
    ("b.json", '{"boxes": {"train/0": [[3, 2, 3, 4]]}}', "is empty; expected x1 < x2"),
    ("b.json", '{"boxes": {"train/77": [[1, 2, 3, 4]]}}', 'the data set has no image "train/77"'),
    ("b.json", '{"units": "cm", "boxes": {}}', "units must be"),
    ("b.json", '{"boxes": {"train/0": [[1, 2, 3, ' + "9" * 400 + "]]}}", "expected four numbers"),
    ("b.json", '{"boxes": {"train/0": [[1, 2, 3, ' + "9" * 5000 + "]]}}", "not valid JSON"),
    ("b.json", "[" * 100_000, "not valid JSON"),
    ("b.csv", "x" * 200_000 + "\n", "is not CSV"),
    ("b.csv", "image,x1,y1,x2,y2\n" + "x" * 200_000 + ",1,2,3,4\n", "is not CSV"),
    ("b.csv", "image,x1,y1\n", "header line lacks x2, y2"),
    ("b.csv", "", "header line lacks image"),
    ("b.csv", "image,x1,y1,x2,y2\ntrain/0,1,2,3\n", "line 2: expected four numbers"),
    ("b.csv", "image,x1,y1,x2,y2\ntrain/9,1,2,3,4\n", 'no image "train/9"'),
    ("b.txt", "", "ending in .json or .csv"),
    ("b.csv", b"\xff\xfe\xfa", "not UTF-16"),
    ("b.json", None, "No such file"),
])  # fmt: skip
def test_bad_boxes_files(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"boxes file.*{name}.*{message}"):
        BoxesFile(path, split_of().ids)


@pytest.mark.parametrize("box", [[-4, 0, 0, 5], [10, 0, 12, 5], [0, -3, 5, 0], [0, 8, 5, 9]])
def test_a_box_wholly_outside_its_image(tmp_path: Path, box: list[int]) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"boxes": {"train/3": [[1, 1, 2, 2], box]}}))
    with pytest.raises(UserError, match=r'of image "train/3" lies wholly outside of it \(10 x 8\)'):
        BoxesFile(path, split_of().ids).masks(split_of(), ())


def test_boxes_through_load(tmp_path: Path) -> None:
    plain = load("digits", clients=2, partition="iid", train_samples=20)
    chosen = plain.clients[0].ids[3]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"boxes": {chosen: [[4, 4, 20, 20]], plain.tests[""].ids[0]: [[0, 0, 1, 1]]}}))
    data = load("digits", clients=2, partition="iid", train_samples=20, options={"boxes": str(path)})
    found = [name for split in data.clients for name, mask in zip(split.ids, split.masks, strict=True) if mask.any()]
    assert found == [chosen]
    assert int(data.clients[0].masks.sum()) == 16 * 16
