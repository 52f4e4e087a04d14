"""Networks: sizes, stages, initialisation, group norm, and the cost of a step."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedkern import models
from fedkern.errors import UserError
from fedkern.models import build
from fedkern.models import cost as module
from fedkern.models.cost import count_flops, measure_cost
from fedkern.models.networks.resnet import BasicBlock
from fedkern.models.users.cutting import find_cut

NAMES = tuple(name for name, entry in models.MODELS.items() if entry.gives == "classes")


def make(name: str, *, channels: int = 3, image_size: int = 32, classes: int = 10, seed: int = 0, **options):
    return models.build(name, classes=classes, channels=channels, image_size=image_size, seed=seed, **options)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet18_has_the_published_size():
    model = make("resnet18")
    assert parameters(model) == 11_173_962
    assert sum(b.numel() for b in model.buffers() if b.is_floating_point()) == 9_600
    assert model.width == 512


def test_mobile_networks_have_the_published_size():
    """The sizes are those of other implementations, with a head of ten classes."""
    for name, size in (("mobilenetv2", 2_236_682), ("efficientnet-b0", 4_020_358)):
        model = make(name)
        assert parameters(model) == size
        assert parameters(make(name, image_size=96)) == size
        assert model.width == 1280


def test_mobile_networks_keep_enough_positions():
    """Method notes 5.5: fewer strides for 32 pixels, the papers' strides for large images."""
    for name, small, large in (("mobilenetv2", 4, 3), ("efficientnet-b0", 2, 3)):
        with torch.no_grad():
            assert make(name, width=8).eval().stages(torch.zeros(1, 3, 32, 32), "layer7").shape[2:] == (small, small)
            model = make(name, width=8, image_size=96).eval()
            assert model.stages(torch.zeros(1, 3, 96, 96), "layer7").shape[2:] == (large, large)


def test_a_mobile_network_learns_at_a_small_width():
    """Every layer gets a gradient, also gates and depthwise convolutions, and the loss falls."""
    for name in ("mobilenetv2", "efficientnet-b0"):
        model = make(name, width=4, image_size=16, classes=4).to(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(4)
        labels = torch.arange(16) % 4
        x = torch.randn(16, 3, 16, 16, generator=generator) + labels[:, None, None, None]
        optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
        losses = []
        for _ in range(6):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            optimiser.zero_grad()
            loss.backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
            assert all(bool(p.grad.any()) for p in model.parameters() if p.dim() > 1)
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], name


def test_small_models_have_the_documented_size():
    assert parameters(make("cnn")) == 94_762
    assert parameters(make("resnet8")) == 78_042
    assert make("resnet8", width=128).width == 512


def test_the_other_networks_have_the_documented_size():
    assert parameters(make("resnet10")) == 4_903_242
    assert parameters(make("vit-tiny")) == 5_362_378
    assert parameters(make("mlp")) == 3072 * 256 + 2 * 256 * 256 + 3 * 512 + 2570


