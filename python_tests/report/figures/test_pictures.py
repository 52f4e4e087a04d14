"""The PNG files of a run folder."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import font_manager, rcParams
from matplotlib.artist import Artist
from PIL import Image

from fedkern import models
from fedkern.data import PartitionStatistics, load
from fedkern.engine.store import run_folder
from fedkern.engine.store.record_files import DataFacts
from fedkern.errors import UserError
from fedkern.report import run_contents
from fedkern.report.figures import answer_sheets, curves, pictures, plots, sheet
from fedkern.report.figures.sheet import to_rgb
from fedkern.report.names import label
from fedkern.settings import run_data
from fedkern.settings.config import RunConfig, load_settings
from fedkern.settings.run_data import load_data
from fedkern.tasks import TASKS
from python_tests.report.answer_data import data_of


@pytest.fixture(scope="module")
def data():
    return load("colordigits", clients=3, seed=0, train_samples=90)


def make_run(folder: Path, data) -> Path:
    config = RunConfig.make("fedavg", data="colordigits", clients=3, train_samples=90, rounds=2)
    (folder / "config.toml").write_text(config.to_toml())
    lines = [{"round": i, "id_accuracy": 0.4 * i, "ood_accuracy": 0.3 * i} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    DataFacts.of(data, private=False).write(folder)
    save_model(models.build("cnn", classes=10, channels=3, image_size=32, seed=0), folder)
    return folder


def save_model(model, folder: Path, name: str = "cnn") -> None:
    channels = next(model.parameters()).shape[1]
    about = {
        "model": name, "width": None, "task": "classification",
        "classes": [str(c) for c in range(model.head.out_features)], "channels": channels, "image_size": [32, 32],
        "mean": [0.5] * channels, "std": [0.2] * channels, "grey_bits": 8, "window": None, "method": "fedavg",
        "rounds": 2,
    }  # fmt: skip
    run_folder.write_model(folder / run_folder.MODEL, model, about)


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")  # without an alpha channel
        return np.asarray(image)


def test_a_run_gets_its_three_pictures(tmp_path, data):
    written = pictures.write_pictures(make_run(tmp_path, data), data=data)
    assert [path.name for path in written] == ["accuracy.png", "partition.png", "gradcam.png"]
    for path in written:
        pixels = read_png(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 10
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_run_with_private_records_has_no_counts(tmp_path, data):
    folder = make_run(tmp_path, data)
    (folder / "partition.png").write_bytes(b"older")
    config = load_settings(folder).replace(records="private")
    (folder / "config.toml").write_text(config.to_toml())
    for content, sentence in (
        (None, "has no summary.json, and its records are private"),
        ("{", "summary.json is damaged"),
    ):
        if content is not None:
            (folder / "summary.json").write_text(content)
        with pytest.raises(UserError, match=sentence):
            pictures.write_pictures(folder, data=data)
        assert (folder / "partition.png").read_bytes() == b"older"
    (folder / "summary.json").write_text("{}")
    written = pictures.write_pictures(folder, data=data)
    assert [path.name for path in written] == ["accuracy.png", "gradcam.png"]
    assert not (folder / "partition.png").exists()
    assert pictures.find_pictures(folder) == written


def test_pictures_are_listed_and_missed(tmp_path, data):
    """Without running statistics there is no gradcam.png, and nothing waits for it."""
    folder = make_run(tmp_path, data)
    assert pictures.find_pictures(folder) == []
    config = load_settings(folder)
    (folder / "config.toml").write_text(config.replace(buffers="drop").to_toml())
    written = pictures.write_pictures(folder, data=data)
    assert [path.name for path in written] == ["accuracy.png", "partition.png"]
    assert pictures.find_pictures(folder) == written
    written[0].unlink()
    assert pictures.find_pictures(folder) == []
    for damaged in ("[", "[]", '{"pictures": null}'):
        (folder / "pictures.json").write_text(damaged)
        assert pictures.find_pictures(folder) == []


def test_data_that_are_loaded_again_are_those_of_the_run(tmp_path, data, monkeypatch):
    """The data may have moved, the run's GPU may be missing, and the held-out client is left out."""
    folder = make_run(tmp_path, data)
    config = load_settings(folder).replace(held_out_client=1, data_root="/before")
    text = config.to_toml().replace(f'device = "{config.device}"', 'device = "cuda"')
    (folder / "config.toml").write_text(text)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    seen = {}

    def note_root(config, **_):
        seen["root"] = config.data_root
        return data

    def draw(run, data, *_):
        seen["sets"] = list(data.tests)

    monkeypatch.setattr(run_data, "load_data", note_root)
    monkeypatch.setitem(answer_sheets.ANSWERS, "gradcam", draw)
    pictures.write_pictures(folder, data_root="/now")
    assert seen == {"root": "/now", "sets": ["id", "ood", "held_out"]}


