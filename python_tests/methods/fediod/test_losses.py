"""FedIOD's weights and losses: what they are by hand, and what must hold of them whatever the logits."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.studies.run import read_study
from fedkern import ops
from fedkern.cli.flags import parse
from fedkern.cli.request import effective
from fedkern.errors import UserError
from fedkern.methods import FedIOD
from fedkern.methods.fediod import losses
from fedkern.methods.fediod.presets import PRESETS, settle
from fedkern.settings.config import RunConfig
from fedkern.settings.stored import read_settings

K, B, C = 3, 5, 4


def settings(**options):
    return settle(FedIOD.Options(**options))


def draw(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[(), (2, 3)], ids=["images", "pixels"])
def logits(request):
    return draw(K, B, C, *request.param)


PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_class_weights_sum_to_one_and_an_absent_class_counts_equally():
    counts = torch.tensor([[3.0, 0, 0, 2], [1, 0, 0, 2], [0, 5, 0, 0]])
    w = losses.normalised(losses.importance(counts, None), counts > 0)[:, 0]
    assert torch.equal(w.sum(0), torch.ones(4))
    assert torch.equal(w[:, 0], torch.tensor([0.75, 0.25, 0]))
    assert torch.equal(w[:, 2], torch.full((3,), 1 / 3))


def test_weights_of_an_image_sum_to_one_and_a_client_without_the_class_counts_nothing():
    counts = torch.tensor([[3.0, 0, 0, 2], [1, 0, 0, 2], [0, 5, 0, 0]])
    scores = torch.rand(3, B, generator=torch.Generator().manual_seed(0))
    w = losses.normalised(losses.importance(counts, scores), counts > 0)
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
    """A student that says what the mixture says has no loss, by class, image and mask."""
    weights = losses.importance(torch.rand(K, C, dtype=torch.float64), torch.rand(K, B, dtype=torch.float64))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
    for mix in ("logits", "probs"):
        for kd in ("kl", "l1"):
            s = settings(mix=mix, kd=kd, temperature=1.0)
            said = losses.mixture(logits, weights, mask, mix)
            assert float(losses.distillation(said, logits, weights, mask, s)) == pytest.approx(0, abs=1e-12)
    moved = logits.clone()
    moved[0, :, 2] += 7  # a class that client 0 does not know
    assert torch.equal(losses.mixture(moved, weights, mask), losses.mixture(logits, weights, mask))


def test_logit_variance_is_the_divergence_at_high_temperature(logits):
    student, weights = draw(*logits.shape[1:], seed=1), torch.rand(K, 1, C, dtype=torch.float64)
    exact = losses.distillation(student, logits, weights, None, settings())
    hot = losses.distillation(student, logits, weights, None, settings(kd="kl", temperature=1e3))
    assert float(hot) == pytest.approx(float(exact), rel=1e-3)
    difference = losses.mixture(logits, weights, None) - student
    assert float(exact) == pytest.approx(float(difference.var(1, correction=0).mean() / 2))


def test_diversity_is_bounded_and_zero_where_teachers_agree(logits):
    value = float(losses.diversity(logits, PI, "jsd"))
    assert 0 < value <= math.log(K)
    same = logits[:1].expand_as(logits)
    assert float(losses.diversity(same, PI, "jsd")) == pytest.approx(0, abs=1e-12)
    apart = torch.full((K, B, K), -50.0, dtype=torch.float64)
    apart[range(K), :, range(K)] = 50
    assert float(losses.diversity(apart, torch.ones(K, dtype=torch.float64), "jsd")) == pytest.approx(math.log(K))
    assert float(losses.diversity(same, PI, "reverse_kl")) == pytest.approx(0, abs=1e-12)
    assert float(losses.diversity(logits, PI, "reverse_kl")) > 0


def test_the_released_diversity_clamps_after_the_mean_is_taken():
    """Two teachers on an image of three classes: the mean of 0.002 and 0.2 is 0.101, not that of 0.01 and 0.2."""
    p = torch.tensor([[[0.002, 0.5, 0.498]], [[0.2, 0.3, 0.5]]], dtype=torch.float64)
    mean, clamped = (0.101, 0.4, 0.499), ((0.01, 0.5, 0.498), (0.2, 0.3, 0.5))
    expected = sum(m * math.log(m / q) for row in clamped for m, q in zip(mean, row, strict=True)) / 2
    value = losses.diversity(p.log(), torch.ones(2, dtype=torch.float64), "reverse_kl")
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_mutual_information_of_image_and_class():
    pi = torch.ones(1, dtype=torch.float64)
    sure = 60 * torch.eye(C, dtype=torch.float64)[None]  # every image another class, without doubt
    assert float(losses.diversity(sure, pi, "mutual_information")) == pytest.approx(math.log(C))
    assert float(losses.diversity(sure[:, :1].expand(1, C, C), pi, "mutual_information")) == pytest.approx(0, abs=1e-9)
    logits = draw(K, B, C, 2)
    p = (PI[:, None, None, None] * logits.softmax(2)).sum(0).movedim(1, -1).flatten(0, -2)
    expected = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()
    assert float(losses.diversity(logits, PI, "mutual_information")) == pytest.approx(float(expected))


def test_terms_by_hand(logits):
    s = settings(preset="code", diversity="jsd", js_sign=-1)
    student, weights = draw(*logits.shape[1:], seed=1), torch.ones(K, 1, C, dtype=torch.float64)
    total, terms = losses.teacher_terms(logits, PI, s, student, weights, None)
    p = logits.softmax(2).movedim(2, -1).flatten(1, -2)  # [K, rows, C]
    entropy = torch.special.entr(p).sum(2).mean(1)
    mixed = torch.special.entr((PI[:, None, None] * p).sum(0)).sum(1).mean()
    mean = p.mean(1)
    expected = {
        "clarity": (PI * entropy).sum(),
        "diversity": mixed - (PI * entropy).sum(),
        "adversarial": (logits.mean(0) - student).var(1, correction=0).mean() / 2,
        "balance": (PI * (mean * mean.log2()).sum(1)).sum(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-9), name
    by_hand = expected["clarity"] - 5 * expected["diversity"] - 0.2 * expected["adversarial"] + 10 * expected["balance"]
    assert float(total) == pytest.approx(float(by_hand), rel=1e-9)


@pytest.mark.parametrize("sign", [-1, 1])
def test_sign_of_the_diversity(sign, logits):
    """The paper's generator seeks images on which the teachers differ, the code's shuns them."""
    s = settings(js_sign=sign, w_clear=0.0)
    x = logits.clone().requires_grad_()
    total, _ = losses.teacher_terms(x, PI, s, None, torch.ones(K, 1, C), None)
    (gradient,) = torch.autograd.grad(total, x)
    after = ops.js_div(x.detach() - 1e-3 * gradient / gradient.norm(), PI)
    assert (float(after) - float(ops.js_div(logits, PI))) * sign < 0


def test_discriminators_loss_and_confidence():
    patches = draw(2, B, 3, 3)
    real = torch.nn.functional.binary_cross_entropy_with_logits(patches[0], torch.ones(B, 3, 3, dtype=torch.float64))
    assert float(losses.against(patches, True, "mean")[0].mean()) == pytest.approx(float(real))
    torch.testing.assert_close(losses.against(patches, False, "sum"), 9 * losses.against(patches, False, "mean"))
    torch.testing.assert_close(losses.confidence(patches)[1], patches[1].sigmoid().mean((1, 2)))


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize("diversity", ["jsd", "reverse_kl", "mutual_information"])
def test_gradients_of_teachers_that_rule_classes_out(preset, diversity, logits):
    """Probabilities that are 0 in single precision: a teacher that is sure never saw the class."""
    sure = logits.float()
    sure[1, :, 2] -= 200
    sure.requires_grad_()
    assert (sure.softmax(2).movedim(2, -1).flatten(1, -2).mean(1) == 0).any()
    s = settings(preset=preset, diversity=diversity, w_balance=1.0)
    student = logits[0].float()
    total, terms = losses.teacher_terms(sure, PI.float(), s, student, PI.float()[:, None, None], None)
    assert all(bool(term.isfinite()) for term in terms.values())
    (gradient,) = torch.autograd.grad(total, sure)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kd", ["l1", "kl", "logit_var"])
@pytest.mark.parametrize("mix", ["probs", "log_probs", "logits"])
def test_distilling_teachers_that_rule_classes_out(kd, mix, logits):
    sure = logits.float()
    sure[:, :, 2] -= 200
    sure = losses.teacher_log_probs(sure, mix).requires_grad_()
    student = logits[0].float().requires_grad_()
    s = settings(kd=kd, mix=mix)
    loss = losses.distillation(student, sure, torch.rand(K, B, C), None, s)
    assert bool(loss.isfinite())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (student, sure)))


def test_a_mixture_of_probabilities_where_all_are_sure_against_their_class():
    """Two teachers, each asked for the class that it rules out: equally likely, not NaN."""
    said = torch.tensor([[[-130.0, 130]], [[130, -130]]])
    mixed = losses.mixture(said, torch.eye(2)[:, None], torch.eye(2) > 0, "probs")
    assert torch.equal(mixed, torch.full((1, 2), 0.5).log())


def test_scores_of_nothing_leave_the_classes_their_weights():
    """Discriminators that are sure an image is made up do not hand its classes to clients that never saw them."""
    by_class = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = losses.importance(by_class, torch.zeros(2, 1))
    assert torch.equal(losses.normalised(weights)[:, 0], by_class)


def test_presets_settle_what_is_left_open():
    paper, code, study = settings(preset="paper"), settings(preset="code", w_adv=0.5), settings()
    assert (study.w_real, study.w_balance, study.js_sign, study.disc_weight, study.bce) == (8, 2, -1, False, "mean")
    assert (paper.w_adv, paper.w_balance, paper.js_sign, paper.disc_weight, paper.bce) == (0, 0, -1, True, "mean")
    assert (code.w_adv, code.w_balance, code.w_diverse, code.js_sign, code.bce) == (0.5, 10, 5, 1, "sum")
    assert not code.disc_weight
    assert paper.kd == code.kd == "logit_var"


def settings_of(study, cell, *chosen):
    """Return the settings of a study's cell and the names of what its command sets."""
    cells = read_study(study)
    words = [*cells.words(cells.find(cell).command, Path("teachers")), *chosen]
    config = effective(parse(words))
    return config, [*parse(words).settings]


