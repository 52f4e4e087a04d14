"""A bank of frozen networks: logits and input gradients are those of the single networks."""

import pytest
import torch
from torch import nn

from fedkern import models
from fedkern.models.teachers.teacher_stack import TeacherStack, fold_norms


def network(name, seed, width=4, **settings):
    made = models.build(name, classes=3, channels=2, image_size=16, seed=seed, width=width, **settings)
    generator = torch.Generator().manual_seed(seed)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return made.double().eval()


def check(networks, images):
    bank = TeacherStack(networks)
    x = images.clone().requires_grad_()
    logits = bank.logits(x)
    expected = torch.stack([teacher(x) for teacher in networks])
    torch.testing.assert_close(logits, expected)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad(logits, x, weights)
    (theirs,) = torch.autograd.grad(expected, x, weights)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(bank.logits(images), expected)
    assert all(p.grad is None for teacher in networks for p in teacher.parameters())


@pytest.fixture
def images():
    return torch.randn(5, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet8-t"])
def test_networks_of_one_architecture(name, images):
    check([network(name, seed) for seed in range(3)], images)


def test_several_architectures_in_the_order_of_the_networks(images):
    mixed = [network("cnn", 0), network("mlp", 1), network("cnn", 2), network("mobilenetv2", 3), network("cnn", 4, 2)]
    check(mixed, images)


def test_pixels_of_a_segmentation(images):
    nets = [
        models.build("unet", classes=3, channels=2, image_size=16, seed=seed, width=2).double().eval()
        for seed in (0, 1)
    ]
    assert TeacherStack(nets).logits(images).shape == (2, 5, 3, 16, 16)
    check(nets, images)


def test_folding_leaves_no_batch_norm_and_the_network_as_it_was(images):
    original = network("resnet8", 0)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    made = fold_norms(original)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in made.modules())
    assert not any(p.requires_grad for p in made.parameters())
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_a_convolution_that_is_used_twice_is_not_folded(images):
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
        check([odd], images)


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_wide_networks_write_over_their_maps(name, images):
    """Convolutions of full vectors write over their maps on the CPU, in portions too.

    Maps that others read are left alone.
    """
    portions = torch.cat([images] * 14)  # more than a portion
    check([network(name, seed, 16) for seed in (0, 1)], portions)
