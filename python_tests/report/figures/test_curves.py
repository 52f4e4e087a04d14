"""Curves of single clients, and the picture of their weights and losses."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.report.figures.curves import client_curves, draw_panels, weight_panels
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.figures.plots import DRAWN, ORANGE, save_png
from fedkern.settings.config import RunConfig


def records(clients, rounds=3):
    rng = np.random.default_rng(0)
    for r in range(rounds):
        info = {str(k): {"weight": float(w), "own_loss": 2.0 - w} for k, w in enumerate(rng.dirichlet([2] * clients))}
        if r == 1:
            info.pop("0")  # took no part
        yield {"round": r + 1, "clients": info}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("clients", [3, 120])
def test_weights_and_losses_are_drawn(clients, tmp_path):
    path = tmp_path / "weights.png"
    save_png(weights_picture(list(records(clients))), path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    blue, orange = ((np.abs(pixels - np.array(rgb)).sum(1) < 30).sum() for rgb in ((0, 114, 178), (213, 94, 0)))
    assert orange > 100
    assert (blue > 100) == (clients == 3)


def weights_picture(records, *, by_samples=False, page=False):
    return draw_panels(weight_panels(records, by_samples=by_samples), title="t", stacked=True, page=page)


def centre_lines(monkeypatch):
    """Return the heights of the dotted lines."""
    found = []
    drawn = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: found.append(y) or drawn(self, y, **style))
    return found


def test_the_line_of_equal_weights(monkeypatch):
    found = centre_lines(monkeypatch)
    assert weights_picture(list(records(4)))
    assert found == [0.25]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("settings", [{}, {"sample_fraction": 0.67}])
def test_the_lines_of_weights_by_samples(settings, tmp_path, monkeypatch):
    """The lines are the weights at the beginning of a real run, also if a client misses the first round."""
    found = centre_lines(monkeypatch)
    small = {"train_samples": 90, "rounds": 3, "local_epochs": 1, "width": 2, "grad_cam": 0, **settings}
    options = {"weighting": "samples"}
    run(RunConfig.make("afl", data="digits", clients=3, **small, options=options), out=tmp_path)
    write_pictures(tmp_path)
    seen = {}
    for record in read_metrics(tmp_path):
        seen |= {client: info["samples"] for client, info in record["clients"].items()}
    chance, *weights = found
    assert chance > 1  # of accuracy.png, in per cent
    assert weights == [pytest.approx(seen[client] / 90) for client in sorted(seen)]
    assert len(set(weights)) == 3


@pytest.mark.parametrize(("by_samples", "called"), [(False, "equal weights"), (True, "share of the samples")])
def test_the_legend_names_the_dotted_lines_last(by_samples, called):
    found = list(records(3))
    for record in found:
        for info in record["clients"].values():
            info["samples"] = 5
    (legend,) = weights_picture(found, by_samples=by_samples).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["client 0", "client 1", "client 2", called]


def test_weights_begin_at_zero_and_losses_where_they_are():
    found = list(records(3))
    for record in found:
        for info in record["clients"].values():
            info["own_loss"] += 100
    weight, loss = weights_picture(found).axes
    assert weight.get_ylim()[0] == 0
    assert loss.get_ylim()[0] > 100


def test_other_methods_have_no_such_picture():
    assert weight_panels([{"round": 1, "clients": {"0": {"loss": 1.0}}}, {"round": 2}]) == []


def test_clients_are_called_by_their_names(monkeypatch):
    called = []
    drawn = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **s: called.append(s["label"]) or drawn(self, *xy, **s))
    found = list(records(2))
    for record in found:
        record["clients"]["1"]["name"] = "Bonn"
    assert weights_picture(found)
    assert called[:2] == ["client 0", "Bonn"]
    assert [curve.name for curve in client_curves(found, "weight")] == ["client 0", "Bonn"]


def test_many_clients_are_drawn_in_part():
    found = list(records(1000))
    figure = weights_picture(found)
    drawn = [line.get_color() for axes in figure.axes for line in axes.get_lines() if line.get_linestyle() != ":"]
    assert len(drawn) / 2 == DRAWN + 1
    assert drawn.count(ORANGE) == 2  # the heaviest, in both panels
    (legend,) = figure.legends
    heaviest = max(found[-1]["clients"], key=lambda k: found[-1]["clients"][k]["weight"])
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [f"{DRAWN} of 1,000 clients", f"client {heaviest}", "equal weights"]


def test_of_many_clients_a_text_tells_the_highest_the_middle_and_the_lowest_value():
    found = list(records(13))
    three = {curve.name: curve.values for curve in client_curves(found, "weight")}
    values = [sorted(info["weight"] for info in record["clients"].values()) for record in found]
    assert three["highest"] == [curve[-1] for curve in values]
    assert three["middle"] == [float(np.median(curve)) for curve in values]
    assert three["lowest"] == [curve[0] for curve in values]
    assert [[curve.name for curve in panel.summary] for panel in weight_panels(found)] == [[*three], [*three]]


def test_long_names_have_room_in_the_legend_of_a_page():
    found = list(records(6))
    for record in found:
        for client, info in record["clients"].items():
            info["name"] = f"University Hospital {client}"
    figure = weights_picture(found, page=True)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    width = legend.get_window_extent().width
    assert width <= figure.bbox.width
