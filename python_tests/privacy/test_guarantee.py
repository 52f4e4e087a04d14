"""The sentence about a run's epsilon."""

from __future__ import annotations

from fedkern.privacy import Guarantee


def test_a_finite_figure_is_said_to_rest_on_its_conditions():
    said = Guarantee(1e-5, ("the noise",), ("the labels",))
    assert said.statement(8.0) == (
        "Epsilon 8 at delta 1e-05, the largest of any client when one of its images is replaced, is of what the "
        "server receives, model.safetensors, the records and the pictures while the run's seed stays secret; it covers "
        "the noise, but not the labels."
    )
    assert "seed" not in said.statement(float("inf"))
    several = Guarantee(1e-5, ("the noise",), conditions=("this is so", "that is so"))
    assert " while this is so and that is so; it covers the noise." in several.statement(1.0)
