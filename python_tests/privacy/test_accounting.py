"""Epsilon of a client's releases and of clients: closed forms, known figures, monotone, composed, resumed."""

import dataclasses
import json
import math
import re
from pathlib import Path

import dp_accounting as dp
import pytest
import torch

from fedkern.errors import UserError
from fedkern.privacy import Accountant, ClientGuarantee, ClientLevel, bounds, least_noise
from fedkern.privacy.accounting import keep_variances
from fedkern.privacy.bounds import DP_SGD, GAUSSIAN, Entry, added_or_removed, bound_replaced
from fedkern.report.tables import describe_epsilon

DELTA = 1e-5


def discriminator(sigma, shards, *, rows=64, steps=10_000):
    """Return a ledger of steps that release ``rows`` rows.

    Each row is clipped to C and noised with sigma C: sensitivity 2 C sqrt(rows).
    """
    accountant = Accountant()
    accountant.gaussian("discriminator", sigma / (2 * math.sqrt(rows)), shards=shards, steps=steps)
    return accountant


@pytest.mark.parametrize(("sigma", "shards", "expected"), [(40, 50, 8.7), (10, 1000, 3.7)])
def test_the_figures_of_the_method_notes(sigma, shards, expected):
    assert discriminator(sigma, shards).epsilon(DELTA) == pytest.approx(expected, abs=0.05)


def test_without_shards_the_noise_must_be_about_850():
    sigma = least_noise(lambda noise: discriminator(noise, 1), 9.3, DELTA)
    assert sigma == pytest.approx(850, rel=0.02)
    assert exact(16 * 100 / sigma) == pytest.approx(9.3, rel=2e-3)
    # The public GS-WGAN setting does not satisfy this accounting.
    assert discriminator(1.07, 1000).epsilon(DELTA) > 100


def exact(mu):
    """Bisect the epsilon of the Gaussian mechanism of sensitivity mu (Balle and Wang, ICML 2018, theorem 8)."""

    def curve(epsilon):
        below = 0.5 * math.erfc((epsilon / mu - mu / 2) / math.sqrt(2))
        return below - math.exp(epsilon) * 0.5 * math.erfc((epsilon / mu + mu / 2) / math.sqrt(2))

    low, high = 0.0, 100.0
    while high - low > 1e-11:
        middle = (low + high) / 2
        low, high = (middle, high) if curve(middle) > DELTA else (low, middle)
    return high


@pytest.mark.parametrize(("z", "steps"), [(30.0, 100), (1.0, 1), (0.7, 3), (1000.0, 10)])
def test_an_unsampled_gaussian_has_its_closed_form(z, steps):
    accountant = Accountant()
    accountant.gaussian("g", z, steps=steps)
    found = accountant.epsilon(DELTA)
    assert found == pytest.approx(exact(math.sqrt(steps) / z), rel=1e-7)
    assert found < bounds._rdp((Entry(GAUSSIAN, z, 1.0, steps),), "REPLACE_ONE", DELTA)


@pytest.mark.parametrize(("z", "steps"), [(2.0, 4), (5.0, 100)])
def test_losses_have_the_closed_form_where_every_record_is_in_every_batch(z, steps):
    """A replaced record moves the sum by 2, an added record by 1.

    The bound holds without other releases and with them.
    """
    sampled = (Entry(DP_SGD, z, 1.0, steps),)
    mu = 2 * math.sqrt(steps) / z
    assert exact(mu) <= bounds._losses((), sampled, DELTA) <= exact(mu) * 1.001
    bound = bounds._losses((Entry(GAUSSIAN, 3.0, 1.0, 2),), sampled, DELTA)
    mu = math.sqrt(mu**2 + 2 / 9)
    assert exact(mu) <= bound <= exact(mu) * 1.001


SAMPLED = [(1.0, 0.05, 400), (2.0, 0.01, 10_000), (0.8, 0.3, 30), (50.0, 0.2, 100)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("z", "rate", "steps"), SAMPLED)
def test_losses_are_tighter_than_renyi_and_no_tighter_than_one_record_added(z, rate, steps):
    import dp_accounting
    import dp_accounting.pld

    sampled = (Entry(DP_SGD, z, rate, steps),)
    found = bounds._losses((), sampled, DELTA)
    library = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    library.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z)), steps)
    assert library.get_epsilon(DELTA) < found < bounds._hop(sampled, DELTA)
    assert bound_replaced(sampled, DELTA) == found


