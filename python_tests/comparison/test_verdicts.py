"""Tests of verdicts on reproduced numbers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedkern.comparison.published import PublishedCell
from fedkern.comparison.verdicts import Outcome, figure_of, judge_cell

CELL = PublishedCell("a", figure="accuracy", published=0.9, tolerance=0.02)
ROUNDS = PublishedCell("a", figure="rounds", published=87, tolerance=20, target="accuracy=0.97")
SMALLER = replace(CELL, smaller="3 rounds", baseline="b", tolerance=None)
HALF = 4.302652729749464 / math.sqrt(3)
"""Half width of the interval of three seeds, in standard deviations."""


def around(mean, deviation):
    return Outcome({0: mean - deviation, 1: mean, 2: mean + deviation})


@pytest.mark.parametrize(
    ("mean", "deviation", "verdict"),
    [
        (0.905, 0.005, "reproduced"),
        (0.90 - HALF * 0.004 * 0.99, 0.004, "reproduced"),
        (0.90 - HALF * 0.004 * 1.01, 0.004, "differs: by -1.0 points"),
        (0.95, 0.001, "differs: by +5.0 points"),
        (0.905, 0.0081, "undecided: ± 2.0 % is wider than ± 2.0 %"),
        (0.905, 0.0079, "reproduced"),
    ],
)
def test_a_value_at_the_published_scale(mean, deviation, verdict):
    judged = judge_cell(CELL, around(mean, deviation))
    assert str(judged) == verdict
    assert math.isclose(judged.ours.high - judged.ours.mean, HALF * deviation)
    assert judged.gap is None


def test_the_best_evaluated_round_is_a_figure():
    run = SimpleNamespace(metrics={"accuracy": 0.7}, direction=lambda figure: "max")
    run.records = [{"accuracy": value} for value in (0.5, 0.8, 0.7)]
    assert [figure_of(replace(CELL, figure=name), run) for name in ("accuracy", "best_accuracy")] == [0.7, 0.8]


def test_one_seed_decides_nothing():
    assert str(judge_cell(CELL, Outcome({0: 0.9}))) == "undecided: one seed has no interval"
    assert judge_cell(SMALLER, Outcome({0: 0.9}), Outcome({0: 0.1}), 0.5).kind == "undecided"


def test_nothing_published_has_no_verdict():
    assert judge_cell(replace(CELL, published=None), around(0.5, 0.1)).kind == "nothing published"


@pytest.mark.parametrize(
    ("gain", "published", "verdict"),
    [
        (0.05, 0.85, "smaller scale: same ordering"),
        (-0.05, 0.85, "smaller scale: reversed"),
        (-0.05, 0.95, "smaller scale: same ordering"),
        (0.05, 0.95, "smaller scale: reversed"),
        (0.01, 0.85, "undecided: the interval of the difference holds 0"),
        (0.05, None, "undecided: the paper reports no value of the baseline"),
    ],
)
def test_the_ordering_at_a_smaller_scale(gain, published, verdict):
    """Pairing by seed decides: the figures differ far more between seeds than between cells."""
    baseline = {0: 0.4, 1: 0.6, 2: 0.8}
    values = {0: 0.4 + gain, 1: 0.61 + gain, 2: 0.79 + gain}
    judged = judge_cell(SMALLER, Outcome(values), Outcome(baseline), published)
    assert str(judged) == verdict
    assert math.isclose(judged.gap.mean, gain)
    assert judged.published_gap == (None if published is None else 0.9 - published)


def test_the_ordering_of_a_baseline_that_is_not_played():
    assert str(judge_cell(SMALLER, around(0.9, 0.1), None, 0.8)) == "undecided: its baseline is not played"
    assert judge_cell(replace(SMALLER, baseline=""), around(0.9, 0.1)).kind == "smaller scale: baseline"


def test_seeds_that_miss_the_target():
    played = {0: 200.0, 1: 200.0, 2: 200.0}
    outcome = Outcome({0: 100.0, 1: None, 2: 120.0}, played)
    judged = judge_cell(ROUNDS, outcome)
    assert str(judged) == "undecided: 1 of 3 seeds miss accuracy >= 0.97 in 200 rounds"
    assert judged.ours is None
    judged = judge_cell(ROUNDS, replace(outcome, values={0: 110.0, 1: None, 2: None}))
    assert str(judged) == "differs: by more than +23; 2 of 3 seeds miss accuracy >= 0.97 in 200 rounds"
    cut_short = Outcome(dict.fromkeys(range(3)), dict.fromkeys(range(3), 80.0))
    assert judge_cell(ROUNDS, cut_short).kind == "undecided"
