"""Client-level differential privacy: the mechanism's numbers, and its epsilon against dp-accounting called directly."""

import math
import re
from pathlib import Path

import pytest
import torch

from fedkern.privacy import Accountant, ClientGuarantee, ClientLevel
from fedkern.privacy.client_level import keep_variances
from fedkern.report.tables import describe_epsilon

DELTA = 1e-5


def test_factor_and_deviation():
    level = ClientLevel(2.0, 3.0, DELTA)
    assert [level.factor(norm) for norm in (0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 1.0, 0.25]
    assert level.deviation(12) == 0.5


def test_variances_keep_a_tenth():
    new, old = torch.tensor([-1.0, 0.05, 0.5, 3.0]).double(), torch.tensor([1.0, 1.0, 1.0, 1.0])
    keep_variances(new, old)
    assert new.tolist() == pytest.approx([0.1, 0.1, 0.5, 3.0])


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 30), (20.0, 1000)])
def test_without_a_draw_epsilon_is_that_of_one_gaussian_mechanism_of_sensitivity_2_clip(noise, rounds):
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    found = ClientLevel(0.7, noise, DELTA).epsilon(rounds)
    assert found == pytest.approx(dp.get_epsilon_gaussian(noise / 2 / math.sqrt(rounds), DELTA), rel=1e-9)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("noise", "rounds", "drawn", "of"), [(2.0, 100, 100, 10_000), (3.0, 1000, 7, 300)])
def test_with_a_draw_epsilon_is_that_of_the_sampled_gaussian_mechanism(noise, rounds, drawn, of):
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    import dp_accounting.rdp

    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.SampledWithoutReplacementDpEvent(of, drawn, dp.GaussianDpEvent(noise / 2))
    accountant.compose(event, rounds)
    level = ClientLevel(1.0, noise, DELTA)
    assert level.epsilon(rounds, drawn=drawn, of=of) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    assert level.epsilon(rounds, drawn=drawn, of=of) < level.epsilon(rounds) / 2


def test_a_draw_never_costs_more_than_none():
    """The bound of sampling is loose for large shares, where the mechanism without sampling has the better bound."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    level = ClientLevel(1.0, 1.0, DELTA)
    assert level.epsilon(3, drawn=9, of=10) == level.epsilon(3)
    accountant = Accountant()
    accountant.gaussian("g", 0.5, shards=10, drawn=9, steps=3)
    assert accountant.epsilon(DELTA) > level.epsilon(3)


@pytest.mark.parametrize("draw", [{}, {"drawn": 3, "of": 100}])
def test_epsilon_is_monotone(draw):
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    level = ClientLevel(1.0, 3.0, DELTA)
    epsilons = [level.epsilon(rounds, **draw) for rounds in (0, 1, 2, 10, 100)]
    assert epsilons == sorted(set(epsilons))
    assert epsilons[0] == 0
    assert ClientLevel(1.0, 6.0, DELTA).epsilon(10, **draw) < epsilons[3]
    assert ClientLevel(9.0, 3.0, DELTA).epsilon(10, **draw) == epsilons[3]  # the noise grows with the clipping norm
    assert ClientLevel(1.0, 3.0, DELTA / 10).epsilon(10, **draw) > epsilons[3]
    assert ClientLevel(1.0, 0.0, DELTA).epsilon(10, **draw) == math.inf


def test_numbers_of_a_draw_are_checked():
    with pytest.raises(ValueError, match="drawn <= shards"):
        Accountant().gaussian("g", 1.0, shards=3, drawn=4)


def test_what_the_guarantee_says():
    said = ClientGuarantee(DELTA, {"networks": "the networks"}, conditions=("this is so",), planned=3.0, rounds=20)
    assert said.statement(2.0) == (
        "Epsilon 2 at delta 1e-05, when the whole data set of one client is replaced, is of what the server sends "
        "and the run folder without checkpoints/ while this is so; it covers the networks."
    )
    assert describe_epsilon(said.to_dict()) == (
        "epsilon 3 at delta 1e-05 after 20 rounds covers everything that the server releases: networks"
    )
    part = said.with_records()
    assert part.to_dict()["leaves_uncovered"] == ["records"]
    assert describe_epsilon(part.to_dict()) == (
        "NO epsilon of the whole release: a partial epsilon 3 at delta 1e-05 after 20 rounds covers networks alone, "
        "not records"
    )
    assert str(said.unit.change) == "the whole data set of one is replaced"


def test_the_figures_of_the_page():
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[privacy]')")
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    table = re.search(r"<!-- client-level epsilon -->(.*?)<!-- end -->", page, re.DOTALL)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", table[1], re.MULTILINE)
    assert len(rows) == 5
    for clients, drawn, rounds, noise, epsilon in rows:
        found = ClientLevel(1.0, float(noise), DELTA).epsilon(int(rounds), drawn=int(drawn), of=int(clients))
        assert f"{found:.3g}" == epsilon