def test_grey_images_without_masks(tmp_path):
    data = load("digits", clients=2, seed=0, train_samples=60)
    config = RunConfig.make("fedavg", data="digits", clients=2, train_samples=60)
    (tmp_path / "config.toml").write_text(config.to_toml())
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n')
    DataFacts.of(data, private=False).write(tmp_path)
    model = models.build("cnn", classes=10, channels=1, image_size=32, seed=0)
    save_model(model, tmp_path)
    # Without the data they are loaded again.
    assert len(pictures.write_pictures(tmp_path)) == 3
    assert data.tests[""].masks is None
    assert read_png(tmp_path / "gradcam.png").std() > 10


def apart(texts) -> bool:
    """Return whether texts do not overlap, and all are inside their picture."""
    boxes = [text.get_window_extent() for text in texts]
    inside = texts[0].figure.bbox.padded(1)
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 for box in boxes)
    return not any(box.overlaps(neighbour) for i, box in enumerate(boxes) for neighbour in boxes[:i])


def test_long_names_of_classes_stand_apart():
    names = [f"{kind} adenocarcinoma of the colon" for kind in ("mucinous", "tubular", "W" * 20, "other")]
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    model = models.build("cnn", classes=4, channels=3, image_size=16, seed=0, width=2)
    run = SimpleNamespace(name="a method on the data in a folder with a long name")
    masks = torch.ones(4, 16, 16, dtype=torch.bool)
    data = data_of(images, torch.arange(4), names, ["id", "a hospital of many words"], masks=masks)
    cams = answer_sheets.gradcam(run, data, model)
    network = models.build("unet-small", classes=9, channels=3, image_size=16, seed=0)
    data = data_of(images, torch.zeros(4, 16, 16, dtype=torch.int64), names * 3)
    second = answer_sheets.segmentation(run, data, network)
    assert apart(cams.texts)
    assert apart(second.texts)
    assert any("relative to the largest" in text.get_text() for text in cams.texts)
    assert [text.get_text() for text in second.texts][1:12] == [label(name) for name in (names * 3)[1:]]


def test_a_segmentation_is_laid_over_its_images(tmp_path):
    settings = {"data": "segdigits", "clients": 2, "train_samples": 20, "data_options": {"test_samples": 12}}
    config = RunConfig.make("fedavg", partition="iid", main="dice", **settings)
    (tmp_path / "config.toml").write_text(config.to_toml())
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "dice": 0.25}\n{"round": 2, "dice": 0.5}\n')
    DataFacts.of(load_data(config), private=False).write(tmp_path)
    save_model(models.build("unet-small", classes=11, channels=3, image_size=32, seed=0), tmp_path, "unet-small")
    names = ["dice.png", "partition.png", "segmentation.png"]
    assert [path.name for path in pictures.write_pictures(tmp_path)] == names
    assert all(read_png(tmp_path / name).std() > 10 for name in names)
    colours = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    laid = answer_sheets.overlay_classes(np.full((1, 4, 3), 0.5), np.array([[0, 1, 2, -100]]), colours)
    np.testing.assert_allclose(laid[0], [[0.5] * 3, [0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.25] * 3])
    assert to_rgb(np.zeros((4, 5, 6), np.uint8)).shape == (5, 6, 3)