def test_masks_of_ones_own_are_learnt_with_the_settings_of_the_study():
    chosen = ("--method-option", "critic_layers=2", "--method-option", "w_balance=1.0")
    study, names = settings_of("fediod_membrane", "FedIOD", *chosen)
    config = RunConfig.make("fediod", data="segmentation")
    names = [name for name in names if name not in ("partition", "public_samples", "teachers", "eval_every")]
    assert {name: getattr(config, name) for name in names} == {name: getattr(study, name) for name in names}
    assert config.options == study.options


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_data_of_ones_own_are_learnt_with_the_settings_of_the_study(data):
    """docs/fediod.md's figures are what `fediod --data mnist` is about.

    The published settings are presets.
    """
    cell = {"mnist": "MNIST 0.1: FedIOD", "cifar10": "CIFAR-10 0.1: FedIOD"}[data]
    chosen = ("--method-option", "critic_lr=0.0002", "--method-option", "disc_weight=false")
    study, _ = settings_of("fediod_rivals", cell, *chosen)
    config = RunConfig.make("fediod", data=data)
    names = ("rounds", "lr", "batch_size", "momentum", "weight_decay", "model", "width", "local_epochs")
    assert {name: getattr(config, name) for name in names} == {name: getattr(study, name) for name in names}
    assert config.options == study.options
    for preset in ("paper", "code"):
        options = RunConfig.make("fediod", data=data, options={"preset": preset}).options
        assert (options["batch"], options["ngf"], options["ndf"], options["student_steps"]) == (64, 64, 128, 5)
        assert (options["generator_lr"], options["student_lr"], options["warmup"]) == (1e-4, 5e-3, 0)


