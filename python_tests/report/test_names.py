"""Names that users choose (classes, data, rounds, settings): drawn or cut everywhere, never interpreted."""

import io
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from rich.console import Console

from fedkern import models
from fedkern.data import PartitionStatistics
from fedkern.engine.store.artifacts import Artifact
from fedkern.engine.store.confusions import Confusions
from fedkern.errors import UserError
from fedkern.listeners import RunInfo
from fedkern.listeners.tensorboard import TensorBoard, scalars
from fedkern.methods.base import Round
from fedkern.report import doctor_page, tables
from fedkern.report.figures import answer_sheets, curves, plots, sheet
from fedkern.report.live.notebook import choose_display
from fedkern.report.names import TICK, TITLE, label
from fedkern.report.pages import charts
from fedkern.settings.config import RunConfig, read_settings
from fedkern.tasks import CLASSIFICATION
from python_tests.report.answer_data import data_of

NAMES = {
    "formula": "US$ a_{$", "broken formula": r"$\frac$", "underscore": "_a", "percent": "%d %s",
    "line end": "a\nb\rc\td", "nul": "a\0b", "escape": "\x1b[31mred\x1b[2J", "right to left": "\u202eabc",
    "hebrew": "\u05e9\u05dc\u05d5\u05dd", "cjk": "\u732b", "emoji": "\U0001f642", "emoji code": ":dog:",
    "markup": "[bold]x[/]", "closing": "x [/y]", "surrogate": "a\udcffb\ud800", "empty": "", "long": "x" * 10_000,
    "many": "many words " * 1000,
}  # fmt: skip
SHOWN = {  # what a terminal gets; all others stand there as they are
    "line end": r"a\nb\rc\td", "nul": r"a\x00b", "escape": r"\x1b[31mred\x1b[2J", "right to left": r"\u202eabc",
    "surrogate": r"a\udcffb\ud800",
}  # fmt: skip


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return NAMES[request.param]


