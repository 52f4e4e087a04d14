"""The part that writes answers to test images."""

import csv

import pytest

from fedkern.engine.figures.final_figures import final_figures
from fedkern.engine.parts.answers import Answers
from fedkern.engine.parts.part import Summary
from fedkern.engine.store import confusions
from fedkern.privacy.disclosure import Disclosure
from python_tests.engine.parts.judged import SETTINGS, Judged, Says, brightness_set
from python_tests.stand_ins import Context, run_objects


def write_answers(out, *, keep=True, check_lock=lambda: None, counts=True, rows=True):
    """Write the answers to a test set of two images."""
    sets, network = {"id_": brightness_set([0.1, 0.9], [1, 1])}, Says(0.5)
    if keep:
        with sets["id_"].keeping():
            Judged().evaluate(network, sets["id_"])
    context = Context(disclosure=Disclosure(clients=counts), **SETTINGS)
    summary = Summary(network, final=final_figures(sets, ("cat", "dog")))
    run = run_objects(context, out=out, request={"predictions": rows}, sets=sets, check_lock=check_lock)
    Answers(run).finish(summary)
    return context.notices.warnings


def test_answers_are_written_as_counts_and_image_by_image(tmp_path):
    assert write_answers(tmp_path) == {}
    assert confusions.read(tmp_path).matrices["id"].tolist() == [[0, 0], [1, 1]]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test_set"], row["true_class"], row["predicted_class"]) for row in rows] == [
        ("id", "dog", "cat"), ("id", "dog", "dog"),
    ]  # fmt: skip


def test_answers_that_are_not_asked_for_may_not_be_told_or_are_not_there(tmp_path):
    assert write_answers(tmp_path, counts=False, rows=False) == {}
    assert [*write_answers(tmp_path, keep=False)] == ["no-predictions"]
    assert [*tmp_path.iterdir()] == []


def test_answers_are_not_written_to_a_folder_that_was_taken_over(tmp_path):
    def fail_as_taken():
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        write_answers(tmp_path, check_lock=fail_as_taken)
    assert [*tmp_path.iterdir()] == []
