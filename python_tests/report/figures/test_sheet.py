"""Sheets of pictures: places, scale and overlays, answers, artifacts, and the confusion picture."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.image import AxesImage
from PIL import Image

from fedkern.data import load
from fedkern.engine.run import run
from fedkern.engine.store.artifacts import Artifact, ArtifactLog
from fedkern.engine.store.confusions import Confusions
from fedkern.engine.store.record_files import DataFacts
from fedkern.errors import UserError
from fedkern.report.figures import answer_sheets, pictures, plots, sheet
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.figures.plots import save_png
from fedkern.report.figures.sheet import Sheet
from fedkern.report.pages import run_page
from fedkern.report.run_contents import read_run_folder
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data

SIDE, LEFT, DPI = 1.14, 0.9, 150
WHITE, RED, GREEN, BLUE, BLACK = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
FOUR = np.array([[RED, GREEN], [BLUE, BLACK]], dtype=np.uint8)


def make_sheet(columns: int = 1) -> Sheet:
    return Sheet(columns, [0.0], side=SIDE, left=LEFT, title="t")


def draw(made: Sheet, folder) -> np.ndarray:
    """Return the pixels of the first place, and of a margin of a tenth of its side around it."""
    save_png(made.figure, folder / "sheet.png")
    with Image.open(folder / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[:2] == tuple(int(size) for size in made.figure.bbox.size[::-1])
    top = pixels.shape[0] / DPI - SIDE - 0.16  # inches from the last row to the lower edge: see Sheet
    edges = [round(DPI * inches) for inches in (top, top + SIDE, LEFT, LEFT + SIDE)]
    return pixels[edges[0] - 4 : edges[1] + 4, edges[2] - 4 : edges[3] + 4]


def test_pixels_are_scaled_to_even_squares(tmp_path):
    made = make_sheet()
    made.picture(0, 0, FOUR)
    pixels = draw(made, tmp_path)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    assert {tuple(colour) for colour in colours.tolist()} == {WHITE, RED, GREEN, BLUE, BLACK}
    assert counts[:4].max() - counts[:4].min() <= 2 * DPI * SIDE  # a row and a column of the sheet's pixels
    half = len(pixels) // 2
    assert pixels[2, 2].tolist() == [255, 255, 255]
    for at, colour in (((9, 9), RED), ((9, -9), GREEN), ((-9, 9), BLUE), ((-9, -9), BLACK)):
        assert tuple(pixels[at]) == colour
    assert tuple(pixels[half - 3, half - 3]) == RED
    assert tuple(pixels[half + 3, half + 3]) == BLACK
    fractions = make_sheet()
    fractions.picture(0, 0, FOUR / 255)
    np.testing.assert_array_equal(draw(fractions, tmp_path), pixels)


def test_an_oblong_picture_keeps_its_form_in_the_middle_of_its_place(tmp_path):
    made = make_sheet()
    made.picture(0, 0, np.zeros((1, 2, 3), dtype=np.uint8))
    dark = draw(made, tmp_path).sum(axis=2) == 0
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert len(columns) == pytest.approx(DPI * SIDE, abs=1)
    assert len(rows) == pytest.approx(DPI * SIDE / 2, abs=1)
    assert rows[0] + rows[-1] == pytest.approx(len(dark), abs=2)


def test_pictures_stand_side_by_side(tmp_path):
    made = make_sheet(2)
    made.picture(0, 1, FOUR)
    assert (draw(made, tmp_path) == 255).all()


def test_a_map_lies_over_its_picture_and_is_interpolated(tmp_path):
    made = make_sheet()
    made.picture(0, 0, np.full((1, 1, 3), 200, dtype=np.uint8))
    made.map(0, 0, np.array([[0.2, 1.0], [0.2, 1.0]], dtype=np.float32))
    pixels = draw(made, tmp_path)
    row = pixels[len(pixels) // 2, 6:-6]
    colours = colormaps["inferno"]
    for at, value in ((0, 0.2), (len(row) // 2, 0.6), (-1, 1.0)):
        np.testing.assert_allclose(row[at], 0.25 * 200 + 0.75 * 255 * np.array(colours(value)[:3]), atol=4)
    middle = row[len(row) // 4 : -len(row) // 4]
    assert np.abs(np.diff(middle, axis=0)).max() <= 12  # no step between the two halves


def test_the_points_of_a_map_are_the_middles_of_pixels(tmp_path):
    made = make_sheet()
    made.map(0, 0, np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    light = draw(made, tmp_path)[4:-4, 4:-4, 0]
    rows, columns = np.nonzero(light == light.max())
    assert rows.mean() == pytest.approx(len(light) / 2, abs=2)
    assert columns.mean() == pytest.approx(len(light) / 2, abs=2)


def test_an_outline_goes_between_the_pixels_of_a_mask_and_others(tmp_path):
    made = make_sheet()
    made.picture(0, 0, np.zeros((8, 8, 3), dtype=np.uint8))
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:5, 3:8] = True
    made.outline(0, 0, mask)
    light = draw(made, tmp_path)[4:-4, 4:-4].sum(axis=2) > 300
    cell = len(light) / 8
    rows, columns = np.flatnonzero(light.any(1)) + 0.5, np.flatnonzero(light.any(0)) + 0.5
    assert [rows[0], rows[-1]] == pytest.approx([2 * cell, 5 * cell], abs=2)
    assert columns[0] == pytest.approx(3 * cell, abs=2)
    assert columns[-1] == pytest.approx(7.5 * cell, abs=2)  # open at the edge of the picture
    assert not light[round(3.5 * cell), round(5.5 * cell)]


def test_a_mask_of_the_whole_picture_has_no_outline(tmp_path):
    made = make_sheet()
    made.picture(0, 0, np.zeros((4, 4, 3), dtype=np.uint8))
    made.outline(0, 0, np.ones((4, 4), dtype=bool))
    assert (draw(made, tmp_path)[6:-6, 6:-6] == 0).all()


# -- answer sheets -----------------------------------------------------------------------------------------------------


def test_a_run_on_pairs_draws_them(tmp_path, monkeypatch):
    save = plots.save_png
    monkeypatch.setattr(plots, "save_png", lambda figure, path: path.stem == "retrieval" and save(figure, path))
    monkeypatch.setattr("fedkern.report.figures.plots.to_svg", lambda figure, name: "<svg></svg>")
    options = {"test_samples": 12, "validation_samples": 6}
    small = {"clients": 2, "train_samples": 40, "rounds": 1, "local_steps": 1, "width": 4, "workers": 1}
    config = RunConfig.make("fedavg", data="captions", **small, data_options=options)
    data = load_data(config)
    run(config, out=tmp_path)
    assert "retrieval.png" in [path.name for path in write_pictures(tmp_path, data=data)]
    split, sheets = data.tests[""], []

    class Kept(sheet.Sheet):
        def __init__(self, *given, title, **options):
            sheets.append((title, [], []))
            super().__init__(*given, title=title, **options)

        def picture(self, row, column, image):
            sheets[-1][1].append(image)

        def after(self, row, lines):
            sheets[-1][2].append(lines)

    monkeypatch.setattr(answer_sheets, "Sheet", Kept)
    answer_sheets.retrieval(read_run_folder(tmp_path), data, None)
    ((title, images, captions),) = sheets
    assert len(images) == len(captions) == answer_sheets.CAPTIONED
    assert title.startswith(f"Test images and the nearest of {len(set(split.texts))} captions, fedavg on captions")
    for image, lines in zip(images, captions, strict=True):
        row = next(i for i, own in enumerate(split.images) if np.array_equal(sheet.to_rgb(own.numpy()), image))
        own = {text for text, name in zip(split.texts, split.ids, strict=True) if name == split.ids[row]}
        for line in lines:
            place, is_marked = re.match(r"(?:✓ )?(place \d+: )?", line[0])[1] or "", line[0].startswith("✓ ")
            assert (line in {answer_sheets.caption_lines(place + text, is_marked) for text in own}) is is_marked
        assert any(colour == plots.GREEN for _, colour in lines)
        assert len(lines) <= answer_sheets.NEAREST + 1

    missing = "There are no retrieval examples: they need a complete network with an image and a text encoder."
    for drawn in (True, False):
        *_, section, _ = run_page.page(read_run_folder(tmp_path)).sections
        assert (missing in section.blocks) is not drawn
        assert ("Retrieval examples" in [getattr(block, "title", "") for block in section.blocks]) is drawn
        (tmp_path / "retrieval.png").unlink(missing_ok=True)


def test_long_captions_stay_beside_their_image():
    lines = [("W" * 300, False), ("short", True), ("many words " * 30, False), ("place 9: " + "word " * 60, True)]
    made = sheet.Sheet(1, [0.12] * 2, side=1.25, left=0.1, right=5.2, title="t")
    for row in (0, 1):
        made.after(row, [answer_sheets.caption_lines(*line) for line in lines])
    _, *texts = made.figure.texts
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text()[:2] for text in texts[:4]] == ["WW", "✓ ", "ma", "✓ "]
    assert all(upper.y0 >= lower.y1 - 2 for upper, lower in pairwise(boxes))
    assert all(box.x1 <= made.figure.bbox.width for box in boxes)


# -- artifact sheet ----------------------------------------------------------------------------------------------------


def read_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_run_folder_gets_a_picture_for_every_name(tmp_path):
    data = load("digits", clients=2, seed=0, train_samples=60)
    config = RunConfig.make("fedavg", data="digits", clients=2, train_samples=60, rounds=2)
    (tmp_path / "config.toml").write_text(config.to_toml())
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n')
    DataFacts.of(data, private=False).write(tmp_path)
    log = ArtifactLog(tmp_path, 2)
    red = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    for round in (1, 2):
        log.add(Artifact("generated", round, red, ("", "")))
        log.add(Artifact("teacher_weights", round, torch.rand(2, 10), ("client", "class")))
        log.add(Artifact("accuracy", round, torch.rand(2, 2), ("client", "client")))
    log.write()
    written = [path.name for path in pictures.write_pictures(tmp_path, data=data, model=torch.nn.Identity())]
    assert written == ["accuracy.png", "partition.png", "generated.png", "teacher_weights.png", "accuracy_shown.png"]
    pixels = read_png(tmp_path / "generated.png").reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() > 6 * 50 * 50  # three red images in each of two rows
    assert read_png(tmp_path / "teacher_weights.png").std() > 10


@pytest.mark.parametrize(("rows", "columns", "rounds"), [(1, 1, 1), (5, 10, 9), (20, 100, 1)])
def test_any_table_can_be_drawn(tmp_path, rows, columns, rounds):
    values = torch.linspace(0, 1, rows * columns).view(rows, columns)
    values[0, 0] = float("nan")
    entries = [Artifact("t", r + 1, values * (r + 1), ("client", "class")) for r in range(rounds)]
    names = [f"class number {i}" for i in range(columns)]
    plots.save_png(sheet.draw_sheet(entries, title="t", classes=names), tmp_path / "t.png")
    assert read_png(tmp_path / "t.png").std() > 5


def test_equal_tables_are_drawn_once():
    equal = torch.tensor([[0.25, float("nan")]])
    values = [equal, equal.clone(), equal.clone(), equal + 0.5]
    entries = [Artifact("teacher_weights", 4 * r, v, ("client", "class")) for r, v in enumerate(values, 5)]
    figure = sheet.draw_sheet(entries, title="t")
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["rounds 20 to 28: the same", "round 32"]
    assert [text.get_text() for text in panels[0].texts] == [".25", "–"]
    assert bar.get_ylabel() == "teacher weights"


def test_values_of_a_table_are_named_and_whole():
    axes = ("client", "class", "share of the votes that a client with many classes has")
    entries = [Artifact("votes", 1, torch.tensor([[10.25, -0.5]]), axes)]
    figure = sheet.draw_sheet(entries, title="a title that is longer than this small picture " * 2)
    panel, bar = figure.axes
    assert bar.get_ylabel().replace("\n", " ") == axes[2]
    assert [text.get_text() for text in panel.texts] == ["10.25", "-.50"]
    figure.draw_without_rendering()
    boxes = [figure._suptitle.get_window_extent(), bar.yaxis.label.get_window_extent()]
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y1) for box in boxes)


def test_four_tables_of_many_with_one_scale():
    entries = [Artifact("t", r, torch.tensor([[0.2, 0.3 * r]]), ("client", "class")) for r in range(1, 10)]
    figure = sheet.draw_sheet(entries, title="t", classes=("cat", "dog"))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["round 1", "round 4", "round 6", "round 9"]
    (scale,) = {axes.images[0].get_clim() for axes in panels}
    assert scale == pytest.approx((0.0, 2.7))
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["cat", "dog"]


# -- confusion sheet ---------------------------------------------------------------------------------------------------


def matrix(classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 40 * np.eye(classes, dtype=np.int64) + rng.integers(0, 4, (classes, classes))


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [text.get_text() for text in figure.texts]


def test_counts_and_names_are_written():
    counts = np.array([[50, 3], [0, 7]])
    found = Confusions(("nevus", "melanoma"), {"id": counts, "ood": counts * 0 + 1})
    figure = plots.draw_confusions(found, title="t")
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
    figure = plots.draw_confusions(Confusions(names, {"id": matrix(3), "ood": matrix(3)}), title="t")
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
    figure = plots.draw_confusions(Confusions(("a", "b"), {"test": np.array([[0, 0], [1, 3]])}), title="t")
    image = next(child for child in figure.axes[0].get_children() if isinstance(child, AxesImage))
    assert image.get_array().mask.tolist() == [[True, True], [False, False]]


def test_many_classes_have_a_list_of_mistakes():
    counts = matrix(100)
    counts[3, 7] = 25
    names = tuple(f"class {c}" for c in range(100))
    figure = plots.draw_confusions(Confusions(names, {"test": counts}), title="t")
    assert len(figure.axes[0].texts) == 0
    assert "class 3 taken for class 7: 25" in texts(figure)
    labels = [text for text in figure.texts if text.get_text() in names]
    assert [text.get_text() for text in labels] == [name for name in names for _ in ("row", "column")]
    assert all(text.get_fontsize() >= 5 for text in labels)


def test_the_most_frequent_mistakes():
    counts = np.array([[90, 2, 0], [5, 70, 2], [0, 0, 3]])
    assert plots.list_mistakes(counts, ("a", "b", "c")) == [
        "b taken for a: 5", "a taken for b: 2", "b taken for c: 2",
    ]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("classes", "sets"), [
    (1, 1), (2, 3), (10, 2), (21, 1), (100, 1), pytest.param(300, 2, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_any_matrix_can_be_drawn(classes, sets, tmp_path):
    names = tuple(f"US$ class number {c} {{$" for c in range(classes))
    found = Confusions(names, {name: matrix(classes) for name in ("id", "ood", "held_out")[:sets]})
    plots.save_png(plots.draw_confusions(found, title="$ {$"), tmp_path / "c.png")
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
    DataFacts.of(data, private=False).write(folder)
    return [path.name for path in pictures.write_pictures(folder, data=data, model=torch.nn.Identity())]


def test_the_picture_is_among_those_of_a_run_unless_its_counts_are_damaged(tmp_path, data):
    folder = make_run(tmp_path)
    assert names(folder, data) == ["accuracy.png", "confusion.png", "partition.png"]
    assert json.loads((folder / "pictures.json").read_text())["pictures"][1] == "confusion.png"
    (folder / "confusion.json").write_text("{")
    with pytest.raises(UserError, match=r"confusion\.json is damaged"):
        names(folder, data)
    (folder / "confusion.json").unlink()  # as in a run of an earlier version
    assert names(folder, data) == ["accuracy.png", "partition.png"]


def test_private_records_have_no_such_picture(tmp_path, data):
    folder = make_run(tmp_path, records="private")
    (folder / "confusion.png").write_bytes(b"older")
    assert names(folder, data) == ["accuracy.png"]
    assert not (folder / "confusion.png").exists()
