"""The ensemble and a bank of frozen networks: one pass for all members gives every member's result."""

import copy
import math

import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.models import Ensemble
from fedkern.models.teachers.teacher_stack import TeacherStack, fold_norms
from fedkern.ops import use_backend


def networks(*names, classes=4, width=3):
    made = []
    for seed, name in enumerate(names):
        network = models.build(name, classes=classes, channels=3, image_size=16, seed=seed, width=width)
        g = torch.Generator().manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):  # as after training
                layer.running_mean.normal_(generator=g)
                layer.running_var.uniform_(0.5, 2, generator=g)
        made.append(network.eval())
    return made


def images(batch=5):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("names", [["resnet8"] * 3, ["cnn"] * 2, ["mlp"] * 2, ["cnn"], ["cnn", "resnet8"]])
def test_says_what_each_member_says(names):
    members = networks(*names)
    x = images()
    with torch.no_grad():
        logits = torch.stack([m(x) for m in members])
        features = torch.cat([m.features(x) for m in members], 1)
    ensemble = Ensemble(members)
    torch.testing.assert_close(ensemble.logits(x), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble.features(x), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble(x), logits.mean(0), rtol=1e-4, atol=1e-5)


def test_weights_and_order():
    members = networks("cnn", "cnn", "cnn")
    x = images()
    expected = 0.75 * members[0](x) + 0.25 * members[2](x)
    torch.testing.assert_close(Ensemble(members, [3, 0, 1])(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Ensemble(members[::-1], [1, 0, 3])(x), expected, rtol=1e-4, atol=1e-5)


class Constant(torch.nn.Module):
    """A network with the same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.head = torch.nn.Linear(1, len(logits))
        torch.nn.init.zeros_(self.head.weight)
        self.head.bias = torch.nn.Parameter(torch.tensor(logits))

    def features(self, x):
        return x.mean((1, 2, 3))[:, None]


def test_weights_by_class_by_hand():
    """The members' log-probabilities are in ln 2 and ln 3, with weights 3/4 and 1/4, 0 and 1, 1/2 and 1/2."""
    two, three = math.log(2), math.log(3)
    halved = [-two, -2 * two, -2 * two]  # of 1/2, 1/4, 1/4
    second = [-3 * two, -3 * two, three - 2 * two]  # of 1/8, 1/8, 3/4
    expected = torch.tensor([-1.5 * two, -3 * two, 0.5 * three - 2 * two]).expand(2, 3)
    for shift in (0.0, 7.0):  # a softmax does not see it, nor does the ensemble
        members = [Constant([value + shift for value in halved]), Constant(second)]
        ensemble = Ensemble(members, [[3, 0, 1], [1, 2, 1]])
        assert ensemble.weights.tolist() == [[[0.75, 0.0, 0.5]], [[0.25, 1.0, 0.5]]]
        torch.testing.assert_close(ensemble(images(2)), expected)
    nobody = Ensemble(members, [[3, 0, 0], [1, 2, 0]])
    assert nobody.weights[:, 0, 2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("names", [["cnn"] * 2, ["cnn", "resnet8"]])
def test_weights_by_class_of_networks(names):
    members, x = networks(*names), images()
    counts = torch.tensor([[3.0, 0, 1, 0], [1, 2, 1, 5]])
    log_probs = torch.stack([m(x).log_softmax(1) for m in members])
    expected = (log_probs * (counts / counts.sum(0))[:, None]).sum(0)
    ensemble = Ensemble(members, counts)
    torch.testing.assert_close(ensemble.logits(x), log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble(x), expected, rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    torch.testing.assert_close(ensemble(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="weights must be a number for each member, not by class"):
        ensemble.joint_head()


def test_stays_frozen_in_eval_mode():
    ensemble = Ensemble(networks("cnn", "cnn")).train()
    before = copy.deepcopy(ensemble.state_dict())
    assert not any(m.training for m in ensemble.modules())
    assert not any(p.requires_grad for p in ensemble.parameters())
    x = images().requires_grad_()
    ensemble(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_the_joint_head_starts_as_the_mean_of_the_logits(weights):
    members = networks("cnn", "cnn")
    plain = Ensemble(members, weights)
    joint, head = Ensemble(members, weights), plain.joint_head()
    joint.replace_head(head.weight, head.bias)
    assert set(joint.state_dict()) - set(plain.state_dict()) == {"head.weight", "head.bias"}
    torch.testing.assert_close(joint(images()), plain(images()), rtol=1e-4, atol=1e-5)
    mean = Ensemble(members, weights, pool="mean")
    w = plain.weights
    features = torch.stack([m.features(images()) for m in members]).mean(0)
    torch.testing.assert_close(mean.features(images()), features, rtol=1e-4, atol=1e-5)
    expected = w[0] * members[0].head.weight + w[1] * members[1].head.weight
    torch.testing.assert_close(mean.joint_head().weight, expected)


def test_networks_of_different_widths_have_no_mean_of_features():
    members = networks("cnn", "resnet8")
    members.append(models.build("cnn", classes=4, channels=3, image_size=16, seed=3, width=5))
    assert Ensemble(members).features(images()).shape == (5, 12 + 12 + 20)
    with pytest.raises(ValueError, match=r"equally many features, not \[12, 12, 20\]"):
        Ensemble(members, pool="mean")


# -- teacher stack -----------------------------------------------------------------------------------------------------


def network(name, seed, width=4, **settings):
    made = models.build(name, classes=3, channels=2, image_size=16, seed=seed, width=width, **settings)
    generator = torch.Generator().manual_seed(seed)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return made.double().eval()


def check(networks, bright_images):
    bank = TeacherStack(networks)
    x = bright_images.clone().requires_grad_()
    logits = bank.logits(x)
    with use_backend("reference"):
        expected = torch.stack([teacher(x) for teacher in networks])
    torch.testing.assert_close(logits, expected)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad(logits, x, weights)
    (theirs,) = torch.autograd.grad(expected, x, weights)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(bank.logits(bright_images), expected)
    assert all(p.grad is None for teacher in networks for p in teacher.parameters())


@pytest.fixture
def bright_images():
    return torch.randn(5, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet8-t"])
def test_networks_of_one_architecture(name, bright_images):
    check([network(name, seed) for seed in range(3)], bright_images)


def test_several_architectures_in_the_order_of_the_networks(bright_images):
    mixed = [network("cnn", 0), network("mlp", 1), network("cnn", 2), network("mobilenetv2", 3), network("cnn", 4, 2)]
    check(mixed, bright_images)


def test_pixels_of_a_segmentation(bright_images):
    nets = [
        models.build("unet", classes=3, channels=2, image_size=16, seed=seed, width=2).double().eval()
        for seed in (0, 1)
    ]
    assert TeacherStack(nets).logits(bright_images).shape == (2, 5, 3, 16, 16)
    check(nets, bright_images)


def test_folding_leaves_no_batch_norm_and_the_network_as_it_was(bright_images):
    original = network("resnet8", 0)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    made = fold_norms(original)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in made.modules())
    assert not any(p.requires_grad for p in made.parameters())
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_a_convolution_that_is_used_twice_is_not_folded(bright_images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x):
            y = self.conv(x)
            return self.head((self.norm(y) + y).mean((2, 3)))

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, 3)

        def forward(self, x):
            return self.head(self.norm(x if x.sum() > 0 else -x).mean((2, 3)))

    for kind in (Twice, Untraceable):
        odd = kind().double().eval()
        assert isinstance(fold_norms(odd).norm, nn.BatchNorm2d)
        check([odd], bright_images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_wide_networks_in_portions(name, dtype, bright_images):
    """conv_norm computes the networks in fp32, and folded convolutions those in fp64."""
    portions = torch.cat([bright_images] * 52).to(dtype)  # more than a portion
    check([network(name, seed, 16).to(dtype) for seed in (0, 1)], portions)
