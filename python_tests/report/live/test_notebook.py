"""Output in a notebook: a run's display, results as HTML, and pictures."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import fedkern
from fedkern.listeners import RunInfo
from fedkern.listeners.events import Listener
from fedkern.methods.base import Round
from fedkern.report.live import notebook, progress_bar
from fedkern.report.live.notebook import choose_display
from fedkern.settings.config import RunConfig
from fedkern.text_table import Table
from python_tests.html_reader import Reader


@pytest.fixture
def cells(monkeypatch):
    """Return the outputs of a cell, collected by a stand-in for IPython.display."""
    shown: list[dict] = []

    def display(content, display_id=False):
        at = len(shown)
        shown.append(content)
        return SimpleNamespace(update=lambda new: shown.__setitem__(at, new))

    module = ModuleType("IPython.display")
    module.display, module.HTML, module.Image = display, lambda text: text, lambda **given: given
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(notebook, "PAUSE", 0.0)
    return shown


def console() -> Console:
    return Console(file=io.StringIO(), force_jupyter=True, width=120)


def start(trains: Sequence[str] = ("", "", ""), **given) -> Listener:
    listener = choose_display(quiet=False, json=False, console=console())
    config = RunConfig.make("fedavg", clients=2, rounds=len(trains), threads=1)
    plan = tuple(Round(trains=trained) for trained in trains)
    listener.on_start(RunInfo(config, Path("runs/<x>"), 0, (14, 14), 1234, {"": 5}, None, plan, **given))
    return listener


def record(round: int, **figures) -> dict:
    sent = {"bytes_up": 1000 * round, "bytes_down": 2000 * round}
    return {"round": round, "rounds": 3, "seconds": 2.0 * round, **sent, "loss": 0.5, "clients": {"0": {}}, **figures}


def cells_of(html: str) -> list[list[str]]:
    """Return the table in an HTML text, row by row."""
    found = Reader(html)
    assert not found.unclosed
    width = max(len(found.text("th")), 1)
    body = found.text("td")
    return [found.text("th"), *(body[i : i + width] for i in range(0, len(body), width))]


def test_the_table_of_the_rounds_stays_and_the_bar_does_not(cells):
    listener = start()
    assert type(listener) is notebook.Notebook
    for number in (1, 2, 3):
        listener.on_round_start(number, "train", [0, 1])
        listener.on_client(number, 0, {})
        (bar,) = [given for tag, given, _ in Reader(cells[0]).elements if tag == "progress"]
        assert bar == {"max": "3", "value": f"{number - 0.5:.2f}"}
        for _ in range(3):
            listener.on_client(number, 1, {})
        assert f'value="{number}.00"' in cells[0]
        listener.on_round(record(number, accuracy=0.3 * number))
    listener.on_warning("drift", "client 1 <b>drifts</b>")
    assert "round 3/3" in cells[0]
    listener.on_end({})
    listener.close()
    (left,) = cells
    assert "<progress" not in left
    assert "round 3/3" not in left
    assert "<b>" not in left
    shown = Reader(left)
    assert shown.text("strong") == ["fedavg on colordigits: 2 clients, 28 training, 5 test images"]
    assert "run folder runs/<x>" in shown.text("p")[0]
    assert "warning (drift): client 1 <b>drifts</b>" in shown.text("p")[1]
    assert cells_of(left) == [
        ["round", "accuracy", "loss", "up", "down", "time"],
        ["1", "30.0 %", "0.500", "1.00 kB", "2.00 kB", "2.0 s"],
        ["2", "60.0 %", "0.500", "2.00 kB", "4.00 kB", "4.0 s"],
        ["3", "90.0 %", "0.500", "3.00 kB", "6.00 kB", "6.0 s"],
    ]


def test_a_run_that_stops_says_where(cells):
    listener = start()
    listener.on_round(record(1, accuracy=0.3))
    listener.close()
    listener.close()
    assert Reader(cells[0]).text("p")[1] == "stopped after round 1 of 3"
    assert "<progress" not in cells[0]


def test_a_run_that_was_finished_before_shows_nothing(cells):
    listener = choose_display(quiet=False, json=False, console=console())
    listener.on_end({})
    listener.close()
    assert not cells


def test_private_records_have_no_loss_and_say_so(cells):
    listener = start(private=True)
    listener.on_round({name: value for name, value in record(1, accuracy=0.3).items() if name != "loss"})
    assert cells_of(cells[0])[0] == ["round", "accuracy", "up", "down", "time"]
    assert progress_bar.UNSHOWN in Reader(cells[0]).text("p")


@pytest.mark.parametrize("count", [notebook.ROUNDS, notebook.ROUNDS + 1, 1000])
def test_of_many_rounds_evaluated_ones_are_listed_and_the_last(count):
    records = [record(i, **({"accuracy": 0.5} if i % 4 == 0 else {})) for i in range(1, count + 1)]
    header, *rows = cells_of(notebook.rounds_table(records, "rounds", "accuracy"))
    assert header[1] == "accuracy"
    assert 1 < len(rows) <= notebook.ROUNDS
    assert rows[-1][0] == str(count)
    assert all(row[1] for row in rows[:-1]) == (count > notebook.ROUNDS)


def test_names_are_texts_and_a_number_keeps_its_unit():
    html = Table(["a&b", "time"], [["<td>\x1b", "2.0 s"]], "<i>x</i>\nfolder", notes=["note"]).html()
    assert cells_of(html) == [["a&b", "time"], [r"<td>\x1b", "2.0 s"]]
    assert "2.0\u00a0s" in html  # which no narrow screen parts
    assert Reader(html).text("p") == ["<i>x</i>folder", "note"]
    assert "color" not in html


def test_pictures_are_shown_and_are_a_list_of_paths(cells, tmp_path, capsys):
    paths = [tmp_path / name for name in ("accuracy.png", "gone.png", "partition.png")]
    pictures = notebook.Pictures(paths)
    for path in paths[::2]:
        path.touch()
    pictures._ipython_display_()
    assert [(cell["filename"], cell["alt"]) for cell in cells] == [(str(path), path.stem) for path in paths[::2]]
    assert capsys.readouterr().out == f"{paths[1]} is missing: draw the pictures again.\n"
    assert pictures == paths


def test_results_as_html(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 2
    sites = {"north": (images[:20], labels[:20]), "south & west": (images[20:], labels[20:])}
    data = fedkern.FederatedData.from_arrays(sites, (images[:10], labels[:10]), classes=["ill", "<healthy>"])
    assert repr(data) == "<fedkern.FederatedData arrays: 2 clients, 30 training, 10 test images of 1×8×8>"
    rows = cells_of(data._repr_html_())
    assert rows[0] == ["client", "name", "samples", "skew", "ill", "<healthy>"]
    assert rows[2] == ["1", "south & west", "10", "0.00", "5", "5"]

    settings = {"data": data, "model": "mlp", "threads": 1, "workers": 1, "grad_cam": 0, "progress": False}
    run = fedkern.simulate("fedavg", rounds=2, out="run", pictures=False, **settings)
    assert repr(run.history) == "<fedkern.History, rounds: 2>"
    assert [row[0] for row in cells_of(run.history._repr_html_())] == ["round", "1", "2"]
    shown = Reader(run._repr_html_())
    assert shown.text("strong") == ["fedavg on arrays, seed 0, 2 rounds"]
    assert ["accuracy", f"{100 * run.metrics['accuracy']:.1f} %"] in cells_of(run._repr_html_())
    assert shown.text("p")[-1].endswith("run folder run")
    monkeypatch.setattr("fedkern.api.read_summary", lambda out: None)
    assert run._repr_html_() == run.history._repr_html_()  # of a run that is not finished


def test_the_line_says_what_a_round_trains_and_columns_name_test_sets(cells):
    listener = start(("generator", "student"))
    listener.on_round_start(1, "distil", [0])
    assert Reader(cells[0]).text("p")[-1] == "round 1/2 (generator)"
    records = [record(1, north_accuracy=0.5, ood_accuracy=0.25)]
    assert cells_of(notebook.rounds_table(records, "", "accuracy", tests=["north"]))[0][:3] == ["round", "north", "OOD"]
