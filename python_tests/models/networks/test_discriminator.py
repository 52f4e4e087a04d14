"""FedIOD's patch discriminators: sizes, and K side by side against K one by one."""

import pytest
import torch

from fedkern import models
from fedkern.models.networks.discriminator import PatchDiscriminators, receptive_field, whole_image


def draws(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_published_sizes():
    network = PatchDiscriminators(draws(0))
    # two 4x4 convolutions, the first with a bias, batch norm, the 1x1 convolution with its bias
    assert sum(p.numel() for p in network.parameters()) == 16 * 3 * 128 + 128 + 16 * 128 * 256 + 512 + 256 + 1
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 0.53
    assert network(torch.randn(2, 3, 32, 32)).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("own", [False, True], ids=["shared images", "own images"])
def test_side_by_side_is_one_by_one(own, layers):
    together = PatchDiscriminators(draws(1, 2, 3), channels=1, ndf=3, layers=layers).double()
    single = [PatchDiscriminators(draws(seed), channels=1, ndf=3, layers=layers).double() for seed in (1, 2, 3)]
    images = torch.randn(*((3,) if own else ()), 4, 1, 12, 16, dtype=torch.float64, generator=draws(9)[0])
    images.requires_grad_()
    patches = together(images)
    for k, network in enumerate(single):
        expected = network(images[k] if own else images)[0]
        torch.testing.assert_close(patches[k], expected)
        (ours,) = torch.autograd.grad(patches[k].square().sum(), images, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected.square().sum(), images, retain_graph=True)
        torch.testing.assert_close(ours, theirs)
        for name, part in together.parts()[k].items():
            assert torch.equal(part, getattr(network, name))


@pytest.mark.parametrize("layers", [2, 3])
def test_what_a_logit_sees(layers):
    """These pixels move the middle logit, when batch norm does not look at the whole image."""
    module = PatchDiscriminators(draws(1), channels=1, ndf=2, layers=layers).double()
    for number in range(2, layers + 1):
        module.get_parameter(f"conv{number}").data.abs_()  # nothing cancels
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64, generator=draws(2)[0]).requires_grad_()
    original, torch.nn.functional.batch_norm = torch.nn.functional.batch_norm, lambda x, *_, **__: x
    try:
        patches = module(image)
    finally:
        torch.nn.functional.batch_norm = original
    middle = patches.shape[-1] // 2
    (reached,) = torch.autograd.grad(patches[0, 0, middle, middle], image)
    assert int(reached.abs().sum(2).gt(0).sum()) == receptive_field(layers)


def test_layers_that_see_a_whole_image():
    assert [whole_image(side, side) for side in (4, 8, 10, 11, 22, 28, 32, 46, 47)] == [2, 2, 2, 3, 3, 4, 4, 4, 5]
    assert whole_image(8, 64) == 3  # a further one would leave less than a pixel of the height
    module = PatchDiscriminators(draws(0), channels=1, ndf=2, layers=5)
    assert module(torch.randn(2, 1, 32, 32)).shape == (1, 2, 1, 1)
    assert [getattr(module, f"conv{i}").shape[0] for i in range(2, 6)] == [4, 8, 16, 16]


def test_parts_are_views_that_training_changes():
    module = PatchDiscriminators(draws(1, 2), channels=1, ndf=2)
    module.parts()[1]["conv2"].zero_()
    assert module.conv2[:4].any()
    assert not module.conv2[4:].any()


def test_teacher_of_the_paper():
    """FedIOD's ResNet-8 has 4.91 million parameters at ten classes, and 2,048 features."""
    model = models.build("resnet8-t", classes=10, channels=3, image_size=32, seed=0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 4.91
    assert model.head.in_features == 2048
    small = models.build("resnet8-t", classes=4, channels=1, image_size=28, seed=0, width=2).eval()
    x = torch.randn(2, 1, 28, 28)
    maps = small.layer3[0](small.stages(x, "layer2"))
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1)
    assert torch.equal(small.features(x), expected)
