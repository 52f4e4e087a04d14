"""The sentence about a run's epsilon."""

import math

import pytest

from fedkern.privacy import Guarantee
from fedkern.report.tables import describe_epsilon


def test_a_finite_figure_is_said_to_rest_on_its_conditions():
    said = Guarantee(1e-5, {"noise": "the noise"}, follows="the model")
    assert said.statement(8.0) == (
        "Epsilon 8 at delta 1e-05, the largest of any client when one of its images is replaced, is of what the "
        "server receives and the run folder without checkpoints/ while the run's seed stays secret; it covers "
        "the noise and so the model."
    )
    assert "seed" not in said.statement(math.inf)
    several = Guarantee(1e-5, {"noise": "the noise"}, conditions=("this is so", "that is so"))
    assert " while this is so and that is so; it covers the noise." in several.statement(1.0)


def test_a_part_has_another_name_and_is_called_a_part():
    said = Guarantee(1e-5, {"noise": "the noise"}, {"labels": "the labels"}, follows="the model")
    assert said.figure == "epsilon_covered"
    assert said.statement(8.0) == (
        "Epsilon 8 at delta 1e-05, the largest of any client when one of its images is replaced, is of a part of what "
        "the clients release while the run's seed stays secret; it covers the noise, but not the labels: the whole "
        "release has no epsilon."
    )
    assert Guarantee(1e-5, {"noise": "the noise"}).figure == "epsilon"
    assert Guarantee(1e-5, {"noise": "the noise"}).with_records().figure == "epsilon_covered"


@pytest.mark.parametrize("known", [False, True])
def test_the_headline_never_shows_a_part_as_the_whole(known):
    full, part = {"covers": ["a", "b"], "leaves_uncovered": []}, {"covers": ["a"], "leaves_uncovered": ["b", "c"]}
    at = {"delta": 1e-5, "epsilon": 8.0} if known else {}
    value = " 8 at delta 1e-05" if known else ""
    assert describe_epsilon({**full, **at}) == f"epsilon{value} covers everything that clients release: a, b"
    at = {"delta": 1e-5, "epsilon_covered": 8.0} if known else {}
    assert describe_epsilon({**part, **at}) == (
        f"NO epsilon of the whole release: a partial epsilon{value} covers a alone, not b, c"
    )
    for nothing in (None, math.inf):
        assert (
            describe_epsilon({**full, "delta": 1e-5, "epsilon": nothing}) == "no finite epsilon: a release had no noise"
        )