def test_the_example_of_vgg16_is_cut_between_its_stages():
    vgg = runpy.run_path(str(Path(__file__).parents[2] / "examples/vgg16.py"))["VGG"]
    assert parameters(vgg(10)) == 14_724_042
    assert find_cut(vgg(10, width=4), torch.randn(2, 3, 32, 32)).maps == 5


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_stage_and_tail_compose_to_features(name, channels, size):
    model = make(name, channels=channels, image_size=size).eval()
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    features = model.features(x)
    assert features.shape == (3, model.width)
    assert model(x).shape == (3, 10)
    assert torch.equal(model(x), model.head(features))
    for stage in model.stage_names:
        h = model.stages(x, upto=stage)
        assert h.ndim == (2 if stage == "feature" else 4)
        assert torch.equal(model.tail(h, after=stage), features)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_mixing_the_last_map_is_mixing_features(name):
    """Method notes 1.5: pooling is linear, so only an earlier stage makes a difference."""
    model = make(name, width=16).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    background = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    alpha = 0.6
    # With the initial running statistics a deep network's maps may be so small that every layer is as good as linear.
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(x)
    model.eval()

    def mix(stage: str) -> torch.Tensor:
        own, mate = model.stages(x, stage), model.stages(background, stage)
        return model.tail(alpha * own + (1 - alpha) * mate, stage)

    last = model.stage_names[-2]
    torch.testing.assert_close(mix(last), mix("feature"), rtol=1e-12, atol=1e-12)
    earlier = models.resolve_stage(model, "map")
    assert (mix(earlier) - mix("feature")).abs().max() > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_initialisation_leaves_the_global_generator_alone(name):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model = make(name, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again, reseeded = make(name, seed=5), make(name, seed=6)
    for (key, a), b, c in zip(
        model.state_dict().items(), again.state_dict().values(), reseeded.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
        assert torch.isfinite(a).all()
        if a.ndim > 1:
            assert not torch.equal(a, c), key


def test_a_generator_can_be_given():
    a = make("cnn", seed=torch.Generator().manual_seed(3))
    b = make("cnn", seed=torch.Generator().manual_seed(3))
    assert torch.equal(a.head.weight, b.head.weight)


def test_initial_scale():
    model = make("resnet18")
    weight = model.layer2[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert model.head.weight.abs().max().item() <= 1 / 512**0.5
    depthwise = make("mobilenetv2").layer5[0].layers[3].weight
    assert depthwise.shape[1] == 1
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    bn = model.layer2[0].bn1
    for values, start in ((bn.weight, 1), (bn.bias, 0), (bn.running_var, 1), (bn.running_mean, 0)):
        assert values.eq(start).all()
    assert int(bn.num_batches_tracked) == 0


def test_an_unknown_layer_is_not_left_uninitialised():
    with pytest.raises(TypeError, match="PReLU"):
        models.initialise(torch.nn.Sequential(torch.nn.PReLU(3)), torch.Generator())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_channels_last_keeps_the_layout_and_the_result(name):
    model = make(name).eval()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    h = last.stages(x.contiguous(memory_format=torch.channels_last), "layer2")
    assert h.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_pooling_is_channels_last():
    model = make("cnn", width=4)
    h = torch.randn(2, 4, 4, 16).permute(0, 3, 1, 2).requires_grad_()
    features = model.tail(h, after="layer3")
    torch.testing.assert_close(features, h.mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(features.sum(), h)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_stem_follows_the_image_size():
    cifar, large = make("resnet18", image_size=64), make("resnet18", image_size=224)
    assert cifar.layer1[0].kernel_size == (3, 3)
    assert large.layer1[0].kernel_size == (7, 7)
    assert parameters(large) == 11_173_962 + (49 - 9) * 3 * 64
    with torch.no_grad():
        assert large.eval().stages(torch.zeros(1, 3, 224, 224), "layer4").shape == (1, 512, 7, 7)


def test_map_is_the_last_stage_but_one():
    assert models.resolve_stage(make("resnet18"), "map") == "layer3"
    assert models.resolve_stage(make("cnn"), "map") == "layer2"
    assert models.resolve_stage(make("cnn"), "feature") == "feature"


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r'no model "resnet-8".*Did you mean "resnet8"'):
        make("resnet-8")
    with pytest.raises(UserError, match=r'no stage "layer4".*layer3'):
        models.resolve_stage(make("cnn"), "layer4")
    with pytest.raises(ValueError, match="layer1, layer2, layer3, feature"):
        make("cnn").stages(torch.zeros(1, 3, 32, 32), upto="map")
    with pytest.raises(UserError, match="at least 8 pixels"):
        make("cnn", image_size=7)
    with pytest.raises(UserError, match="classes must be at least 1"):
        make("cnn", classes=0)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", models.MODELS)
def test_the_smallest_image_passes(name):
    entry = models.MODELS[name]
    model = make(name, image_size=entry.smallest)
    positions = () if entry.gives == "classes" else (entry.smallest,) * 2
    assert model(torch.randn(2, 3, entry.smallest, entry.smallest)).shape == (2, 10, *positions)


def test_narrow_shortcut_is_the_strided_convolution():
    block, x = BasicBlock(7, 14, stride=2).eval(), torch.randn(3, 7, 9, 8)
    plain = nn.Sequential(nn.Conv2d(7, 14, 1, stride=2, bias=False), nn.BatchNorm2d(14))
    assert list(block.shortcut.state_dict()) == list(plain.state_dict())
    weight, norm = block.shortcut.get_parameter("0.weight"), block.shortcut.get_submodule("1")
    assert torch.allclose(block.shortcut(x), norm(nn.functional.conv2d(x, weight, stride=2)), atol=1e-6)


@pytest.mark.exhaustive
def test_narrow_residual_networks_train_on_two_threads():
    # In a process of its own: what is tested for ends a process.
    code = (
        "import torch; from fedkern.models.networks.resnet import BasicBlock; torch.set_num_threads(2)\n"
        "block = BasicBlock(8, 16, stride=2).to(memory_format=torch.channels_last)\n"
        "for batch in (1, 3, 5, 13, 31) * 4:\n"
        "    x = torch.randn(batch, 8, 32, 32).contiguous(memory_format=torch.channels_last)\n"
        "    block(x).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- norms -------------------------------------------------------------------------------------------------------------


def make_small(name):
    return models.build(name, classes=4, channels=3, image_size=16, seed=0, width=8)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
def test_only_the_norms_differ(name):
    plain, grouped = make_small(name), make_small(f"{name}-gn")
    norms = [layer for layer in grouped.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(norms) == sum(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in grouped.modules())
    assert all(layer.num_channels // layer.num_groups >= 4 and layer.num_groups <= 32 for layer in norms)
    assert {layer.num_groups for layer in norms} != {1}
    convolutions = [[x.weight for x in m.modules() if isinstance(x, nn.Conv2d)] for m in (plain, grouped)]
    assert all(torch.equal(a, b) for a, b in zip(*convolutions, strict=True))
    images = torch.randn(4, 3, 16, 16)
    grouped.train()
    assert torch.allclose(grouped(images)[:2], grouped(images[:2]), atol=1e-5)


# -- cost --------------------------------------------------------------------------------------------------------------


COUNTED = ["cnn", "mlp", "resnet8", "resnet18", "resnet8-t", "resnet8-gn", "vit-tiny", "mobilenetv2"]


def make_counted(name):
    return build(name, classes=10, channels=3, image_size=32, seed=0, width=None if name == "vit-tiny" else 8)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_torchs(name, monkeypatch):
    images = torch.zeros(2, 3, 32, 32)
    found = measure_cost(make_counted(name), images)
    monkeypatch.setattr(module, "_PLAIN", set())  # torch counts all networks
    assert found == measure_cost(make_counted(name), images)
    assert found.training_flops > found.inference_flops > 0


def test_which_networks_are_counted_by_layers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.flop_counter", None)
    with count_flops(make_counted("resnet8")):
        pass
    for network in (make_counted("vit-tiny"), make_counted("mobilenetv2"), torch.nn.Linear(2, 2), None):
        with pytest.raises(ImportError), count_flops(network):
            pass


def test_nothing_is_counted_behind_the_end():
    network, images = make_counted("cnn"), torch.zeros(2, 3, 32, 32)
    with count_flops(network) as counted:
        network(images)
    flops = counted.flops
    network(images)
    assert counted.flops == flops > 0


def test_gradients_are_counted_where_there_are_any():
    """The first convolution is frozen, so neither its weights nor its output have a gradient."""
    images = torch.zeros(2, 3, 32, 32)
    network = make_counted("cnn")
    next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)).requires_grad_(False)
    with count_flops(network) as ours:
        network(images).sum().backward()
    with FlopCounterMode(display=False) as torchs:
        network(images).sum().backward()
    assert ours.flops == torchs.get_total_flops() > 0
