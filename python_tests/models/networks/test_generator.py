"""The generator: sizes, parameters, range, and the source of its randomness."""

import math

import pytest
import torch

from fedkern.models import Generator


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def count(generator):
    return sum(p.numel() for p in generator.parameters())


@pytest.mark.parametrize("size", [8, 28, 32, 33, 64, (28, 36)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size(size, channels):
    generator = Generator(nz=5, ngf=2, channels=channels, image_size=size, generator=draw()).train()
    images = generator(torch.randn(3, 5, generator=draw()))
    assert images.shape == (3, channels, *((size, size) if isinstance(size, int) else size))
    assert 0 < images.min() <= images.max() < 1


def test_published_sizes():
    fediod = Generator(nz=100, ngf=64, widths=(4, 2, 1), generator=draw())
    # linear and its bias, batch norm, two convolutions with batch norm, the last convolution with its bias
    assert count(fediod) == 101 * 256 * 64 + 512 + 9 * 256 * 128 + 256 + 9 * 128 * 64 + 128 + 9 * 64 * 3 + 3
    assert round(count(fediod) / 1e6, 2) == 2.03
    # 64 pixels cost a doubling, not a larger linear map
    assert (
        Generator(image_size=64, generator=draw()).project.weight.shape
        == Generator(generator=draw()).project.weight.shape
    )


def test_normalised_by_the_datas_statistics():
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.5, 0.4)
    plain, own = Generator(nz=4, ngf=2, generator=draw()), Generator(nz=4, ngf=2, mean=mean, std=std, generator=draw())
    z = torch.randn(6, 4, generator=draw())
    expected = (plain(z) - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(own(z), expected)
    assert torch.equal(own.pixels(z), plain(z))


def test_pixels_of_new_weights_lie_about_the_given_mean():
    made = Generator(ngf=8, nz=16, channels=2, image_size=12, pixel_mean=(0.1, 0.9), generator=draw())
    for seed in range(2):
        with torch.no_grad():
            mean = made.pixels(torch.randn(32, 16, generator=draw(seed))).mean((0, 2, 3))
        torch.testing.assert_close(mean, torch.tensor([0.1, 0.9]), rtol=0, atol=0.02)
        made.reset(draw(seed))
    assert Generator(nz=4, ngf=2, channels=1, generator=draw()).body[-1].bias.item() == 0
    black = Generator(nz=4, ngf=2, channels=1, pixel_mean=(0.0,), generator=draw())
    assert black.body[-1].bias.item() == pytest.approx(math.log(0.01 / 0.99))


def test_weights_come_from_the_given_generator_alone():
    before = torch.random.get_rng_state()
    a, b = Generator(nz=4, ngf=2, generator=draw(1)), Generator(nz=4, ngf=2, generator=draw(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(a.project.weight, b.project.weight)
    b.train()(torch.randn(4, 4))  # moves the running statistics
    b.reset(draw(1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_an_image_that_is_too_small_is_named():
    with pytest.raises(ValueError, match="image_size must be at least 4, not 3"):
        Generator(image_size=3, generator=draw())
