"""The audit: its bounds on mechanisms with known mu, and the methods' mechanisms against their ledgers.

The program of the page (benchmarks/studies/privacy_audit.py) runs them with fewer repeats and fixed seeds.
"""

import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom

from benchmarks.studies import privacy_audit
from benchmarks.studies.audit import audit, claimed_mu
from fedkern.privacy import Accountant
from python_tests.extras import needs_accounting, needs_opacus

REPEATS = 10_000


def gaussian(mu, runs, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(runs, generator=generator), mu + torch.randn(runs, generator=generator)


# -- the bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_bound_is_near_mu_of_a_gaussian_mechanism_and_below(mu):
    found = audit(*gaussian(mu, 40_000, 0))
    assert 0.9 * mu - 0.05 < found.lower < mu
    assert found.repeats == 40_000
    assert found.lower == pytest.approx(
        torch.special.ndtri(torch.tensor([1 - found.false_positives, 1 - found.false_negatives]).double()).sum().item()
    )


def test_the_bound_is_wrong_as_seldom_as_it_says():
    """Of 500 audits at 80 % at most a fifth is above mu, up to 5 deviations.

    Choosing the threshold costs nothing.
    """
    wrong = sum(audit(*gaussian(1.0, 200, seed), confidence=0.8).lower > 1.0 for seed in range(500))
    assert 0 < wrong < 100 + 5 * math.sqrt(500 * 0.2 * 0.8)


def test_nothing_told_apart_is_a_bound_of_zero():
    assert audit(*gaussian(0.0, 1000, 0)).lower == 0
    assert audit(torch.zeros(100), torch.zeros(100)).lower == 0
    assert audit(*reversed(gaussian(3.0, 1000, 0))).lower == 0  # scores that are larger on the wrong side


def test_the_error_rates_are_clopper_and_pearsons():
    """With scores that never overlap, the bound is all that the number of repeats can show.

    An error counts with its exact probability.
    """
    clear = audit(torch.zeros(2000), torch.ones(2000))
    assert clear.false_positives == clear.false_negatives == pytest.approx(1 - 0.005 ** (1 / 1000))
    assert clear.lower == pytest.approx(-2 * float(torch.special.ndtri(torch.tensor(clear.false_positives).double())))
    members, strangers = torch.zeros(2000), torch.ones(2000)
    members[1000:1007] = 2  # seven of the half that is counted
    assert binom.cdf(7, 1000, audit(members, strangers).false_positives) == pytest.approx(0.005)


def test_what_is_no_set_of_scores_is_refused():
    good = torch.zeros(10)
    for members, strangers, words in (
        (torch.zeros(3), torch.zeros(3), "one must be scores"),
        (good, torch.zeros(5, 2), "other must be scores"),
        (good, torch.zeros(8), "same number of runs, not 10 and 8"),
        (good, torch.full((10,), math.nan), "other must not hold NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            audit(members, strangers)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must be in"):
            audit(good, good, confidence=confidence)


# -- claims ------------------------------------------------------------------------------------------------------------


def test_mu_of_a_ledger_without_sampling():
    accountant = Accountant()
    assert claimed_mu(accountant.state) == 0
    accountant.gaussian("discriminator", 2.0, steps=4)
    assert claimed_mu(accountant.state) == pytest.approx(1.0)
    accountant.gaussian("teacher", 0.5)
    assert claimed_mu(accountant.state) == pytest.approx(math.sqrt(1 + 4))
    accountant.dp_sgd("dp-sgd", 4.0, rate=1.0, steps=3)  # a replaced gradient may turn around
    assert claimed_mu(accountant.state) == pytest.approx(math.sqrt(1 + 4 + 3 / 4))
    accountant.gaussian("histogram", 0.0)
    assert claimed_mu(accountant.state) == math.inf
    with pytest.raises(ValueError, match="not laplace"):
        claimed_mu({"a": [["laplace", 1.0, 1.0, 1]]})
    with pytest.raises(ValueError, match="false_positives must be in"):
        claimed_mu({}, 0.0)


@needs_accounting
@pytest.mark.parametrize("false_positives", [0.01, 0.1, 0.3])
def test_mu_of_a_sampled_release_is_no_less_than_the_best_test_has(false_positives):
    """A fifth of the releases is N(1, 1 / 4), or N(-1, 1 / 4) with the record replaced, and the rest N(0, 1 / 4)."""
    ledger = {"discriminator": [["gaussian", 0.25, 0.2, 1]]}  # over the change, which is 2

    def above(threshold, mean):
        parts = torch.tensor([mean - threshold, -threshold]).double() / 0.5
        return float(torch.special.ndtr(parts) @ torch.tensor([0.2, 0.8]).double())

    threshold = brentq(lambda t: above(t, -1.0) - false_positives, -5, 5)
    best = float(torch.special.ndtri(torch.tensor([1 - false_positives, above(threshold, 1.0)]).double()).sum())
    claimed = claimed_mu(ledger, false_positives)
    assert best < claimed < claimed_mu({"discriminator": [["gaussian", 0.25, 0.5, 1]]}, false_positives) < math.inf


# -- the mechanisms ----------------------------------------------------------------------------------------------------

PLAIN = {
    "discriminators": (privacy_audit.channels(sigma=2.0), 2.0),
    "discriminators, four releases": (privacy_audit.channels(sigma=8.0, releases=4), 1.0),
    "class counts": (privacy_audit.histogram(histogram_noise=1.0), math.sqrt(2)),
}
TRAINED = {
    "DP-SGD": (privacy_audit.dp_sgd(noise=1.0), 2.0),
    "DP-SGD, two steps": (privacy_audit.dp_sgd(noise=math.sqrt(2), steps=2), 2.0),
}


def check(runs, mu, repeats, share):
    """Check that the ledger's mu is the mechanism's.

    The audited bound is below and near mu, and halved noise is caught.
    """
    mechanism = privacy_audit.Mechanism("it", runs)
    found = privacy_audit.run_audit(mechanism, repeats)
    assert found["claimed"] == pytest.approx(mu)
    assert share * mu < found["lower"] <= mu
    with privacy_audit.draws(privacy_audit.halve_noise):
        caught = privacy_audit.run_audit(mechanism, repeats)
    assert caught["claimed"] == found["claimed"]
    assert caught["lower"] > 1.5 * mu


@pytest.mark.parametrize("name", PLAIN)
def test_a_channel_gives_away_what_it_books_and_half_its_noise_is_caught(name):
    check(*PLAIN[name], REPEATS, 0.8)


@needs_opacus
@pytest.mark.parametrize("name", TRAINED)
def test_dp_sgd_gives_away_what_it_books_and_half_its_noise_is_caught(name):
    check(*TRAINED[name], 4096, 0.85)


def test_noise_that_is_used_twice_is_caught():
    """Noise cancels between four releases in opposite directions, which reveals everything."""
    runs, mu = PLAIN["discriminators, four releases"]

    def reuse_noise(max_norm, noise, seed, offset):
        return {"max_norm": max_norm, "noise": noise, "seed": 1, "offset": 0}

    with privacy_audit.draws(reuse_noise):
        found = privacy_audit.run_audit(privacy_audit.Mechanism("", runs), REPEATS)
    assert found["claimed"] == pytest.approx(mu)
    assert found["lower"] > 6


def test_clipping_to_twice_the_norm_is_caught():
    runs, mu = PLAIN["discriminators"]

    def loose(max_norm, noise, **settings):
        return {"max_norm": 2 * max_norm, "noise": noise / 2, **settings}

    with privacy_audit.draws(loose):
        assert privacy_audit.run_audit(privacy_audit.Mechanism("", runs), REPEATS)["lower"] > 1.5 * mu


@needs_accounting
@pytest.mark.parametrize(
    ("runs", "repeats"),
    [
        (privacy_audit.channels(sigma=2.0, shards=5), 6000),
        pytest.param(privacy_audit.dp_sgd(noise=1.0, rate=0.25), 4096, marks=needs_opacus),
    ],
    ids=["shards", "DP-SGD"],
)
def test_sampled_mechanisms_stay_within_their_ledgers_and_sampling_left_out_is_caught(runs, repeats):
    mechanism = privacy_audit.Mechanism("", runs)
    found = privacy_audit.run_audit(mechanism, repeats)
    assert 0 < found["lower"] < found["claimed"]
    with privacy_audit.stop_sampling():
        caught = privacy_audit.run_audit(mechanism, repeats)
    assert caught["ledger"] == found["ledger"]
    assert caught["lower"] > caught["claimed"]