def accuracy_curves(records, main, *, title="", stacked=False, **more):
    return curves.draw_panels(curves.accuracy_panels(records, main, **more), title=title, stacked=stacked)


def clients_picture(records, main):
    return curves.draw_panels(curves.client_panels(records, main), title="t")


def test_rounds_and_samples_are_counted_in_whole_numbers():
    curve = accuracy_curves([{"round": 1, "accuracy": 0.5}], "accuracy", title="t")
    partition = plots.partition_picture(PartitionStatistics(np.eye(2, dtype=int), ("a", "b"), "iid"), title="t")
    for ticks in (curve.axes[0].get_xticks(), partition.axes[1].get_yticks()):
        assert len(ticks) > 0
        assert all(tick == round(tick) for tick in ticks)


def test_the_curve_has_the_colours_of_both_test_sets(tmp_path):
    records = [{"round": i, "id_accuracy": 0.1 * i, "ood_accuracy": 0.05 * i} for i in range(1, 10)]
    plots.save_png(accuracy_curves(records, "accuracy", title="t"), tmp_path / "a.png")
    pixels = read_png(tmp_path / "a.png").reshape(-1, 3)
    for colour in (plots.BLUE, plots.ORANGE):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).max(axis=1) < 3).sum() > 200
    assert curves.accuracy_panels([{"round": 1, "loss": 2.0}], "accuracy") == []


def test_test_sets_that_the_user_named_have_a_curve_each():
    records = [{"round": i, "accuracy": 0.1 * i, "far_accuracy": 0.2, "far_off_accuracy": 0.3} for i in (1, 2)]
    figure = accuracy_curves(records, "accuracy", tests=("", "far", "far_off"))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines.keys() == {"test", "far", "far_off"}
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 3


def test_every_picture_of_an_asynchronous_run_is_over_the_clock():
    clients = {"0": {"weight": 0.4, "loss": 1.0}}
    rounds = [{"round": i, "accuracy": 0.1, "mean_client_accuracy": 0.1, "clients": clients, "clock": 7.5 * i}
              for i in (1, 2)]  # fmt: skip
    assert list(accuracy_curves(rounds, "accuracy").axes[0].get_lines()[0].get_xdata()) == [1, 2]
    # A set-up round takes no time.
    records = [{"round": -1, "clients": clients}, *({**record, "staleness": 0.5} for record in rounds)]
    for figure in (accuracy_curves(records[1:], "accuracy"), clients_picture(records, "accuracy")):
        axes = figure.axes[0]
        assert list(axes.get_lines()[0].get_xdata()) == [7.5, 15.0]
        assert axes.get_xlabel().startswith("virtual clock")
    (weights,) = curves.weight_panels(records)
    assert weights.curves[0].at == [0.0, 7.5, 15.0]


def test_the_mean_and_the_worst_client_have_a_curve_each():
    records = [{"round": i, "mean_client_accuracy": 0.1 * i, "worst_client_accuracy": 0.05 * i} for i in (1, 2)]
    axes = clients_picture([*records, {"round": 3, "loss": 1.0}], "accuracy").axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"mean client": ([1, 2], [10, 20]), "worst client": ([1, 2], [5, 10])}
    assert axes.get_ylabel() == "accuracy\non the clients' own test sets (%)"
    assert curves.client_panels([{"round": 1, "accuracy": 0.5, "worst_client_loss": 1.0}], "accuracy") == []


