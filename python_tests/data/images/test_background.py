"""Tests of the sources of object masks: the boxes file, and the detection cache."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkern.data import BoxesFile, Detections, Split, extract_background, load
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


def test_any_callable_is_a_source_and_is_checked() -> None:
    data = load("digits", clients=3, partition="iid")
    made = extract_background(data, lambda images, labels: (images[:, 0] > 99) & (labels != 4)[:, None, None])
    for split in made.clients:
        assert torch.equal(split.masks, (split.images[:, 0] > 99) & (split.labels != 4)[:, None, None])
        assert torch.equal(split.masks.flatten(1).any(1), split.labels != 4)
    assert made.tests[""].masks is None
    with pytest.raises(ValueError, match=r"masks: expected \[400, 32, 32\] from the callable, got \[400, 1, 32, 32\]"):
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


# -- detections --------------------------------------------------------------------------------------------------------


CLASSES = tuple("0123456789")


class Corner:
    """Detector of boxes in the top left corner, wider for brighter images.

    It finds nothing in images of "3", and counts the images that it sees.
    """

    def __init__(self, model: str = "corner", box: float = 0.35, text: float = 0.25) -> None:
        self.identity = {"model": model, "box_threshold": box, "text_threshold": text}
        self.seen: list[tuple[int, str]] = []

    def detect(self, images: Tensor, name: str) -> list[Tensor]:
        assert images.shape[1] == 3
        assert images.dtype == torch.uint8
        self.seen.append((len(images), name))
        if name == "3":
            return [torch.zeros(0, 4) for _ in images]
        return [torch.tensor([[0.0, 0.0, 2 + image.float().mean() / 32, 5.25]]) for image in images]

    @property
    def count(self) -> int:
        return sum(images for images, _ in self.seen)


def options(cache: Path) -> dict[str, object]:
    return {"detector": "corner", "detector_cache": str(cache)}


def test_boxes_become_masks_and_undetected_images_stay_empty(tmp_path: Path) -> None:
    detector = Corner()
    settings = {"clients": 2, "partition": "iid", "train_samples": 60, "options": options(tmp_path)}
    data = load("digits", make_detector=lambda *_: detector, **settings)
    assert detector.count == 60
    assert {name for _, name in detector.seen} == set("0123456789")
    for split in data.clients:
        expected = [
            torch.zeros(0, 4) if label == 3 else torch.tensor([[0.0, 0.0, 2 + image.float().mean() / 32, 5.25]])
            for image, label in zip(split.images, split.labels.tolist(), strict=True)
        ]
        assert torch.equal(split.masks, rasterise(expected, 32, 32))
        assert torch.equal(split.masks.flatten(1).any(1), split.labels != 3)


def test_the_cache_serves_another_seed_and_partition(tmp_path: Path) -> None:
    cold = load("digits", clients=2, partition="iid", options=options(tmp_path), make_detector=lambda *_: Corner())
    second = Corner()
    again = load("digits", clients=4, seed=7, options=options(tmp_path), make_detector=lambda *_: second)
    assert second.count == 0
    masks = {name: mask for s in cold.clients for name, mask in zip(s.ids, s.masks, strict=True)}
    assert all(torch.equal(mask, masks[name]) for s in again.clients for name, mask in zip(s.ids, s.masks, strict=True))


def test_model_and_thresholds_name_the_cache(tmp_path: Path) -> None:
    paths = {
        Detections(Corner(model, box, text), tmp_path).path
        for model in ("a", "b") for box in (0.35, 0.4) for text in (0.25, 0.3)
    }  # fmt: skip
    assert len(paths) == 8
    assert Detections(Corner(), tmp_path).path == Detections(Corner(), tmp_path).path


def test_options_reach_the_detector(tmp_path: Path) -> None:
    given = []

    def make(*arguments: object) -> Corner:
        given.append(arguments)
        return Corner()

    chosen = {**options(tmp_path), "box_threshold": "0.5"}
    load("digits", train_samples=50, partition="iid", options=chosen, make_detector=make)
    assert given == [("corner", 0.5, 0.25)]


class Interrupted(Corner):
    """Detector that the user interrupts after three batches."""

    def detect(self, images: Tensor, name: str) -> list[Tensor]:
        if len(self.seen) == 3:
            raise KeyboardInterrupt
        return super().detect(images, name)


def test_an_interrupted_detection_keeps_what_it_has(tmp_path: Path) -> None:
    split = load("digits", clients=1, partition="iid", train_samples=100).clients[0]
    stopped = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        Detections(stopped, tmp_path).boxes(split, CLASSES)
    resumed = Corner()
    Detections(resumed, tmp_path).boxes(split, CLASSES)
    assert stopped.count > 0
    assert stopped.count + resumed.count == 100
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {Detections(resumed, tmp_path).path.name}  # no temporary


@pytest.fixture
def halves(tmp_path: Path) -> Iterator[list[Split]]:
    """Return two halves of a split: the cache must hold the boxes of both afterwards."""
    split = load("digits", clients=1, partition="iid", train_samples=40).clients[0]
    yield [split.subset(torch.arange(20)), split.subset(torch.arange(20, 40))]
    last = Corner()
    Detections(last, tmp_path).boxes(split, CLASSES)
    assert last.count == 0


def test_two_runs_add_to_one_cache(tmp_path: Path, halves: list[Split]) -> None:
    half, two = halves

    class Slow(Corner):
        """Detector during which another run finishes its own images."""

        def detect(self, images: Tensor, name: str) -> list[Tensor]:
            if not self.seen:
                Detections(Corner(), tmp_path).boxes(two, CLASSES)
            return super().detect(images, name)

    Detections(Slow(), tmp_path).boxes(half, CLASSES)


def test_a_run_that_writes_while_another_does_waits(tmp_path: Path, halves: list[Split]) -> None:
    half, two = halves
    thread = threading.Thread(target=lambda: Detections(Corner(), tmp_path).boxes(two, CLASSES))

    class Writing(Detections):
        """Cache whose last look at the file and replacement have another run between them."""

        reads = 0

        def _read(self) -> dict[str, list[list[float]]]:
            found = super()._read()
            self.reads += 1
            if self.reads == 2:
                thread.start()
                thread.join(0.3)
            return found

    Writing(Corner(), tmp_path).boxes(half, CLASSES)
    thread.join()


DAMAGED = (
    "{", "[]", '{"format": 1, "other": 1}', '{"format": 1, "boxes": 3}', '{"format": 1, "boxes": {"x": [[1, 2, 3]]}}',
    '{"format": 1, "boxes": {"x": [[1, 2, 3, 4]]}, "sum": 5}',
)  # fmt: skip
READ = "and this version of fedkern reads"


@pytest.mark.parametrize(("content", "told"), [
    *((content, "is damaged .*; delete it") for content in DAMAGED),
    ('{"format": 2, "boxes": {}}', f"has format 2, {READ}"),
    ("{}", f"has no format number, {READ}"),
])  # fmt: skip
def test_a_cache_that_is_damaged_or_of_another_format_is_refused(tmp_path: Path, content: str, told: str) -> None:
    split = load("digits", clients=1, partition="iid", train_samples=4).clients[0]
    detections = Detections(Corner(), tmp_path)
    detections.path.write_text(content)
    with pytest.raises(UserError, match=f"{detections.path.name} {told}"):
        detections.boxes(split, CLASSES)
    assert detections.path.read_text() == content


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    split = load("digits", clients=1, partition="iid", train_samples=4).clients[0]
    with pytest.raises(UserError, match=r"cannot write the detection cache .* detector_cache"):
        Detections(Corner(), tmp_path / "file" / "below").boxes(split, CLASSES)


def test_progress_is_told_and_the_file_is_readable_json(tmp_path: Path) -> None:
    told: list[str] = []
    split = load("digits", clients=1, partition="iid", train_samples=300).clients[0]
    detections = Detections(Corner(), tmp_path, told.append)
    detections.boxes(split, CLASSES)
    assert told
    assert all(text.endswith("of 300 images") for text in told)
    content = json.loads(detections.path.read_text())
    assert content["detector"] == Corner().identity
    assert len(content["boxes"]) == 300


def test_default_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "own"))
    assert Detections(Corner()).folder == tmp_path / "own" / "detections"
    monkeypatch.delenv("FEDKERN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Detections(Corner()).folder == tmp_path / "fedkern" / "detections"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Detections(Corner()).folder == tmp_path / ".cache" / "fedkern" / "detections"


@pytest.mark.parametrize(("given", "message"), [
    ({"detector": "x", "boxes": "y.json"}, "either a boxes file or a detector"),
    ({"box_threshold": 0.3}, "box_threshold .* without the option detector"),
    ({"detector": "x"}, 'the detector "x" needs a make_detector'),
    ({"detector": "x", "text_threshold": 2}, "text_threshold.*must be in .0, 1."),
])  # fmt: skip
def test_bad_options(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("digits", partition="iid", options=given)
