"""Tests of means, deviations, paired intervals and targets."""

import math

import pytest
from scipy.stats import ttest_rel

from fedkern.comparison.seed_statistics import Target, compare_pairs, mean_std
from fedkern.errors import UserError


def test_the_interval_is_that_of_the_paired_t_test():
    own = {0: 0.81, 1: 0.84, 2: 0.79, 5: 0.9}
    baseline = {0: 0.78, 1: 0.8, 2: 0.8, 7: 0.1}
    found = compare_pairs(own, baseline)
    expected = ttest_rel([own[s] for s in (0, 1, 2)], [baseline[s] for s in (0, 1, 2)]).confidence_interval(0.95)
    assert math.isclose(found.low, expected.low)
    assert math.isclose(found.high, expected.high)
    assert math.isclose(found.mean, 0.02)


def test_one_pair_has_no_interval_and_none_no_difference():
    found = compare_pairs({3: 0.5}, {3: 0.4, 4: 0.1})
    assert math.isclose(found.mean, 0.1)
    assert (found.low, found.high) == (None, None)
    assert compare_pairs({0: 0.5}, {1: 0.5}) is None


def test_equal_differences_have_an_interval_without_width():
    found = compare_pairs({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5})
    assert found.low == found.mean == found.high == 0.25


def test_spread():
    assert mean_std([1.0]) == (1.0, None)
    assert mean_std([1.0, 3.0]) == (2.0, math.sqrt(2))


def records(name, *values):
    return [
        {"round": i, name: value, "bytes_up": 10 * i, "bytes_down": i, "seconds": 0.5 * i}
        for i, value in enumerate(values, 1)
    ]


def test_a_target_is_reached_in_the_first_round_that_has_it():
    target = Target.read("accuracy=0.8")
    found = target.cost_of_target(records("accuracy", 0.5, None, 0.8, 0.7))
    assert found == {"rounds": 3, "bytes": 33, "seconds": 1.5}
    assert target.cost_of_target(records("accuracy", 0.5)) is None
    assert str(target) == "accuracy >= 0.8"


@pytest.mark.parametrize(
    ("text", "rounds"),
    [("ood_loss=0.5", 2), ("mean_client_mae=0.5", 2), ("top<=0.5", 2), ("top>=0.5", 1), ("ece >= 0.5", 1)],
)
def test_a_target_is_to_fall_where_figure_or_sign_say_so(text, rounds):
    target = Target.read(text)
    assert target.cost_of_target(records(target.figure, 0.9, 0.4))["rounds"] == rounds
    assert str(target) == f"{target.figure} {'<=' if rounds == 2 else '>='} 0.5"


def test_a_target_whose_direction_nobody_knows_is_refused():
    for unknown in (Target.read("my_loss=2"), Target.read("accuracy=0.5").with_direction(["max", None])):
        with pytest.raises(UserError, match=f"whether a low .{unknown.figure}. is a good one"):
            unknown.check_direction()


@pytest.mark.parametrize(
    ("values", "rounds"),
    [
        ((0.2, 0.6, 1.0), 2.5),
        ((0.9, 1.0), 1.0),
        ((0.2, 0.6, 0.1, 1.0), 3.5),  # the curve of the best values does not fall
        ((0.2, None, 0.6, None, 1.0), 4.0),  # between evaluated rounds
        ((math.nan, 0.6, 1.0), 2.5),
        ((0.2, 0.8), 2.0),
        ((0.2, 0.7), None),
        ((), None),
    ],
)
def test_a_target_is_crossed_on_the_curve_of_the_best_values(values, rounds):
    target = Target.read("accuracy=0.8")
    crossing = target.crossing(records("accuracy", *values))
    assert crossing == pytest.approx(rounds) if rounds is not None else crossing is None
    mirrored = [None if value is None else -value for value in values]
    assert Target("loss", -0.8, falls=True).crossing(records("loss", *mirrored)) == crossing


@pytest.mark.parametrize("text", ["accuracy=80", "id_balanced_accuracy=1.01", "mean_client_dice=95", "ood_ece=-0.1"])
def test_a_target_that_no_fraction_reaches_is_refused(text):
    with pytest.raises(UserError, match=r"^--target: .* is a fraction from 0 to 1, which never reaches .*: give a"):
        Target.read(text)


@pytest.mark.parametrize("text", ["top2=80", "loss=80", "id_hd95=-3", "accuracy=1", "accuracy=0", "top5_accuracy=90"])
def test_a_target_of_another_figure_may_be_per_cent(text):
    assert Target.read(text).value == float(text.split("=")[1])


@pytest.mark.parametrize("text", ["accuracy", "=0.5", "accuracy=", "accuracy=nan", "accuracy=high"])
def test_a_wrong_target_is_refused(text):
    with pytest.raises(UserError, match="FIGURE=VALUE"):
        Target.read(text)