def test_every_client_has_a_thin_curve_and_of_very_many_some():
    def records(clients):
        means = {"mean_client_accuracy": 0.2, "worst_client_accuracy": 0.1}
        own = {str(k): {"accuracy": k / clients, "loss": 1.0} for k in range(clients)}
        return [{"round": i, **means, "client_metrics": own} for i in (1, 2)]

    lines = clients_picture(records(4), "accuracy").axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines[:4]] == [[0, 0], [25, 25], [50, 50], [75, 75]]
    assert [line.get_label() for line in lines if line.get_label()[0] != "_"] == [
        "single clients", "mean client", "worst client",
    ]  # fmt: skip
    assert len(clients_picture(records(450), "accuracy").axes[0].get_lines()) == 150 + 2


def test_sets_with_other_numbers_of_candidates_are_on_other_axes():
    """Recall at 1 among 40 texts and among 400 are different questions."""
    sizes = {"": 40.0, "unseen_": 40.0, "validation_": 400.0}
    records = [
        {"round": i, **{f"{p}i2t_r1": 0.1 * i for p in sizes}, **{f"{p}gallery": n for p, n in sizes.items()}}
        for i in (1, 2)
    ]
    figure = accuracy_curves(records, "i2t_r1", title="t")
    axes = {axes.get_ylabel(): [line.get_label() for line in axes.get_lines()] for axes in figure.axes}
    assert axes == {
        "recall at 1, image to text\namong 40 candidates (%)": ["test", "unseen client"],
        "recall at 1, image to text\namong 400 candidates (%)": ["validation"],
    }
    stacked = accuracy_curves(records, "i2t_r1", stacked=True)
    assert stacked.get_figwidth() < figure.get_figwidth()
    assert [axes.get_subplotspec().rowspan.start for axes in stacked.axes] == [0, 1]
    assert len({axes.get_xlim() for axes in figure.axes}) == len({axes.get_ylim() for axes in figure.axes}) == 1
    equal = [{name: 40.0 if "gallery" in name else value for name, value in record.items()} for record in records]
    assert [len(axes.get_lines()) for axes in accuracy_curves(equal, "i2t_r1", title="t").axes] == [3]
    assert accuracy_curves([{"round": 1, "i2t_r1": 0.5, "gallery": float("inf")}], "i2t_r1").axes


def test_a_long_title_stays_inside_the_picture():
    title = "a method with a name of many words on " + "the-folder-of-a-data-set" * 3
    figure = accuracy_curves([{"round": 1, "accuracy": 0.5}], "accuracy", title=title)
    figure.draw_without_rendering()
    assert figure.axes[0].title.get_text() == ""
    assert figure.axes[0]._left_title.get_window_extent().x1 <= figure.bbox.width


@pytest.mark.parametrize(("highest", "end"), [(0.02, 5), (0.3, 50), (0.97, 100)])
def test_the_axis_ends_above_small_values(highest, end):
    records = [{"round": 1, "i2t_r1": 0.01, "minority_i2t_r1": highest, "validation_i2t_r1": 0.01}]
    assert accuracy_curves(records, "i2t_r1").axes[0].get_ylim() == pytest.approx((0, 1.02 * end))


def test_figures_that_need_no_learning_are_dotted_lines():
    records = [{"round": 1, "id_accuracy": 0.5, "ood_accuracy": 0.5, "validation_accuracy": 0.4}]
    figure = accuracy_curves(records, "accuracy", chance={"id_accuracy": 0.25, "ood_accuracy": 0.25, "accuracy": 0.9})
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert list(line.get_ydata()) == [25, 25]
    assert line.get_label() == "commonest class"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (120, 3), (3, 100)])
def test_any_partition_can_be_drawn(tmp_path, shape):
    counts = np.arange(shape[0] * shape[1]).reshape(shape)
    names = tuple(f"class number {i}" for i in range(shape[1]))
    plots.save_png(plots.partition_picture(PartitionStatistics(counts, names, "iid"), title="t"), tmp_path / "p.png")
    assert read_png(tmp_path / "p.png").std() > 10


