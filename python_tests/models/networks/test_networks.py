"""Networks that fedkern brings: transformers, generator, patch discriminators, and U-Net."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedkern import models, ops
from fedkern.models import Generator
from fedkern.models.networks.attention import TransformerLayer, token_rows, unpack
from fedkern.models.networks.discriminator import PatchDiscriminators, receptive_field, whole_image
from fedkern.models.networks.vit import Encoder, PatchEmbedding, patch_size


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(16, 1), (256, 4)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_first_token_is_that_of_the_whole_layer(norm_first, width, heads, masked):
    generator = torch.Generator().manual_seed(0)
    layer = TransformerLayer(width, norm_first=norm_first).double()
    assert layer.heads == heads
    for parameter in layer.parameters():  # biases that are not zero
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / width**0.5
    tokens = torch.randn(3, 7, width, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]]) if masked else None
    full, token = layer(tokens, mask)[:, 0], layer.first_token(tokens, mask)
    assert torch.allclose(token, full, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(full.shape, generator=generator, dtype=torch.float64)
    inputs = [tokens, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream, True) for x in (full, token)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    if masked:
        rows = token_rows(mask)
        packed = unpack(layer(tokens.flatten(0, 1)[rows], mask, rows), mask, rows)
        assert torch.allclose(packed, mask[..., None] * layer(tokens, mask), rtol=1e-12, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (full, packed[:, 0])), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_tokens_are_packed_only_where_their_number_may_be_read():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert token_rows(mask).tolist() == [0, 1, 3]
    assert token_rows(mask[:, :1]) is token_rows(mask.to("meta")) is None
    torch.vmap(lambda part: part if token_rows(part) is None else None)(mask[None])
    assert torch.compile(lambda x: x if token_rows(mask) is None else None, backend="eager")(mask) is not None
    with ops.use_backend("reference"):
        assert token_rows(mask) is None


# -- vit ---------------------------------------------------------------------------------------------------------------


def test_a_layer_is_pytorchs():
    torch.manual_seed(0)
    ours = Encoder(192).double().eval()
    theirs = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True).double().eval()
    pairs = {
        "self_attn.in_proj_": ours.qkv, "self_attn.out_proj.": ours.project, "linear1.": ours.widen,
        "linear2.": ours.narrow, "norm1.": ours.norm1, "norm2.": ours.norm2,
    }  # fmt: skip
    with torch.no_grad():
        for name, layer in pairs.items():
            for kind in ("weight", "bias"):
                theirs.get_parameter(name + kind).copy_(getattr(layer, kind).normal_())
    x = torch.randn(2, 192, 3, 5, dtype=torch.float64)
    expected = theirs(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


def test_positions_are_interpolated_for_another_shape():
    embed = PatchEmbedding(1, 4, 2, 4)
    embed.initialise(torch.Generator().manual_seed(0))
    nn.init.zeros_(embed.project.weight)
    nn.init.zeros_(embed.project.bias)
    assert torch.equal(embed(torch.zeros(1, 1, 8, 8)), embed.position)
    assert embed(torch.zeros(2, 1, 8, 12)).shape == (2, 4, 4, 6)


@pytest.mark.parametrize(("size", "tokens"), [(8, 4), (28, 7), (32, 8), (64, 16), (224, 14)])
def test_tokens_per_side(size, tokens):
    assert size // patch_size(size) == tokens


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (136, 2), (135, 1), (86, 1), (13, 1)])
def test_heads_divide_the_width(width, heads):
    model = models.build("vit-tiny", classes=2, channels=3, image_size=8, seed=0, width=width)
    assert model.layer1[1].heads == heads


# -- generator ---------------------------------------------------------------------------------------------------------


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [8, 28, 32, 33, 64, (28, 36)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size(size, channels):
    generator = Generator(nz=5, ngf=2, channels=channels, image_size=size, generator=draw()).train()
    images = generator(torch.randn(3, 5, generator=draw()))
    assert images.shape == (3, channels, *((size, size) if isinstance(size, int) else size))
    assert 0 < images.min() <= images.max() < 1


def test_published_sizes_of_the_generator():
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


# -- discriminator -----------------------------------------------------------------------------------------------------


def draws(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_published_sizes_of_the_discriminators():
    network = PatchDiscriminators(draws(0))
    # two 4x4 convolutions, the first with a bias, batch norm, the 1x1 convolution with its bias
    assert count(network) == 16 * 3 * 128 + 128 + 16 * 128 * 256 + 512 + 256 + 1
    assert round(count(network) / 1e6, 2) == 0.53
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


# -- unet --------------------------------------------------------------------------------------------------------------


def make(name="unet-small", *, classes=3, channels=3, width=None, seed=0):
    return models.build(name, classes=classes, channels=channels, image_size=32, seed=seed, width=width)


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
    assert count(make("unet", width=64, classes=2)) == 31_037_698
    assert count(make("unet", classes=11)) == count_parameters(16, 4, 3, 11) == 1_942_747
    assert count(make(classes=11)) == count_parameters(8, 3, 3, 11) == 121_267
    assert count(models.UNet(classes=2, channels=4, width=6, depth=2)) == count_parameters(6, 2, 4, 2)


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
