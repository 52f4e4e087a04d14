"""Pictures of a method's artifacts: drawn from the run folder, for any number of rounds, images and clients."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.engine.store.artifacts import Artifact, ArtifactLog
from fedkern.engine.store.data_facts import DataFacts
from fedkern.report.figures import artifact_sheet, pictures, plots
from fedkern.settings.config import RunConfig


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
    plots.save_png(artifact_sheet.draw_sheet(entries, title="t", classes=names), tmp_path / "t.png")
    assert read_png(tmp_path / "t.png").std() > 5


def test_equal_tables_are_drawn_once():
    equal = torch.tensor([[0.25, float("nan")]])
    values = [equal, equal.clone(), equal.clone(), equal + 0.5]
    entries = [Artifact("teacher_weights", 4 * r, v, ("client", "class")) for r, v in enumerate(values, 5)]
    figure = artifact_sheet.draw_sheet(entries, title="t")
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["rounds 20 to 28: the same", "round 32"]
    assert [text.get_text() for text in panels[0].texts] == [".25", "–"]
    assert bar.get_ylabel() == "teacher weights"


def test_values_of_a_table_are_named_and_whole():
    axes = ("client", "class", "share of the votes that a client with many classes has")
    entries = [Artifact("votes", 1, torch.tensor([[10.25, -0.5]]), axes)]
    figure = artifact_sheet.draw_sheet(entries, title="a title that is longer than this small picture " * 2)
    panel, bar = figure.axes
    assert bar.get_ylabel().replace("\n", " ") == axes[2]
    assert [text.get_text() for text in panel.texts] == ["10.25", "-.50"]
    figure.draw_without_rendering()
    boxes = [figure._suptitle.get_window_extent(), bar.yaxis.label.get_window_extent()]
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y1) for box in boxes)


def test_four_tables_of_many_with_one_scale():
    entries = [Artifact("t", r, torch.tensor([[0.2, 0.3 * r]]), ("client", "class")) for r in range(1, 10)]
    figure = artifact_sheet.draw_sheet(entries, title="t", classes=("cat", "dog"))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["round 1", "round 4", "round 6", "round 9"]
    (scale,) = {axes.images[0].get_clim() for axes in panels}
    assert scale == pytest.approx((0.0, 2.7))
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["cat", "dog"]