def test_the_layout_leaves_out_the_numbers_of_a_partition_which_lie_in_their_axes():
    statistics = PartitionStatistics(np.full((20, 20), 1234), tuple(f"class number {i}" for i in range(20)), "iid")
    figure = plots.partition_picture(statistics, title="t")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert len(axes.texts) == 400
    for number in axes.texts:
        box = number.get_window_extent()
        assert axes.bbox.contains(box.x0, box.y0)
        assert axes.bbox.contains(box.x1, box.y1)
        assert not number.get_in_layout()


def test_the_partition_of_many_clients_is_that_of_some():
    counts = np.random.default_rng(0).integers(0, 9, size=(10_000, 4))
    colours = np.zeros((10_000, 4, 3), dtype=np.uint8)
    statistics = PartitionStatistics(counts, tuple("abcd"), "iid", colours=colours, tied=1.0)
    panels = plots.partition_picture(statistics, title="t").axes[:2]
    assert [panel.images[0].get_array().shape[0] for panel in panels] == [plots.DRAWN] * 2
    assert {panel.get_ylabel() for panel in panels} == {"200 of 10,000 clients, largest first"}
    sizes = panels[0].images[0].get_array().sum(axis=1)
    assert (np.diff(sizes) <= 0).all()
    assert [sizes[0], sizes[-1]] == [counts.sum(axis=1).max(), counts.sum(axis=1).min()]


@pytest.mark.parametrize("clients", [2, 3, 30])
def test_the_partition_of_a_coloured_set_shows_its_colours(clients):
    statistics = load("colordigits", clients=clients, seed=0, train_samples=300).statistics
    statistics = replace(statistics, counts=np.where(np.arange(10) == 4, 0, statistics.counts))
    _, colours, _ = plots.partition_picture(statistics, title="t").axes
    assert colours.get_title(loc="left") == "background colour of 70 % of the images, others random"
    shown = colours.images[0].get_array()
    present = statistics.counts > 0
    assert present.any(axis=0).sum() == 9
    np.testing.assert_array_equal(shown[..., :3][present], statistics.colours[present])
    np.testing.assert_array_equal(shown[..., 3], np.where(present, 255, 0))
    assert [tick.get_text() for tick in colours.get_xticklabels()] == [str(digit) for digit in range(10)]


def test_letters_are_drawn_without_hints(tmp_path):
    before, seen = rcParams["text.hinting"], []

    class Letters(Artist):
        def draw(self, renderer):
            seen.append(rcParams["text.hinting"])

    figure = plots.new_figure(2, 2)
    figure.add_artist(Letters())
    plots.save_png(figure, tmp_path / "p.png")
    assert seen == ["none"]
    assert rcParams["text.hinting"] == before != "none"


FAULTS = [
    ("figures.curves.accuracy_panels", "accuracy"), ("figures.curves.client_panels", "clients"),
    ("figures.plots.partition_picture", "partition"), ("figures.curves.weight_panels", "weights"),
    ("figures.plots.draw_confusions", "confusion"),
    ("run_contents.constant_figures", "accuracy"), ("figures.answer_sheets.grad_cam", "gradcam"),
    ("figures.answer_sheets.choose", "gradcam"),
    ("figures.pictures.read_model", "gradcam"), ("figures.sheet.draw_sheet", "clouds"),
]  # fmt: skip


@pytest.fixture
def quick(monkeypatch, tmp_path, data):
    """Return a run folder with every kind of picture of a classifier, all of them empty files."""
    for module, name in ((curves, "accuracy_panels"), (curves, "client_panels"), (curves, "weight_panels"),
                         (curves, "draw_panels"), (plots, "partition_picture")):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: object())
    monkeypatch.setattr(plots, "draw_confusions", lambda *_, **__: object())
    monkeypatch.setattr(run_contents, "constant_figures", lambda *_: {})
    monkeypatch.setattr(run_contents.confusions, "read", lambda _: SimpleNamespace(matrices={"id": 0}, classes=("0",)))
    monkeypatch.setattr(run_contents, "read_artifacts", lambda _: [SimpleNamespace(name="clouds")])
    monkeypatch.setattr(plots, "save_png", lambda _, path: path.touch())
    monkeypatch.setattr(sheet, "draw_sheet", lambda *_, **__: object())
    return make_run(tmp_path, data)