@pytest.mark.parametrize("data", ["digits", "segdigits"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_is_named_overrules_the_defaults_of_a_data_set(preset, data):
    options = RunConfig.make("fediod", data=data, options={"preset": preset}).options
    assert {name: options[name] for name in PRESETS[preset]} == PRESETS[preset]
    usual = RunConfig.make("fediod", data=data).options
    rest = set(options) - set(PRESETS[preset]) - {"preset"}
    assert {name: options[name] for name in rest} == {name: usual[name] for name in rest}
    own = RunConfig.make("fediod", data=data, options=[f"preset={preset}", "w_real=3"]).options
    assert own == {**options, "w_real": 3.0}


def test_the_config_says_what_the_preset_settles(tmp_path):
    config = RunConfig.make("fediod", data="digits")
    assert (config.options["w_real"], config.options["w_clear"], config.options["mix"]) == (8.0, 1.0, "log_probs")
    assert RunConfig.of(read_settings(config.to_toml())) == config


@pytest.mark.parametrize(("options", "words"), [
    ({"select": "best", "holdout": 0.0}, "needs a hold-out"),
    ({"diversity": "jds"}, "Did you mean|must be one of"),
    ({"js_sign": 0}, "one of -1, 1"),
    ({"models": "resnet9"}, 'no model "resnet9"'),
])  # fmt: skip
def test_what_options_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        FedIOD(FedIOD.Options(**options))
