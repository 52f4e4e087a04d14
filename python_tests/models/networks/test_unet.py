"""U-Net: sizes, any image size, receptive field, initialisation, learning."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedkern import models


def make(name="unet-small", *, classes=3, channels=3, width=None, seed=0):
    return models.build(name, classes=classes, channels=channels, image_size=32, seed=seed, width=width)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_parameters(width, depth, channels, classes):
    """Count two convolutions and norms at every size down and up, the up-convolutions, and the head."""
    widths = [width * 2**i for i in range(depth + 1)]
    total = width * classes + classes
    for before, w in zip([channels, *widths], widths, strict=False):
        total += 9 * before * w + 9 * w * w + 4 * w
    for w in widths[:-1]:
        total += 4 * 2 * w * w + w + 9 * 2 * w * w + 9 * w * w + 4 * w
    return total


def test_it_has_the_published_size():
    """The sizes are those of public implementations, at the paper's width and depth."""
    assert parameters(make("unet", width=64, classes=2)) == 31_037_698
    assert parameters(make("unet", classes=11)) == count_parameters(16, 4, 3, 11) == 1_942_747
    assert parameters(make(classes=11)) == count_parameters(8, 3, 3, 11) == 121_267
    assert parameters(models.UNet(classes=2, channels=4, width=6, depth=2)) == count_parameters(6, 2, 4, 2)


@pytest.mark.parametrize("size", [(32, 32), (13, 21), (8, 40), (7, 7)])
@pytest.mark.parametrize("channels", [1, 4])
def test_logits_have_the_size_of_the_image(size, channels):
    model = make(channels=channels).eval()
    x = torch.randn(2, channels, *size)
    features = model.features(x)
    assert features.shape == (2, model.width, *size)
    assert model(x).shape == (2, 3, *size)
    torch.testing.assert_close(model.head(features), model(x))
    # The edges are continued on the right and at the bottom, and what is computed there is cut off again.
    padded = torch.nn.functional.pad(x, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
    torch.testing.assert_close(model(padded)[:, :, : size[0], : size[1]], model(x))


@pytest.mark.parametrize(("name", "training"), [("unet", False), ("unet-small", True), ("unet-small-gn", False)])
def test_a_traced_graph_takes_images_of_any_size(name, training):
    model = make(name, width=4).train(training)
    graph = torch.fx.symbolic_trace(model)
    for size in ((16, 32), (13, 21)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)


def test_layout_does_not_change_the_result():
    model, x = make().eval(), torch.randn(2, 3, 20, 12)
    expected = model(x)
    last = torch.channels_last
    torch.testing.assert_close(model.to(memory_format=last)(x.to(memory_format=last)), expected, rtol=1e-4, atol=1e-5)


def test_every_size_reaches_every_pixel():
    """The shortcut reaches a pixel's own position, the bottom a wide area around it."""
    model = make().double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, 0, 32, 32], x)
    seen = gradient[0].abs().sum(0) > 0
    assert seen[28:37, 28:37].all()
    assert seen.sum() > 45 * 45


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    weights = make(seed=3).state_dict()
    torch.manual_seed(2)
    again, reseeded = make(seed=3).state_dict(), make(seed=4).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["head.weight"], reseeded["head.weight"])
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert make(width=64)(torch.randn(2, 3, 32, 32)).detach().std() < 2


def test_it_learns_where_an_object_is():
    model = make(classes=2, width=4)
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(8, 16, 16, dtype=torch.int64)
    labels[:, 4:10, 5:12] = 1
    x = torch.randn(8, 3, 16, 16, generator=generator) + 2 * labels[:, None]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
