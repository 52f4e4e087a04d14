"""Images from an ensemble: the losses are as declared, and only the generator and its noise change."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fedkern import models
from fedkern.errors import UserError
from fedkern.methods.common.oneshot_synthesis import (
    BatchNormStatistics,
    Synthesis,
    _Moments,
    divergence,
    frozen,
    synthesise,
)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(count=2):
    made = [models.build("cnn", classes=3, channels=1, image_size=8, seed=k, width=2) for k in range(count)]
    for k, network in enumerate(made):
        network.train()
        with torch.no_grad():
            network(3 * torch.randn(32, 1, 8, 8, generator=draw(k)))  # running statistics other than the initial ones
    return made


@pytest.fixture
def teachers():
    return models.Ensemble(networks())


def generator(seed=0):
    return models.Generator(nz=6, ngf=2, channels=1, image_size=8, generator=draw(seed))


def how(**settings):
    return Synthesis(**{"steps": 4, "size": 12, "lr": 1e-2, **settings})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_torchs_in_both_passes(layout):
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=draw()).to(memory_format=layout)
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(_Moments.apply(x), (mean, variance))
    assert torch.autograd.gradcheck(_Moments.apply, x.requires_grad_())


def test_distance_to_running_statistics(teachers):
    x = torch.randn(5, 1, 8, 8, generator=draw())
    expected = torch.zeros(())
    for member in teachers.members:
        h = x
        for stage in (member.layer1, member.layer2, member.layer3):
            h = stage[0](h)
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            expected = expected + (mean - stage[1].running_mean).norm() + (var - stage[1].running_var).norm()
            h = stage[3](stage[2](stage[1](h)))
    with BatchNormStatistics(teachers.members) as statistics:
        teachers.logits(x.clone().requires_grad_())
        torch.testing.assert_close(statistics.take(), expected / 2)
        assert statistics.take() == 0.0
    teachers.logits(x.clone().requires_grad_())
    assert statistics.take() == 0.0  # the hooks are gone


def test_statistics_are_matched_by_the_data_themselves():
    network = networks(1)[0]
    bn = network.layer1[1]
    x = torch.randn(64, 1, 8, 8, generator=draw(7))
    h = network.layer1[0](x).detach()
    bn.running_mean.copy_(h.mean((0, 2, 3)))
    bn.running_var.copy_(h.var((0, 2, 3), unbiased=False))
    with torch.no_grad(), BatchNormStatistics([network.layer1]) as statistics:
        network.eval().layer1(x)
        assert float(statistics.take()) < 1e-5


def test_divergence_counts_the_boundary_alone():
    t = torch.tensor([[[3.0, 0, 0], [0, 2.0, 0]], [[1.0, 0, 0], [0, 4.0, 0]]])
    s = torch.tensor([[2.0, 0, 0], [1.0, 0, 0]])
    weights = torch.tensor([0.5, 0.5])
    p, q = t.mean(0).softmax(1), s.softmax(1)
    rows = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(s, t, weights), rows[1] / 2)  # they agree on the first image
    assert divergence(t.mean(0), t, weights) == 0
    by_class = torch.tensor([[[0.25, 0.5, 1.0]], [[0.75, 0.5, 0.0]]])
    p = torch.tensor([[1.5, 0, 0], [0, 3.0, 0]]).softmax(1)
    rows = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(s, t, by_class), rows[1] / 2)


def test_teachers_and_student_stay_as_they_are(teachers):
    student = networks(3)[2].train()
    before = copy.deepcopy([teachers.state_dict(), student.state_dict()])
    synthesise(generator(), teachers, student, how(), draw(), 3)
    for module, state in zip((teachers, student), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert student.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(p.grad is None for p in teachers.parameters())


def test_images_come_to_look_like_their_labels(teachers):
    for member in teachers.members:
        member.head.weight.mul_(5)  # opinions, as after training
    settings = how(steps=40, batch_norm=0.0, size=30)
    made, labels = synthesise(generator(), teachers, None, settings, draw(1), 3)
    raw, _ = synthesise(generator(), teachers, None, how(steps=1, size=30), draw(1), 3)
    assert made.shape == (30, 1, 8, 8)
    with torch.no_grad():
        assert F.cross_entropy(teachers(made), labels) < 0.8 * F.cross_entropy(teachers(raw), labels)


def test_statistics_and_divergence_pull_where_they_should(teachers):
    student = networks(3)[2].eval()
    with torch.no_grad():
        student.head.weight.neg_()  # it disagrees with the teachers

    def figures(**settings):
        made, _ = synthesise(generator(), teachers, student, how(steps=30, cross_entropy=0.0, **settings), draw(2), 3)
        with BatchNormStatistics(teachers.members) as statistics, torch.no_grad():
            t = torch.stack([m(made) for m in teachers.members])
            return float(statistics.take()), float(divergence(student(made), t, teachers.weights))

    near, _ = figures(batch_norm=1.0, adversarial=0.0)
    far, adversarial = figures(batch_norm=0.0, adversarial=1.0)
    _, plain = figures(batch_norm=0.0, adversarial=0.0)
    assert near < far
    assert adversarial > plain > 0


def test_same_stream_same_images(teachers):
    before = torch.random.get_rng_state()
    a = synthesise(generator(), teachers, None, how(), draw(3), 3)
    b = synthesise(generator(1), teachers, None, how(), draw(3), 3)  # restarted, so its first weights do not matter
    c = synthesise(generator(1), teachers, None, how(restart=False), draw(3), 3)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_student_and_a_generator_that_diverge_are_named(teachers):
    student = networks(1)[0]
    torch.nn.init.constant_(student.head.bias, float("inf"))
    with pytest.raises(UserError, match="The student diverged: lower the method option distill_lr"):
        synthesise(generator(), teachers, student, how(), draw(), 3)
    torch.nn.init.constant_(teachers.members[0].head.bias, float("nan"))
    with pytest.raises(UserError, match="lower the method option generator_lr"):
        synthesise(generator(), teachers, None, how(), draw(), 3)


def test_frozen_gives_back_what_it_found():
    network = networks(1)[0].train()
    network.head.weight.requires_grad_(False)
    with frozen(network):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert network.training
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["head.weight"]
