"""The confusion picture: readable with few and with many classes, and never the end of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import AxesImage
from PIL import Image

from fedkern.data import load
from fedkern.engine.store.confusions import Confusions
from fedkern.engine.store.data_facts import DataFacts
from fedkern.errors import UserError
from fedkern.report.figures import confusion_sheet, pictures, plots
from fedkern.settings.config import RunConfig


def matrix(classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 40 * np.eye(classes, dtype=np.int64) + rng.integers(0, 4, (classes, classes))


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [text.get_text() for text in figure.texts]


def test_counts_and_names_are_written():
    counts = np.array([[50, 3], [0, 7]])
    found = Confusions(("nevus", "melanoma"), {"id": counts, "ood": counts * 0 + 1})
    figure = confusion_sheet.draw_confusions(found, title="t")
    matrix = figure.axes[0]
    assert sorted(text.get_text() for text in matrix.texts) == ["3", "50", "7"]  # nought is an empty cell
    image = next(child for child in matrix.get_children() if isinstance(child, AxesImage))
    np.testing.assert_allclose(image.get_array(), [[50 / 53, 3 / 53], [0, 1]])
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "Blues"  # one hue, from light to dark: safe for colour-blind readers
    said = {"in distribution", "95.0 % of 60 right", "out of distribution", "50.0 % of 4 right"}
    assert said | {"predicted class", "true class"} <= set(texts(figure))


@pytest.mark.parametrize("names", [("a", "b", "c"), ("nevus", "a melanoma", "anything else")])
def test_names_stand_beside_their_row_and_under_their_column(names):
    figure = confusion_sheet.draw_confusions(Confusions(names, {"id": matrix(3), "ood": matrix(3)}), title="t")
    figure.draw_without_rendering()
    for number, axes in enumerate(figure.axes[:2]):
        labels = [text for text in figure.texts if text.get_text() in names][6 * number :]
        for c in range(3):
            middle = axes.transData.transform((c, c))
            row, column = (text.get_window_extent() for text in labels[2 * c : 2 * c + 2])
            assert labels[2 * c].get_text() == labels[2 * c + 1].get_text() == names[c]
            assert row.y0 < middle[1] < row.y1
            assert 2 < axes.bbox.x0 - row.x1 < 8
            assert column.x0 < middle[0] < column.x1
            assert 2 < axes.bbox.y0 - column.y1 < 8


def test_a_class_without_images_has_no_colour():
    figure = confusion_sheet.draw_confusions(Confusions(("a", "b"), {"test": np.array([[0, 0], [1, 3]])}), title="t")
    image = next(child for child in figure.axes[0].get_children() if isinstance(child, AxesImage))
    assert image.get_array().mask.tolist() == [[True, True], [False, False]]


def test_many_classes_have_a_list_of_mistakes():
    counts = matrix(100)
    counts[3, 7] = 25
    names = tuple(f"class {c}" for c in range(100))
    figure = confusion_sheet.draw_confusions(Confusions(names, {"test": counts}), title="t")
    assert len(figure.axes[0].texts) == 0
    assert "class 3 taken for class 7: 25" in texts(figure)
    labels = [text for text in figure.texts if text.get_text() in names]
    assert [text.get_text() for text in labels] == [name for name in names for _ in ("row", "column")]
    assert all(text.get_fontsize() >= 5 for text in labels)


def test_the_most_frequent_mistakes():
    counts = np.array([[90, 2, 0], [5, 70, 2], [0, 0, 3]])
    assert confusion_sheet.list_mistakes(counts, ("a", "b", "c")) == [
        "b taken for a: 5", "a taken for b: 2", "b taken for c: 2",
    ]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("classes", "sets"), [
    (1, 1), (2, 3), (10, 2), (21, 1), (100, 1), pytest.param(300, 2, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_any_matrix_can_be_drawn(classes, sets, tmp_path):
    names = tuple(f"US$ class number {c} {{$" for c in range(classes))
    found = Confusions(names, {name: matrix(classes) for name in ("id", "ood", "held_out")[:sets]})
    plots.save_png(confusion_sheet.draw_confusions(found, title="$ {$"), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert max(image.size) <= 6000
        assert np.asarray(image.convert("L")).std() > 10


def make_run(folder: Path, **settings) -> Path:
    config = RunConfig.make("fedavg", data="digits", clients=2, train_samples=40, rounds=1, buffers="drop", **settings)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "metrics.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n')
    (folder / "summary.json").write_text("{}")
    found = {"classes": list("0123456789"), "test_sets": {"test": matrix(10).tolist()}}
    (folder / "confusion.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def data():
    return load("digits", clients=2, seed=0, train_samples=40)


def names(folder, data) -> list[str]:
    import torch

    DataFacts.of(data, private=False).write(folder)
    return [path.name for path in pictures.write_pictures(folder, data=data, model=torch.nn.Identity())]


def test_the_picture_is_among_those_of_a_run(tmp_path, data):
    folder = make_run(tmp_path)
    assert names(folder, data) == ["accuracy.png", "confusion.png", "partition.png"]
    assert json.loads((folder / "pictures.json").read_text())["pictures"][1] == "confusion.png"
    (folder / "confusion.json").unlink()  # as in a run of an earlier version
    assert names(folder, data) == ["accuracy.png", "partition.png"]


def test_private_records_have_no_such_picture(tmp_path, data):
    folder = make_run(tmp_path, records="private")
    (folder / "confusion.png").write_bytes(b"older")
    assert names(folder, data) == ["accuracy.png"]
    assert not (folder / "confusion.png").exists()


def test_damaged_counts_are_an_error_of_the_pictures_alone(tmp_path, data):
    folder = make_run(tmp_path)
    (folder / "confusion.json").write_text("{")
    with pytest.raises(UserError, match=r"confusion\.json is damaged"):
        names(folder, data)
