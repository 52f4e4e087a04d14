"""FedIOD's weights and losses by hand, and its statements about privacy."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.studies.run import read_study
from fedkern import ops
from fedkern.cli.flags import parse_run
from fedkern.cli.request import effective_config
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.methods.base import Federation
from fedkern.methods.fediod import losses
from fedkern.methods.fediod import private_messages as privacy
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.settings.config import RunConfig

K, B, C = 3, 5, 4


def draw(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[(), (2, 3)], ids=["images", "pixels"])
def logits(request):
    return draw(K, B, C, *request.param)


PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_class_weights_sum_to_one_and_an_absent_class_counts_equally():
    counts = torch.tensor([[3.0, 0, 0, 2], [1, 0, 0, 2], [0, 5, 0, 0]])
    w = losses.normalise_weights(losses.importance(counts, None), counts > 0)[:, 0]
    assert torch.equal(w.sum(0), torch.ones(4))
    assert torch.equal(w[:, 0], torch.tensor([0.75, 0.25, 0]))
    assert torch.equal(w[:, 2], torch.full((3,), 1 / 3))


def test_weights_of_an_image_sum_to_one_and_a_client_without_the_class_counts_nothing():
    counts = torch.tensor([[3.0, 0, 0, 2], [1, 0, 0, 2], [0, 5, 0, 0]])
    scores = torch.rand(3, B, generator=torch.Generator().manual_seed(0))
    w = losses.normalise_weights(losses.importance(counts, scores), counts > 0)
    assert w.shape == (3, B, 4)
    torch.testing.assert_close(w.sum(0), torch.ones(B, 4))
    assert not w[0, :, 1].any()
    assert torch.equal(w[2, :, 1], torch.ones(B))
    expected = 3 * scores[0] / (3 * scores[0] + scores[1])
    torch.testing.assert_close(w[0, :, 0], expected)


def test_no_gradient_goes_through_the_confidence():
    scores = torch.rand(K, B, requires_grad=True)
    assert not losses.importance(torch.ones(K, C), scores).requires_grad


def test_mixture_is_what_ensemble_kl_distils(logits):
    """A student that answers as the mixture has no loss, by class, image and mask."""
    weights = losses.importance(torch.rand(K, C, dtype=torch.float64), torch.rand(K, B, dtype=torch.float64))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
    said = losses.mixture(logits, weights, mask)
    assert float(losses.distillation(said, logits, weights, mask)) == pytest.approx(0, abs=1e-12)
    moved = logits.clone()
    moved[0, :, 2] += 7  # a class that client 0 does not know
    assert torch.equal(losses.mixture(moved, weights, mask), losses.mixture(logits, weights, mask))


def test_logit_variance_is_the_divergence_at_high_temperature(logits):
    student, weights = draw(*logits.shape[1:], seed=1), torch.rand(K, 1, C, dtype=torch.float64)
    exact = losses.distillation(student, logits, weights, None)
    hot = ops.ensemble_kl(student, logits, weights, 1e3, mix="logits")
    assert float(hot) == pytest.approx(float(exact), rel=1e-3)
    difference = losses.mixture(logits, weights, None) - student
    assert float(exact) == pytest.approx(float(difference.var(1, correction=0).mean() / 2))


def test_diversity_is_bounded_and_zero_where_teachers_agree(logits):
    def diversity(logits, pi):
        return float(losses.teacher_terms(logits, pi, 0.0)[1]["diversity"])

    assert 0 < diversity(logits, PI) <= math.log(K)
    assert diversity(logits[:1].expand_as(logits), PI) == pytest.approx(0, abs=1e-12)
    opposed = torch.full((K, B, K), -50.0, dtype=torch.float64)
    opposed[range(K), :, range(K)] = 50
    assert diversity(opposed, torch.ones(K, dtype=torch.float64)) == pytest.approx(math.log(K))


def test_terms_by_hand(logits):
    total, terms = losses.teacher_terms(logits, PI, 10.0)
    p = logits.softmax(2).movedim(2, -1).flatten(1, -2)  # [K, rows, C]
    entropy = torch.special.entr(p).sum(2).mean(1)
    mixed = torch.special.entr((PI[:, None, None] * p).sum(0)).sum(1).mean()
    mean = p.mean(1)
    expected = {
        "clarity": (PI * entropy).sum(),
        "diversity": mixed - (PI * entropy).sum(),
        "balance": (PI * (mean * mean.log2()).sum(1)).sum(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-9), name
    by_hand = expected["clarity"] - expected["diversity"] + 10 * expected["balance"]
    assert float(total) == pytest.approx(float(by_hand), rel=1e-9)
    assert losses.teacher_terms(logits, PI, 0.0)[1].keys() == {"clarity", "diversity"}


def test_the_generator_seeks_images_on_which_teachers_differ(logits):
    """The sign is that of the paper's diversity.

    The clarity would be a part of the same gradient.
    """
    x = logits.clone().requires_grad_()
    total, terms = losses.teacher_terms(x, PI, 0.0)
    (gradient,) = torch.autograd.grad(total - terms["clarity"], x)
    after = ops.js_div(x.detach() - 1e-3 * gradient / gradient.norm(), PI)
    assert float(after) > float(ops.js_div(logits, PI))


def test_discriminators_loss_and_confidence():
    patches = draw(2, B, 3, 3)
    real = torch.nn.functional.binary_cross_entropy_with_logits(patches[0], torch.ones(B, 3, 3, dtype=torch.float64))
    assert float(losses.patch_entropy(patches, True)[0].mean()) == pytest.approx(float(real))
    torch.testing.assert_close(losses.patch_entropy(patches, False), losses.patch_entropy(-patches, True))
    torch.testing.assert_close(losses.confidence(patches)[1], patches[1].sigmoid().mean((1, 2)))


def test_gradients_of_teachers_that_rule_classes_out(logits):
    """A teacher that is sure that it never saw a class has probabilities of 0 in single precision."""
    sure = logits.float()
    sure[1, :, 2] -= 200
    sure.requires_grad_()
    assert (sure.softmax(2).movedim(2, -1).flatten(1, -2).mean(1) == 0).any()
    total, terms = losses.teacher_terms(sure, PI.float(), 1.0)
    assert all(bool(term.isfinite()) for term in terms.values())
    (gradient,) = torch.autograd.grad(total, sure)
    assert bool(gradient.isfinite().all())


def test_distilling_teachers_that_rule_classes_out(logits):
    sure = logits.float()
    sure[:, :, 2] -= 200
    sure = losses.teacher_log_probs(sure).requires_grad_()
    student = logits[0].float().requires_grad_()
    loss = losses.distillation(student, sure, torch.rand(K, B, C), None)
    assert bool(loss.isfinite())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (student, sure)))


def test_scores_of_nothing_leave_the_classes_their_weights():
    """Discriminators that are sure that an image is synthetic do not move its classes to clients without them."""
    by_class = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = losses.importance(by_class, torch.zeros(2, 1))
    assert torch.equal(losses.normalise_weights(weights)[:, 0], by_class)


def settings_of(study, cell, *chosen):
    """Return the settings of a study's cell, and the names of the settings in its command."""
    cells = read_study(study)
    words = [*cells.words(cells.find(cell).command, Path("teachers")), *chosen]
    config = effective_config(parse_run(words))
    return config, [*parse_run(words).settings]


