"""Tests of the detection cache: the detector sees each image once, whatever the partition.

Damaged files and full disks are clear errors.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkern.data import Detections, Split, load
from fedkern.data.images.background import rasterise
from fedkern.errors import UserError

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


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    split = load("digits", clients=1, partition="iid", train_samples=300).clients[0]
    Detections(Corner(), tmp_path, told.append).boxes(split, CLASSES)
    assert told
    assert all(text.endswith("of 300 images") for text in told)


def test_the_file_is_readable_json(tmp_path: Path) -> None:
    split = load("digits", clients=1, partition="iid", train_samples=4).clients[0]
    detections = Detections(Corner(), tmp_path)
    detections.boxes(split, CLASSES)
    content = json.loads(detections.path.read_text())
    assert content["detector"] == Corner().identity
    assert len(content["boxes"]) == 4


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
