"""Displays: the content of each."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from fedkern.data import PartitionStatistics
from fedkern.data.forms import ImageForm
from fedkern.listeners import RunInfo
from fedkern.methods.base import Round
from fedkern.privacy import Guarantee
from fedkern.report.live import progress_bar
from fedkern.report.live.notebook import Notebook, choose_display
from fedkern.settings.config import RunConfig
from fedkern.tasks import CLASSIFICATION


class Data:
    validation, tests, task = SimpleNamespace(full=None), {}, CLASSIFICATION
    form = ImageForm((1, 8, 8), (0.5,), (0.5,))
    statistics = PartitionStatistics(np.full((2, 2), 7), ("cat", "dog"), "iid")


def info(rounds: int = 3, first_round: int = 0, trains: Sequence[str] = ()) -> RunInfo:
    plan = tuple(Round("distil", trains=trained) for trained in trains) or (Round(),) * rounds
    config = RunConfig.make("fedavg", clients=2, rounds=rounds, threads=1)
    sets = {"id": 5, "ood": 6, "validation": 9}
    return RunInfo(config, Path("runs/x"), first_round, (14, 14), 1234, sets, Data(), plan)


def record(round: int, rounds: int = 3, **metrics) -> dict:
    return {
        "round": round, "rounds": rounds, "seconds": 2.0 * round, "bytes_up": 1000, "bytes_down": 2000, "loss": 0.5,
        **metrics,
    }  # fmt: skip


def play(listener, rounds: int = 3) -> None:
    listener.on_notice("looking for objects [3 of 9]")
    listener.on_start(info(rounds))
    for i in range(rounds):
        listener.on_round_start(i + 1, "train", [0, 1])
        for client in (0, 1):
            listener.on_client(i + 1, client, {"loss": 0.1})
        listener.on_round(record(i + 1, rounds, id_accuracy=0.9, ood_accuracy=0.8, validation_accuracy=0.111))
    listener.on_warning("bank", "no background [at all]")
    listener.on_end({})
    listener.close()


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_lines_away_from_a_terminal():
    out = console(False)
    listener = choose_display(quiet=False, json=False, console=out)
    play(listener)
    shown = out.file.getvalue()
    assert type(listener) is progress_bar.Lines
    assert "\x1b" not in shown
    assert "fedavg on colordigits: 2 clients, 28 training, 9 validation, 5 ID test, 6 OOD test images" in shown
    assert "looking for objects [3 of 9]" in shown
    assert "round 2/3  ID 90.0 %  OOD 80.0 %  loss 0.500  up 1.00 kB down 2.00 kB  4.0 s" in shown
    assert "11.1" not in shown
    assert "warning (bank): no background [at all]" in shown
    assert len([line for line in shown.splitlines() if line.startswith("round ")]) == 3


def test_rounds_that_were_not_evaluated_give_no_line():
    out = console(False)
    listener = progress_bar.Lines(out)
    listener.on_start(info())
    listener.on_round(record(1))
    assert "round" not in out.file.getvalue()
    listener.on_round(record(2, accuracy=0.25))
    assert "accuracy 25.0 %" in out.file.getvalue()


@pytest.mark.parametrize(
    ("main", "figures", "shown"),
    [
        ("accuracy", {"held_out_accuracy": 0.5, "unseen_accuracy": 0.25},
         "held-out client 50.0 %  unseen client 25.0 %"),
        ("i2t_r1", {"i2t_r1": 0.5, "t2i_r1": 0.1}, "recall at 1, image to text 50.0 %"),
        ("macro_auroc", {"macro_auroc": 0.5}, "macro AUROC 50.0 %"),
        ("dice", {"dice": 0.5, "dice_1": 0.1}, "Dice 50.0 %"),
        ("accuracy", {"north_accuracy": 0.5, "teacher_accuracy": 0.9}, "north 50.0 %"),
        ("mae", {"mae": 1.25, "north_mae": 0.5, "accuracy": 0.25}, "mae 1.25  north 0.5"),
    ],
)  # fmt: skip
def test_figures_and_test_sets_have_names_for_people(main, figures, shown):
    assert progress_bar.main_figures(figures, main, ["north"]) == shown


def test_a_plan_of_several_parts_says_what_is_trained_when():
    out = console(False)
    listener = progress_bar.Lines(out)
    listener.on_start(info(4, trains=["generator", "generator", "generator and student", "generator and student"]))
    listener.on_round(record(2, 4))
    shown = out.file.getvalue()
    assert "trained: generator (rounds 1 to 2), generator and student (rounds 3 to 4)" in shown
    assert "round 2/4 (generator)  loss 0.500" in shown
    live = progress_bar.Live(console(True))
    live.on_start(info(2, trains=["networks", "classifier"]))
    live.on_round_start(2, "distil", [0, 1])
    assert live.progress.tasks[0].description == "round 2/2 (classifier)"
    live.close()


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_of_the_bar_is_cut_off(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    live = progress_bar.Live(console)
    live.on_start(info(32, trains=["generator"] * 16 + ["generator and student"] * 16))
    for number in range(1, 19):
        live.on_round_start(number, "distil", [0, 1])
        live.on_round(record(number, 32, accuracy=0.314))
    with console.capture() as capture:
        console.print(live.progress.get_renderable())
    shown = capture.get()
    live.close()
    assert "round 18/32 (generator and student)" in shown
    assert "accuracy 31.4 %" in shown
    assert ("up 1.00 kB down 2.00 kB" in shown) == (width == 100)
    assert "s left\n" in shown


def test_a_plan_of_equal_rounds_says_nothing_of_them():
    assert progress_bar.schedule(progress_bar.training_words(info(2, trains=["student", "student"]))) == []
    assert progress_bar.training_words(info(3)) == ["", "", ""]
    assert progress_bar.schedule([str(number) for number in range(progress_bar.STAGES + 1)]) == []


def test_the_time_left_is_that_of_rounds_that_train_the_same(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: time[0])
    clock = progress_bar.Clock(["generator"] * 3 + ["student"] * 3)

    def play(done: int, seconds: float) -> float | None:
        clock.begin()
        time[0] += seconds
        return clock.remaining(done)

    time[0] += 100.0  # set-up rounds
    assert play(1, 2.0) is None
    assert play(2, 4.0) == 3.0 * 4
    assert play(3, 3.0) == 3.0 * 3
    assert play(4, 7.0) == 7.0 * 2
    assert play(5, 5.0) == 6.0
    assert play(6, 5.0) == 0.0


def test_the_first_round_of_a_plan_of_equal_rounds_tells_the_time_left(monkeypatch):
    times = iter([0.0, 100.0, 102.0])
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(times))
    clock = progress_bar.Clock([""] * 10)
    clock.begin()
    assert clock.remaining(1) == 18.0


def test_the_headline_says_what_an_epsilon_does_not_cover():
    said = Guarantee(1e-5, {"noise": "the noise"}, {"labels": "the labels"})
    text = "\n".join(progress_bar.run_headline(dataclasses.replace(info(), guarantee=said)))
    assert "NO epsilon of the whole release: a partial epsilon covers noise alone, not labels" in text
    sentences = "\n".join(
        progress_bar.run_headline(dataclasses.replace(info(), guarantee=Guarantee(1e-5, {"noise": "it"})))
    )
    assert "epsilon covers everything that clients release: noise" in sentences
    assert "epsilon" not in "\n".join(progress_bar.run_headline(info()))


def test_class_counts_are_shown_but_with_private_records():
    for private in (False, True):
        out = console(False)
        progress_bar.Lines(out).on_start(dataclasses.replace(info(), private=private))
        shown = out.file.getvalue()
        assert ("dog" in shown) != private
        assert (progress_bar.UNSHOWN in shown) == private


@pytest.mark.parametrize("json", [False, True])
def test_a_bar_on_a_terminal(json):
    out = console(True)
    listener = choose_display(quiet=False, json=json, console=out)
    assert type(listener) is progress_bar.Live
    play(listener)
    assert listener.progress.tasks[0].completed == 3
    assert listener.progress.tasks[0].fields["figures"] == "ID 90.0 %  OOD 80.0 %"


@pytest.mark.parametrize(("json", "kind"), [(False, Notebook), (True, progress_bar.Warnings)])
def test_a_notebook_has_a_display_of_its_own(json, kind):
    out = Console(file=io.StringIO(), force_jupyter=True)
    assert not out.is_terminal
    assert type(choose_display(quiet=False, json=json, console=out)) is kind


def test_the_bar_moves_with_every_client_and_never_past_the_round():
    listener = progress_bar.Live(console(True))
    listener.on_start(info(first_round=1))
    assert listener.progress.tasks[0].completed == 1
    listener.on_round_start(-1, "backgrounds", [0, 1])
    listener.on_client(-1, 0, {})
    assert listener.progress.tasks[0].completed == 1
    listener.on_round_start(2, "train", [0, 1])
    listener.on_client(2, 0, {})
    assert listener.progress.tasks[0].completed == 1.5
    for _ in range(5):
        listener.on_client(2, 1, {})
    assert listener.progress.tasks[0].completed == 2
    listener.close()


@pytest.mark.parametrize(("quiet", "json"), [(True, False), (True, True), (False, True)])
def test_only_warnings_are_left(quiet, json):
    out = console(False)
    listener = choose_display(quiet=quiet, json=json, console=out)
    play(listener)
    assert out.file.getvalue() == "warning (bank): no background [at all]\n"


def test_depth_colour_and_size_of_images_that_are_no_files_are_told():
    assert "images: 8-bit grey, 8 x 8" in progress_bar.run_headline(info())


def test_a_resumed_run_says_so():
    assert progress_bar.run_headline(info(first_round=2))[-1] == "resumed after round 2 of 3"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_task_has_a_bar_on_a_terminal(is_terminal, monkeypatch):
    out = console(is_terminal)
    monkeypatch.setattr(progress_bar, "make_console", lambda stderr: out)
    with progress_bar.show_progress(3, "predicting") as step:
        for _ in range(3):
            step()
    assert ("3/3" in out.file.getvalue()) is is_terminal
    assert is_terminal or out.file.getvalue() == ""


def test_sets_with_the_titles_of_others_are_told_apart():
    figures = {"accuracy": 0.1, "accuracy_accuracy": 0.2, "id_accuracy": 0.3, "ID_accuracy": 0.4}
    shown = progress_bar.figures_by_set(figures, "accuracy", ["", "accuracy", "id", "ID"])
    assert list(shown.values()) == ["10.0 %", "20.0 %", "30.0 %", "40.0 %"]