def test_masks_of_ones_own_are_learnt_with_the_settings_of_the_study():
    chosen = ("--method-option", "critic_layers=2", "--method-option", "w_balance=1.0")
    study, names = settings_of("fediod_membrane", "FedIOD", *chosen)
    config = RunConfig.make("fediod", data="segmentation")
    names = [name for name in names if name not in ("partition", "public_samples", "teachers", "eval_every")]
    assert {name: getattr(config, name) for name in names} == {name: getattr(study, name) for name in names}
    assert config.options == study.options


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_data_of_ones_own_are_learnt_with_the_settings_of_the_study(data):
    """docs/fediod.md reports figures of `fediod --data mnist`."""
    cell = {"mnist": "MNIST 0.1: FedIOD", "cifar10": "CIFAR-10 0.1: FedIOD"}[data]
    chosen = ("--method-option", "critic_lr=0.0002", "--method-option", "disc_weight=false")
    study, _ = settings_of("fediod_rivals", cell, *chosen)
    config = RunConfig.make("fediod", data=data)
    names = ("rounds", "lr", "batch_size", "momentum", "weight_decay", "model", "width", "local_epochs")
    assert {name: getattr(config, name) for name in names} == {name: getattr(study, name) for name in names}
    assert config.options == study.options


# -- iod options -------------------------------------------------------------------------------------------------------


THROUGH_D, THROUGH_T, LOGITS = "discriminator_gradients", "teacher_gradients", "teacher_logits"
COUNTS, SCORES = "class_counts", "scores"
TEXTS = {
    THROUGH_D: "the generator's gradients through the discriminators",
    THROUGH_T: "the generator's gradients through the teachers",
    LOGITS: "the teachers' answers (which change the student and other clients' gradients)",
    COUNTS: "the clients' class counts",
    SCORES: "the discriminators' confidence in every image",
}
STUDENT = {LOGITS: "the teachers' answers that the student learns from"}
SILENT = {"class_weights": "uniform"}
NOISED = {"epsilon": 5.0}
TAUGHT = {"epsilon": 5.0, "teacher_dp": True}