def test_losses_bound_what_one_step_can_tell():
    """The exact value for one step with Poisson sampling is the hockey-stick divergence of the two mixtures."""
    z, q, e = 1.0, 0.3, 1.0
    normal = lambda x, m: math.exp(-((x - m) ** 2) / (2 * z**2)) / (z * math.sqrt(2 * math.pi))  # noqa: E731
    grid = [i / 2000 for i in range(-24_000, 24_000)]
    absent = [q * normal(x, -1) + (1 - q) * normal(x, 0) for x in grid]
    present = [q * normal(x, 1) + (1 - q) * normal(x, 0) for x in grid]
    delta = sum(max(a - math.exp(e) * b, 0.0) for a, b in zip(absent, present, strict=True)) / 2000
    assert bounds._losses((), (Entry(DP_SGD, z, q, 1),), delta) == pytest.approx(e, rel=2e-3)


def test_an_accountant_that_refuses_leaves_the_figure_to_renyi(monkeypatch):
    import dp_accounting.pld

    sampled = (Entry(DP_SGD, 1.0, 0.05, 401),)
    monkeypatch.setattr(dp_accounting.pld.PLDAccountant, "supports", lambda self, event: False)
    assert bound_replaced(sampled, DELTA) == bounds._hop(sampled, DELTA)
    bounds._distribution.cache_clear()