def test_the_settings_are_loaded_once(quick, data, monkeypatch):
    read, loaded = RunConfig.of, []
    monkeypatch.setattr(RunConfig, "of", lambda values: loaded.append(values) or read(values))
    pictures.write_pictures(quick, data=data)
    assert len(loaded) == 1


@pytest.mark.parametrize(("place", "picture"), FAULTS)
def test_a_picture_that_fails_is_named_and_the_others_are_drawn(place, picture, quick, data, monkeypatch):
    complete = {path.name for path in pictures.write_pictures(quick, data=data)}
    assert len(complete) == 7
    assert {path.name for path in pictures.find_pictures(quick)} == complete

    def failing(error):
        def call(*_, **__):
            raise error

        monkeypatch.setattr(f"fedkern.report.{place}", call)

    warned = []
    with monkeypatch.context():
        failing(RuntimeError("odd\nmap"))
        written, why = pictures.finished_pictures(quick, data=data, warn=warned.append)
    assert why is None
    assert {path.name for path in written} == complete - {f"{picture}.png"}
    assert warned == [f"{picture}.png is missing, as it cannot be drawn: RuntimeError: odd map."]
    assert not (quick / f"{picture}.png").exists()  # that of an older network
    assert pictures.find_pictures(quick) == []  # so that resume and report draw again
    for error in (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        failing(error())
        with pytest.raises(error):
            pictures.write_pictures(quick, data=data)


@pytest.mark.parametrize("task", ["segmentation", "retrieval"])
def test_the_picture_of_another_task_fails_in_its_own_name(task, quick, data, monkeypatch):
    replace(DataFacts.read(quick), pictures=TASKS[task].pictures).write(quick)
    monkeypatch.setitem(answer_sheets.ANSWERS, task, lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=rf"{task}\.png is missing, as it cannot be drawn: ZeroDivisionError"):
        found = pictures.write_pictures(quick, data=data)
    assert {"accuracy.png", "clients.png", "confusion.png", "clouds.png"} < {path.name for path in found}


def test_no_grad_cam_is_none(quick, data):
    config = load_settings(quick).replace(grad_cam=0)
    (quick / "config.toml").write_text(config.to_toml())
    assert len(pictures.write_pictures(quick, data=data)) == 6
    assert not (quick / "gradcam.png").exists()


def test_examples_go_through_the_classes_in_turn():
    labels = torch.tensor([2, 0, 0, 1, 2, 0])
    assert answer_sheets.choose(labels, 5).tolist() == [1, 3, 0, 2, 4]
    assert answer_sheets.choose(labels, 99).tolist() == [1, 3, 0, 2, 4, 5]
    assert answer_sheets.choose(labels[:0], 4).tolist() == []


def test_letters_without_a_font_are_told_once(tmp_path, monkeypatch):
    warnings = []
    fonts = font_manager.fontManager.ttflist
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in fonts if font.name == "DejaVu Sans"])
    monkeypatch.setattr(plots, "_WARNED", set())
    plots._find_families.cache_clear()
    for name, site in (("latin.png", "north"), ("partition.png", "\u534f\u548c"), ("again.png", "\u0915")):
        statistics = PartitionStatistics(np.full((2, 2), 7), ("a", "b"), "iid", names=(site, "south"))
        plots.save_png(plots.partition_picture(statistics), tmp_path / name)
    plots.warn_of_missing_letters(warnings.append)
    plots.warn_of_missing_letters(warnings.append)
    (sentence,) = warnings
    assert sentence.startswith("again.png, partition.png: boxes stand for letters of names that no font here has.")
