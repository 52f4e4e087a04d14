"""Parts that override nothing."""

from torch import nn

from fedkern.engine.parts.part import Part, Summary
from python_tests.stand_ins import record


def test_a_part_that_overrides_nothing_does_nothing():
    part, noted, summary = Part(), record(), Summary(nn.Identity())
    part.begin(resumed=False)
    assert part.before_round(noted) is None
    assert part.round_end(noted) is None
    part.finish(summary)
    part.restore({})
    part.close()
    assert part.state() == {}
    assert (noted.entries, summary.entries, summary.metrics) == ({}, {}, {})