@pytest.fixture
def texts(monkeypatch, tmp_path) -> list[Text]:
    """Return a list that gets the texts of later drawings."""
    found: list[Text] = []
    draw = plots.FigureCanvasAgg.draw

    def keep(self):
        draw(self)
        found.extend(text for text in self.figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(plots.FigureCanvasAgg, "draw", keep)
    return found


def check(texts: list[Text], name: str) -> None:
    assert texts
    for text in texts:
        said = text.get_text().replace("\n", "")
        assert said.isprintable()
        assert len(said) <= TITLE
        assert text.get_usetex() is False
    names = [label(name, width).replace(" ", "") for width in (TICK, TITLE)]
    named = [text for text in texts if any(label_text in re.sub(r"\s", "", text.get_text()) for label_text in names)]
    assert named
    if label(name):
        assert not any(text.get_parse_math() for text in named)


@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("error")
def test_pictures(name, texts, tmp_path):
    path = tmp_path / "p.png"
    statistics = PartitionStatistics(np.eye(3, dtype=int), (name, "b", name), "iid")
    records = [
        {"round": i, "accuracy": 0.5, "clients": {"0": {"weight": 0.5, "own_loss": 1.0, "samples": 3}}} for i in (1, 2)
    ]
    confusions = Confusions((name, "b", name), {name: np.eye(3, dtype=int), "id": np.ones((3, 3), int)})
    draw = {
        "partition": lambda: plots.partition_picture(statistics, title=name),
        "curves": lambda: curves.draw_panels(curves.accuracy_panels(records, "accuracy"), title=name),
        "confusion": lambda: plots.draw_confusions(confusions, title=name),
        "weights": lambda: curves.draw_panels(curves.weight_panels(records), title=name),
        "table": lambda: sheet.draw_sheet(
            [Artifact("x", 1, torch.eye(3), (name, "class"))], title=name, classes=(name, "b", "c")
        ),
        "images": lambda: sheet.draw_sheet(
            [Artifact("x", 1, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ("", ""))], title=name
        ),
    }  # fmt: skip
    for make in draw.values():
        texts.clear()
        plots.save_png(make(), path)
        check(texts, name)


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("error")
def test_pictures_of_a_model(name, texts, tmp_path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    model = models.build("cnn", classes=3, channels=3, image_size=16, seed=0, width=2)
    run, classes = SimpleNamespace(name=name), (name, f"{name} ", "c")
    plots.save_png(
        answer_sheets.gradcam(run, data_of(images, torch.arange(3), classes, [name]), model), tmp_path / "g.png"
    )
    check(texts, name)
    texts.clear()
    data = data_of(images, torch.randint(0, 3, (3, 16, 16)), classes[::-1])
    plots.save_png(answer_sheets.segmentation(run, data, torch.nn.Conv2d(3, 3, 1)), tmp_path / "s.png")
    check(texts, name)


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=400)


def print_text(renderable) -> str:
    out = console()
    out.print(renderable)
    return out.file.getvalue()


def beginning_of(name: str) -> str:
    """Return the beginning of a name as a terminal shows it."""
    key = next(key for key, value in NAMES.items() if value is name)
    return SHOWN.get(key, name).strip()[:10]


def test_tables(name):
    found = dict.fromkeys(("auc", "low", "high", "tpr", "tpr_low", "tpr_high", "fpr", "member_loss", "other_loss"), 0.5)
    found |= {"members": 3, "others": 3, "member_groups": 3, "other_groups": 3, "untrained": 0, "independent": "image"}
    result = {"task": name, "method": name, "data": name, "networks": 1, "rows": [{"set": name, name or "n": name}]}
    summary = {"method": name, "data": name, "seed": 0, "rounds": 1, "seconds": 1.0, "bytes": {"up": 1, "down": 1}}
    private = {"covers": [name], "leaves_uncovered": [name]}
    for table in (
        tables.partition_table(PartitionStatistics(np.eye(3, dtype=int), (name, "b", "c"), name)),
        tables.attack_table(found, name),
        tables.downstream_table(result),
        tables.final_table({**summary, "metrics": {name or "n": 0.5}, "privacy": private}, "accuracy"),
        tables.class_table({"per_class": {name: {"recall": {name: 0.5, "b": 1.0}}}}),
    ):
        told = print_text(table)
        assert beginning_of(name) in told
        assert len(told) < 30_000
        assert all(character.isprintable() or character == "\n" for character in told)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(name, terminal, tmp_path):
    out = console(terminal)
    listener = choose_display(quiet=False, json=False, console=out)
    config = RunConfig.make("fedavg", clients=2, rounds=1, threads=1)
    object.__setattr__(config, "data", name)
    statistics = PartitionStatistics(np.eye(2, dtype=int), (name, "b"), name)
    data = SimpleNamespace(statistics=statistics, task=CLASSIFICATION, validation=SimpleNamespace(full=None), tests={},
                           form=SimpleNamespace(noun="images", offers={"images"}, seen=(name,)))  # fmt: skip
    run = RunInfo(
        config, Path(name or "run"), 0, (14, 14), 1234, {name: 5}, data, (Round(trains=name), Round()),
    )  # fmt: skip
    listener.on_notice(name)
    listener.on_start(run)
    listener.on_round_start(1, name, [0, 1])
    listener.on_round(
        {"round": 1, "rounds": 1, "name": name, "seconds": 1.0, "bytes_up": 1, "bytes_down": 1, "id_accuracy": 0.5}
    )
    listener.on_warning(name, name)
    listener.on_end({})
    listener.close()
    told = out.file.getvalue()
    assert told.count(beginning_of(name)) >= 6
    for character in ("\0", "\u202e", "\t", "\x1b[31mred", "\x1b[2J"):
        assert character not in told
    assert "\U0001f436" not in told


def test_doctor(monkeypatch):
    out = console()
    report = doctor_page.collect_report()
    report["cpu"]["name"] = report["forced_backend"] = "[bold]x[/] :dog: \x1b[2J"
    doctor_page.print_report(out, report)
    assert out.file.getvalue().count(r"[bold]x[/] :dog: \x1b[2J") == 2


def test_tensorboard(name, tmp_path):
    # torch cleans no tag, and protocol buffers take no surrogates.
    record = {"round": 1, f"loss {name}": 0.5, "clients": {"0": {f"x {name}": 1.0}}}
    tags = list(scalars(record))
    assert len(tags) == 2
    assert all(tag.isprintable() and len(tag) <= 200 for tag in tags)
    board = TensorBoard()
    board.on_start(SimpleNamespace(out=tmp_path, first_round=0, test_sets={"": 1}))
    board.on_round(record)
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(tags)


@pytest.mark.parametrize("kind", ["options", "data_options"])
def test_settings_survive_config_toml(name, kind, monkeypatch):
    """A file of UTF-8 has no surrogates, so settings have none from the beginning."""
    make = RunConfig.make("fedlpfm" if kind == "options" else "fedavg")
    changed = {**getattr(make, kind), "teacher" if kind == "options" else "x": f"logits:{name}"}
    if name == NAMES["surrogate"]:
        with pytest.raises(UserError, match=r'a\\xffb\\ud800" has bytes that are not UTF-8'):
            RunConfig.of({**make.to_dict(), kind: changed})
        return
    config = RunConfig.of({**make.to_dict(), kind: changed}) if kind == "data_options" or name else make
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = config.to_toml().encode().decode()
    assert RunConfig.of(read_settings(text)) == config


def named_curves(name):
    """Return a figure with a legend of every kind that names a client, set, class or group."""
    x, y = [1, 2], [0.5, 0.6]
    records = [
        {"round": r, "accuracy": 0.1, f"{name}_accuracy": 0.2, "clients": {"0": {"weight": 0.4, "name": name},
         "1": {"weight": 0.6, "name": "b"}}} for r in x
    ]  # fmt: skip
    series = [curves.Curve(name, x, y), curves.Curve("b", x, y), curves.Curve(f"{name}s", x, y, curves.SOFT)]
    compared = curves.comparison_panels({name: [[{"round": 1, "accuracy": 0.1}]], "b": []}, ["accuracy"])
    figures = [curves.draw_panels(panels) for panels in (
        curves.accuracy_panels(records, "accuracy", tests=["", name]), curves.weight_panels(records),
        compared["accuracy"],
    )]  # fmt: skip
    texts = [[text.get_text().strip() for legend in f.legends for text in legend.get_texts()] for f in figures]
    drawn = [
        charts.curves("c", "t", [curves.Panel("a", series)]),
        charts.bars("b", "t", ["x", "y"], {name: y, "b": y}, axis="a"),
    ]
    return [*texts, *([re.sub("<[^>]*>", "", chart.svg)] for chart in drawn)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["_north", "__", "_child0", "_nolegend_", "north"])
def test_every_curve_is_in_the_legend(name):
    for texts in named_curves(name):
        assert any(name in text for text in texts)