def options(**settings):
    return IODOptions(**{"disc_weight": True, "batch": 8, "iterations": 5, **settings})


@pytest.mark.parametrize(
    ("settings", "covers", "leaves", "texts"),
    [
        ({**NOISED, "shards": 50}, [THROUGH_D], [THROUGH_T, LOGITS, COUNTS], {}),
        ({**NOISED, "histogram_noise": 3.0}, [THROUGH_D, COUNTS], [THROUGH_T, LOGITS], {}),
        ({**NOISED, **SILENT}, [THROUGH_D], [THROUGH_T, LOGITS], {}),
        # Private teachers, with a loss that asks no discriminators, with counts, and with all that there is.
        ({**TAUGHT, "w_real": 0.0, **SILENT}, [THROUGH_T, LOGITS], [], STUDENT),
        (TAUGHT, [THROUGH_D, THROUGH_T, LOGITS], [COUNTS], STUDENT),
        ({**TAUGHT, "histogram_noise": 3.0}, [THROUGH_D, THROUGH_T, LOGITS, COUNTS], [], STUDENT),
        ({**TAUGHT, "mode": "public", **SILENT}, [LOGITS], [], STUDENT),
        # Counts alone: the discriminators' confidence is told.
        ({"histogram_noise": 3.0}, [COUNTS], [THROUGH_D, THROUGH_T, LOGITS, SCORES], {}),
        ({"histogram_noise": 3.0, "disc_weight": False}, [COUNTS], [THROUGH_D, THROUGH_T, LOGITS], {}),
        ({"histogram_noise": 3.0, "mode": "public"}, [COUNTS], [LOGITS], STUDENT),
    ],
)
def test_every_release_is_covered_or_listed(settings, covers, leaves, texts):
    told = options(**settings).guarantee()
    assert told.to_dict() == {"covers": covers, "leaves_uncovered": leaves}
    assert {**told.covers, **told.leaves} == {name: {**TEXTS, **texts}[name] for name in (*covers, *leaves)}
    assert told.figure == ("epsilon_covered" if leaves else "epsilon")
    assert told.with_records().to_dict() == {"covers": covers, "leaves_uncovered": [*leaves, "records"]}
    assert told.with_records().figure == "epsilon_covered"
    assert told.delta == 1e-5


def test_nothing_is_promised_where_nothing_is_private():
    for settings in ({}, {"histogram_noise": 3.0, **SILENT}):  # noise on counts that nobody is told
        assert options(**settings).guarantee() is None
        server = SimpleNamespace(state={}, warn=None)
        privacy.prepare(server, options(**settings))
        assert server.state == {}


def test_the_noise_is_settled_before_the_first_round():
    for settings, is_noised in (({"histogram_noise": 3.0}, False), (NOISED, True)):
        server = SimpleNamespace(state={}, federation=Federation(2, (50, 50), 10), warn=None)
        privacy.prepare(server, options(**settings))
        assert server.state["privacy"]["steps"] == 10
        assert (server.state["privacy"]["sigma_d"] > 0) == is_noised


def test_the_warning_names_what_is_covered_what_is_not_and_the_way_out():
    told = options(**NOISED, histogram_noise=3.0).guarantee()
    assert told.warning() == (
        f"The whole release has no epsilon: what is told as epsilon_covered covers {TEXTS[THROUGH_D]} and "
        f"{TEXTS[COUNTS]}, not {TEXTS[THROUGH_T]} and {TEXTS[LOGITS]}; teacher_dp=true covers what comes from the "
        "teachers."
    )
    assert "teacher_dp" not in options(**TAUGHT).guarantee().warning()


def test_records_are_private_where_an_option_asks_for_privacy():
    kind = METHODS["fediod"]
    for settings in (NOISED, TAUGHT, {"histogram_noise": 1.0}):
        assert kind.is_private(IODOptions(**settings))
        assert RunConfig.make("fediod", options=settings).records == "private"
    assert not kind.is_private(IODOptions())
    assert RunConfig.make("fediod").records == RunConfig.make("fedavg").records == "all"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_dp": True}, '"teacher_dp" needs a target'),
        ({"epsilon": 1.0, "mode": "public"}, '"mode" = public sends no gradients'),
        ({"shards": 5}, '"shards" is for the gradients'),
        ({"shards": 5, **TAUGHT, "mode": "public"}, '"shards" is for the gradients'),
    ],
)
def test_options_that_promise_nothing_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        options(**settings)