def test_parts_of_several_accountants_share_delta():
    """Shards, which PLD does not support, and DP-SGD: at most half of delta each, and at least either part alone."""
    shards, full_batch = Entry(GAUSSIAN, 2.5, 1 / 50, 10_000), Entry(GAUSSIAN, 50.0, 1.0, 1)
    sampled = Entry(DP_SGD, 1.0, 0.05, 400)
    found = bound_replaced((shards, full_batch, sampled), DELTA)
    assert found <= bound_replaced((shards, full_batch), DELTA / 2) + bound_replaced((sampled,), DELTA / 2)
    assert found > bound_replaced((shards,), DELTA) + 0.5 * bound_replaced((sampled,), DELTA)
    assert found > max(bound_replaced((shards, full_batch), DELTA), bound_replaced((full_batch, sampled), DELTA))
    # A split is only sound where the parts of delta do not exceed it.
    assert all(0 < share < 1 for share in bounds.SPLITS)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "entry", [Entry(DP_SGD, 1.0, 0.05, 100), Entry(GAUSSIAN, 3.0, 0.1, 50), Entry(GAUSSIAN, 3.0, 1.0, 5)]
)
def test_every_kind_is_monotone(entry):
    base = bound_replaced((entry,), DELTA)
    for cheaper in ({"noise": 2 * entry.noise}, {"steps": entry.steps // 2}, {"rate": entry.rate / 2}):
        assert bound_replaced((dataclasses.replace(entry, **cheaper),), DELTA) < base
    assert bound_replaced((entry,), DELTA / 100) > base > bound_replaced((entry,), DELTA * 100)
    assert bound_replaced((entry, Entry(GAUSSIAN, 100.0, 1.0, 1)), DELTA) > base


def test_two_channels_compose_as_one():
    """Gaussian releases of z1 and z2 cost together as much as one release of (z1^-2 + z2^-2)^(-1/2)."""
    split, single = Accountant(), Accountant()
    split.gaussian("a", 3.0, steps=2)
    split.gaussian("b", 5.0)
    single.gaussian("c", (2 / 9 + 1 / 25) ** -0.5)
    assert split.epsilon(DELTA) == pytest.approx(single.epsilon(DELTA), rel=1e-9)
    figure = split.figure(DELTA)
    assert figure.epsilon > max(figure.channels.values())
    assert figure.epsilon < sum(figure.channels.values())
    assert figure.channels["a"] == split.epsilon(DELTA, "a") > split.epsilon(DELTA, "b")


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    accountant = Accountant()
    assert accountant.epsilon(DELTA) == 0
    accountant.gaussian("g", 1.0, steps=0)
    assert accountant.epsilon(DELTA) == 0
    accountant.gaussian("g", 0.0)
    assert accountant.epsilon(DELTA) == math.inf
    accountant.dp_sgd("t", 0.0, rate=0.1, steps=1)
    assert accountant.epsilon(DELTA, "t") == math.inf
    accountant.dp_sgd("u", 0.05, rate=0.5, steps=1000)  # far too little noise gives no wrong number
    assert accountant.epsilon(DELTA, "u") == math.inf


def test_by_renyi_a_replacement_costs_more_than_twice():
    entries = (Entry(DP_SGD, 1.0, 0.05, 400),)
    quoted = added_or_removed(entries, DELTA)
    assert quoted == pytest.approx(7.425, abs=0.01)
    found = bounds._hop(entries, DELTA)
    assert found > 2 * quoted
    # (2 e, (1 + exp(e)) d) with the d that makes the second DELTA.
    inner = found / 2
    d = DELTA / (1 + math.exp(inner))
    assert added_or_removed(entries, d) == pytest.approx(inner, rel=1e-3)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("shards", [1, 20])
def test_the_noise_found_meets_its_target(shards):
    account = lambda noise: discriminator(noise, shards, steps=100)  # noqa: E731
    sigma = least_noise(account, 2.0, DELTA)
    assert account(sigma).epsilon(DELTA) <= 2.0 < account(sigma * 0.995).epsilon(DELTA)


def test_a_target_out_of_reach_is_said():
    def account(noise):
        accountant = discriminator(noise, 1)
        accountant.gaussian("histogram", 0.1)
        return accountant

    with pytest.raises(UserError, match="No noise makes epsilon 1 at delta 1e-05"):
        least_noise(account, 1.0, DELTA)
    for epsilon, delta in ((0.0, DELTA), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match=r"epsilon|delta"):
            least_noise(account, epsilon, delta)


def test_the_ledger_survives_a_resume_and_does_not_grow():
    uncut, half = Accountant(), Accountant()
    for accountant, steps in ((uncut, 50), (half, 20)):
        for _ in range(steps):
            accountant.gaussian("discriminator", 4.0, shards=10)
        accountant.dp_sgd("teacher", 1.0, rate=0.1, steps=7)
    resumed = Accountant(json.loads(json.dumps(half.state)))
    for _ in range(30):
        resumed.gaussian("discriminator", 4.0, shards=10)
    assert resumed.state == uncut.state
    assert [len(rows) for rows in uncut.state.values()] == [1, 1]
    assert resumed.figure(DELTA) == uncut.figure(DELTA)


def test_arguments():
    accountant = Accountant()
    for wrong in (
        lambda: accountant.gaussian("g", -1.0),
        lambda: accountant.gaussian("g", math.nan),
        lambda: accountant.gaussian("g", 1.0, shards=0),
        lambda: accountant.gaussian("g", 1.0, steps=-1),
        lambda: accountant.dp_sgd("g", 1.0, rate=0.0, steps=1),
        lambda: accountant.dp_sgd("g", 1.0, rate=1.1, steps=1),
        lambda: accountant.epsilon(0.0),
    ):
        with pytest.raises(ValueError, match=r"not"):
            wrong()
    assert accountant.channels == ()


@pytest.mark.parametrize(
    "entry",
    [["laplace", 1.0, 1.0, 1], ["gaussian", -1.0, 1.0, 1], ["gaussian", math.nan, 1.0, 1], ["gaussian", 1.0, 0.0, 1],
     ["dp-sgd", 1.0, 2.0, 1], ["dp-sgd", 1.0, 0.5, -1], ["gaussian", 1.0, 1.0, 1 << 60]],
    ids=str,
)  # fmt: skip
def test_a_ledger_holds_what_a_release_books(entry):
    with pytest.raises(ValueError, match="no release books the entry"):
        Accountant({"d": [entry]})


# -- client level ------------------------------------------------------------------------------------------------------


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
    found = ClientLevel(0.7, noise, DELTA).epsilon(rounds)
    assert found == pytest.approx(dp.get_epsilon_gaussian(noise / 2 / math.sqrt(rounds), DELTA), rel=1e-9)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("noise", "rounds", "drawn", "of"), [(2.0, 100, 100, 10_000), (3.0, 1000, 7, 300)])
def test_with_a_draw_epsilon_is_that_of_the_sampled_gaussian_mechanism(noise, rounds, drawn, of):
    import dp_accounting.rdp

    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    event = dp.SampledWithoutReplacementDpEvent(of, drawn, dp.GaussianDpEvent(noise / 2))
    accountant.compose(event, rounds)
    level = ClientLevel(1.0, noise, DELTA)
    assert level.epsilon(rounds, drawn=drawn, of=of) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    assert level.epsilon(rounds, drawn=drawn, of=of) < level.epsilon(rounds) / 2


def test_a_draw_never_costs_more_than_none():
    """The bound of sampling is loose for large shares, where the mechanism without sampling has the better bound."""
    level = ClientLevel(1.0, 1.0, DELTA)
    assert level.epsilon(3, drawn=9, of=10) == level.epsilon(3)
    accountant = Accountant()
    accountant.gaussian("g", 0.5, shards=10, drawn=9, steps=3)
    assert accountant.epsilon(DELTA) > level.epsilon(3)


@pytest.mark.parametrize("draw", [{}, {"drawn": 3, "of": 100}])
def test_epsilon_of_clients_is_monotone(draw):
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
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    table = re.search(r"<!-- client-level epsilon -->(.*?)<!-- end -->", page, re.DOTALL)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", table[1], re.MULTILINE)
    assert len(rows) == 5
    for clients, drawn, rounds, noise, epsilon in rows:
        found = ClientLevel(1.0, float(noise), DELTA).epsilon(int(rounds), drawn=int(drawn), of=int(clients))
        assert f"{found:.3g}" == epsilon
