"""Networks run convolution, norm, ReLU and pooling by one operator, or layer by layer if something is in the way."""

import copy
import functools
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from fedkern import models, ops
from fedkern.models.blocks import cut_network
from fedkern.models.cost import count_flops
from fedkern.models.networks import conv_norm_layers
from fedkern.models.networks.conv_norm_layers import ConvSequential, run_conv_norm
from fedkern.models.teachers.teacher_stack import fold_norms

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture
def calls(monkeypatch):
    """Return the settings of later calls of the operator.

    The operator takes ordinary tensors of any size meanwhile.
    """
    found: list[dict[str, object]] = []

    def run(_, inputs, settings):
        *four, _, residual = inputs
        mean, variance, *values = settings
        found.append(dict(zip(settings._fields[2:], values, strict=True)))
        return ops.conv_norm(*four, mean, variance, residual=residual, **found[-1])

    def serving(inputs, _):
        x = inputs.x
        return (type(x) is Tensor and x.dim() == 4 and not torch.is_autocast_enabled("cpu")) or None

    monkeypatch.setattr(conv_norm_layers, "compute_conv_norm", run)
    monkeypatch.setattr(conv_norm_layers, "choose_norm_kernels", serving)
    return found


def stage(*, relu: bool = True, pool: bool = True, **norm) -> ConvSequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, **norm)]
    if relu:
        layers.append(nn.ReLU())
    if pool:
        layers.append(nn.MaxPool2d(2))
    made = ConvSequential(*layers)
    for tensor in (*made[1].parameters(), *made[1].buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return made


def images(*shape: int) -> Tensor:
    x = torch.randn(shape or (4, 3, 9, 8), generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def learnt(module: nn.Module, run=None) -> dict[str, Tensor]:
    """Return the result, gradients and state after two batches."""
    found: dict[str, Tensor] = {}
    for i in range(2):
        x = images().mul_(i + 1).requires_grad_()
        y = (run or module)(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(i)))
        found |= {f"result {i}": y.detach(), f"gradient {i}": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | module.state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


def plain(module: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*copy.deepcopy(module))


NORMS = {
    "train": {},
    "cumulative average": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "eps": {"eps": 0.3, "momentum": 0.7},
}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen statistics", "only the batch's", "evaluated by the batch's"])
@pytest.mark.parametrize("norm", NORMS)
def test_batch_norm_does_what_torchs_does(norm, mode, calls):
    module = stage(**NORMS[norm])
    if mode == "eval":
        module.eval()
    elif mode == "frozen statistics":
        module[1].eval()
    elif mode == "only the batch's":
        module[1].track_running_stats = False
    elif mode == "evaluated by the batch's":  # as fedkern's engine does
        module.eval()[1].track_running_stats, module[1].training = False, True
    expected = learnt(plain(module))
    same(learnt(module), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
def test_layers_behind_the_norm(groups, relu, pool, calls):
    module = stage(relu=relu, pool=pool)
    if groups:
        module[1] = nn.GroupNorm(groups, 8, eps=0.3)
    expected = learnt(plain(module))
    same(learnt(module), expected)
    assert [(call["groups"], call["relu"], call["pool"]) for call in calls] == [(groups, relu, 1 + pool)] * 2


def test_a_residual(calls):
    module, residual = stage(pool=False), images(4, 8, 9, 8)
    conv, norm, relu = plain(module)
    expected = learnt(nn.Sequential(conv, norm), lambda x: relu(norm(conv(x)) + residual))
    for activation in (module[2], F.relu):
        layers = copy.deepcopy(module[:2])
        run = functools.partial(run_conv_norm, conv=layers[0], norm=layers[1], relu=activation, residual=residual)
        same(learnt(layers, run), expected)
    assert len(calls) == 4


def test_layers_in_between_run_as_they_are(calls):
    block, second = stage(), stage(relu=False, pool=False)
    second[0] = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    between = nn.Identity(), nn.Dropout(0.0), nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)
    module = ConvSequential(between[0], *block, *second, nn.GELU(), *between[1:], nn.Conv2d(2, 2, 3, padding=1))
    expected = learnt(plain(module))
    same(learnt(module), expected)
    assert [(call["relu"], call["pool"]) for call in calls] == [(True, 2), (False, 1)] * 2


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def derive(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class derived from a layer's that doubles the layer's results."""
    return type(f"Own{kind.__name__}", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def add_hook(position: int, kind: str):
    def change(module: nn.Sequential) -> None:
        layer, name = module[position], f"register_{kind}_hook"
        hooks = {
            "forward": lambda layer, inputs, output: 2 * output,
            "forward_pre": lambda layer, inputs: (inputs[0] + 1,),
            "full_backward": lambda layer, into, out: (None if into[0] is None else 3 * into[0],),
            "full_backward_pre": lambda layer, out: (3 * out[0],),
        }
        getattr(layer, name)(hooks[kind])

    return change


def replace_layer(position: int, layer: nn.Module):
    return lambda module: module.__setitem__(position, copy.deepcopy(layer))


def group_channels(module: nn.Sequential) -> None:
    module[0], module[1] = nn.Conv2d(3, 9, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(9)


def set_at(position: int, **attributes):
    return lambda module: [setattr(module[position], name, value) for name, value in attributes.items()]


def raw_weight(module: nn.Sequential) -> None:
    weight = module[0].weight.detach()
    del module[0].weight
    module[0].weight = weight


KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")
HOOKED = {f"{kind} hook of layer {position}": add_hook(position, kind) for position in range(4) for kind in KINDS}
IN_THE_WAY = {
    **HOOKED,
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Scaled()),
    "parametrized norm": lambda m: nn.utils.parametrize.register_parametrization(m[1], "bias", Scaled()),
    "weight norm": lambda m: parametrizations.weight_norm(m[0]),
    "spectral norm": lambda m: nn.utils.spectral_norm(m[0]),
    "pruning": lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5),
    "a weight that is no parameter": raw_weight,
    "forward of its own": lambda m: set_at(0, forward=lambda x: x[:, :1].expand(-1, 8, -1, -1))(m),
    "stride": set_at(0, stride=(2, 1)),
    "padding": set_at(0, padding=(2, 2)),
    "padding by name": set_at(0, padding="valid"),
    "dilation": set_at(0, dilation=(2, 1)),
    "padding mode": replace_layer(0, nn.Conv2d(3, 8, 3, padding=1, bias=False, padding_mode="circular")),
    "bias": replace_layer(0, nn.Conv2d(3, 8, 3, padding=1)),
    "5x5": replace_layer(0, nn.Conv2d(3, 8, 5, padding=1, bias=False)),
    "groups": group_channels,
    "instance norm": replace_layer(1, nn.InstanceNorm2d(8, affine=True)),
    "another activation": replace_layer(2, nn.ELU()),
    "a class of one's own": replace_layer(2, derive(nn.ReLU)()),
    "3x3 pooling": replace_layer(3, nn.MaxPool2d(3, 2)),
    "stride of the pooling": set_at(3, stride=1),
    "padding of the pooling": set_at(3, padding=1),
    "dilation of the pooling": set_at(3, dilation=2),
    "pooling that rounds up": set_at(3, ceil_mode=True),
    "average pooling": replace_layer(3, nn.AvgPool2d(2)),
}
PARTLY = {"another activation": (False, 1), "a class of one's own": (False, 1), "average pooling": (True, 1)}
"""The operator does what stands before the other layer."""


@pytest.mark.filterwarnings("ignore:.*weight_norm|.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("way", IN_THE_WAY)
def test_layers_run_where_they_are_not_what_the_operator_serves(way, calls):
    module, layers = stage(), nn.Sequential(*stage())
    for network in (module, layers):
        torch.manual_seed(1)
        IN_THE_WAY[way](network)
    same(learnt(module), learnt(layers))
    assert [(call["relu"], call["pool"]) for call in calls] == ([PARTLY[way]] * 2 if way in PARTLY else [])


def test_pooling_that_says_where_the_maxima_are(calls):
    module = stage()
    module[3].return_indices = True
    _, indices = module(images())
    assert indices.dtype is torch.int64
    assert calls == []


def test_padding_by_its_size_alone(calls):
    module = ConvSequential(nn.Conv2d(3, 8, (3, 3), (1, 1), (1, 1), bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
    expected = learnt(plain(module))
    same(learnt(module), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("scale_and_shift", [{"affine": False}, {"bias": False}])
def test_a_norm_without_scale_and_shift(scale_and_shift, monkeypatch):
    """The real operator decides here."""
    module = stage(**scale_and_shift)
    expected = learnt(plain(module))
    monkeypatch.setattr(ops, "conv_norm", None)
    same(learnt(module), expected)


@pytest.mark.parametrize("eps", [0.0, -1e-3])
def test_an_eps_that_batch_norm_refuses_is_refused(eps, calls):
    with pytest.raises(ValueError, match="eps must be positive"):
        stage(eps=eps)(images())
    assert calls == []


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_all_modules(kind, calls):
    module, seen = stage(), []
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda layer, *_: seen.append(layer))
    try:
        module(images().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert calls == []
    assert {*seen} >= {*module}
    module(images())
    assert len(calls) == 1


def test_only_hooks_that_are_there_count(calls):
    module = stage()
    for position, kind in enumerate(KINDS):
        add_hook(position, kind)(module)
        name = f"_{kind.removeprefix('full_')}_hooks"
        getattr(module[position], name).clear()
    module.register_forward_hook(lambda module, inputs, output: output + 1)  # of the stage itself
    assert torch.allclose(module(images()), plain(module)(images()) + 1, atol=1e-5)
    assert len(calls) == 1


# -- what the operator itself refuses --------------------------------------------------------------------------------


def test_autocast_runs_the_layers(monkeypatch):
    module = stage()
    monkeypatch.setattr(ops, "conv_norm", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(images()), plain(module)(images()))


def test_per_sample_weights_run_the_layers(monkeypatch):
    module = stage().eval()
    weights = {name: torch.stack([p, 2 * p, -p]) for name, p in module.named_parameters()}
    expected = torch.stack([functional_call(plain(module), {n: w[i] for n, w in weights.items()}, images())
                            for i in range(3)])  # fmt: skip
    monkeypatch.setattr(ops, "conv_norm", None)
    x = images()
    found = vmap(lambda w: functional_call(module, w, x))(weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(lambda x: module(x).sum(dim=(1, 2, 3)))(images())
    assert jacobian.shape == (4, 4, 3, 9, 8)


def test_functional_call_uses_the_given_tensors(calls):
    module, source = stage(), stage(momentum=None)
    given = {name: value.clone() for name, value in source.state_dict().items()}
    given |= {name: 0.5 * p.detach() for name, p in module.named_parameters()}
    before = copy.deepcopy(module.state_dict())
    copied = {name: value.clone() for name, value in given.items()}
    expected = functional_call(plain(module), copied, images())
    torch.testing.assert_close(functional_call(module, given, images()), expected)
    same(given, copied)
    same(module.state_dict(), before)
    assert given["1.num_batches_tracked"] == 1
    assert len(calls) == 1


def test_a_compiler_sees_the_layers(calls):
    module = stage()
    expected = learnt(plain(module))
    same(learnt(module, torch.compile(module, backend="eager", fullgraph=True)), expected)
    assert calls == []


def test_torch_export_and_jit_trace_record_the_layers(monkeypatch):
    module = stage().eval().requires_grad_(False)
    monkeypatch.setattr(ops, "conv_norm", None)
    expected = plain(module)(images())
    for strict in (False, True):
        exported = torch.export.export(module, (images(),), strict=strict)
        assert any("conv2d" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(images()), expected)
    torch.testing.assert_close(torch.jit.trace(module, images(), check_trace=False)(images()), expected)


# -- networks --------------------------------------------------------------------------------------------------------

SERVED = {
    "cnn": 3, "cnn-gn": 3, "resnet8": 9, "resnet8-t": 9, "resnet10": 12, "resnet18": 20, "resnet8-gn": 9,
    "unet": 18, "unet-small": 14, "unet-small-gn": 14, "mlp": 0, "mobilenetv2": 0, "efficientnet-b0": 0, "vit-tiny": 0,
}  # fmt: skip
"""Convolutions that the operator computes."""


def network(name: str, image_size: int = 32) -> nn.Module:
    width = None if name == "vit-tiny" else 8
    return models.build(name, classes=3, channels=3, image_size=image_size, seed=0, width=width)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", SERVED)
def test_convolutions_of_a_network(name, calls, monkeypatch):
    module, x = network(name), images(2, 3, 32, 32)
    layers = copy.deepcopy(module)
    found = module(x)
    assert len(calls) == SERVED[name]
    monkeypatch.setattr(conv_norm_layers, "choose_norm_kernels", lambda *_: None)
    torch.testing.assert_close(found, layers(x), rtol=1e-3, atol=1e-3)
    same(module.state_dict(), layers.state_dict())
    assert len(calls) == SERVED[name]


def test_a_stem_for_large_images(calls):
    network("resnet18", 96)(images(2, 3, 96, 96))
    assert len(calls) == SERVED["resnet18"] - 1


def test_a_generator(calls):
    generator = torch.Generator().manual_seed(0)
    made = models.Generator(nz=4, ngf=4, widths=(4, 2, 1), generator=generator)
    made(torch.randn(4, 4)).sum().backward()
    assert [(call["relu"], call["pool"]) for call in calls] == [(False, 1)] * 2


def test_names_are_those_of_plain_layers():
    keys = list(network("cnn").state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert keys[:6] == ["layer1.0.weight", *(f"layer1.1.{name}" for name in norm)]
    assert "layer2.0.shortcut.1.running_var" in network("resnet8").state_dict()
    assert "down.0.3.weight" in network("unet-small").state_dict()


@pytest.mark.parametrize(("name", "blocks"), [("cnn", 3), ("resnet8", 5)])
def test_blocks_that_train_alone(name, blocks, calls):
    made = cut_network(network(name), blocks)
    made(images(2, 3, 32, 32))
    assert len(calls) == SERVED[name]


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_operations_are_counted_by_layers(name, calls):
    module, x = network(name), images(2, 3, 32, 32)
    with count_flops(module) as ours:
        module(x).sum().backward()
    with FlopCounterMode(display=False) as torchs:
        module(x).sum().backward()
    assert ours.flops == torchs.get_total_flops() > 0
    assert calls == []


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_networks_are_traced_into_layers(name, calls):
    module = network(name).eval()
    made = fold_norms(module)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in made.modules())
    assert calls == []
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(made(x), module(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m[:]])
def test_copies_and_slices_are_served(copied, calls):
    module = stage()
    expected = learnt(plain(module))
    made = copied(module)
    assert type(made) is ConvSequential
    assert [type(layer) for layer in made[1:3]] == [nn.BatchNorm2d, nn.ReLU]
    same(learnt(made), expected)
    assert len(calls) == 2


# -- ConvNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relu", "pool"), [(True, 1), (False, 1), (True, 2), (True, 3)])
def test_conv_norm(relu, pool, calls):
    module = models.ConvNorm(3, 8, relu=relu, pool=pool)
    assert {name.rpartition(".")[0] for name in module.state_dict()} == {"conv", "norm"}
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(8)})
    layers.load_state_dict(module.state_dict())
    residual = images(4, 8, 9, 8)

    def run(x: Tensor) -> Tensor:
        y = layers["norm"](layers["conv"](x)) + residual
        return F.max_pool2d(y.relu() if relu else y, pool)

    same(learnt(module, lambda x: module(x, residual)), learnt(layers, run))
    assert len(calls) == (0 if pool == 3 else 2)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("conv", derive(nn.Conv2d)(3, 8, 3, padding=1, bias=False)),
        ("conv", nn.Conv2d(3, 8, 1, padding=1, bias=False)),
        ("norm", derive(nn.BatchNorm2d)(8)),
        ("norm", nn.InstanceNorm2d(8)),
        ("relu", derive(nn.ReLU)()),
        ("relu", nn.Sigmoid()),
        ("pool", derive(nn.MaxPool2d)(2)),
        ("pool", nn.AvgPool2d(2)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_conv_norm_with_another_layer(name, layer, calls):
    module = models.ConvNorm(3, 8, pool=2)
    setattr(module, name, copy.deepcopy(layer))
    x = images()
    expected = nn.Sequential(*copy.deepcopy(module).children())(x)
    torch.testing.assert_close(module(x), expected)
    assert calls == []


def test_conv_norm_makes_maps_channels_last():
    module = models.ConvNorm(3, 8).eval()
    x = images().contiguous()
    expected = module(x)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    fused = ops.FusedBlocks([nn.Sequential(module), nn.Sequential(module)]).eval()
    torch.testing.assert_close(fused(x), torch.cat([expected, expected], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vmap(module)(x[:, None])[:, 0], expected)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), expected)


def test_the_example_of_the_page(calls):
    (code,) = re.findall(r"```python\n(# fast_net.py.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, type[nn.Module]] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    made = models.Own(names["FastNet"], "FastNet")(classes=3, channels=1, sides=(8, 8), seed=0, word=0, width=None)
    calls.clear()
    assert made(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert len(calls) == 2
    assert made.maps == ("layer1", "layer2")  # FedGID mixes their maps


# -- a batch of one --------------------------------------------------------------------------------------------------

NORM_LAST = {
    "ConvNorm": lambda: models.ConvNorm(3, 8, relu=False),
    "ConvNorm of gray images": lambda: models.ConvNorm(1, 8, relu=False),
    "ConvSequential": lambda: stage(relu=False, pool=False),
    "a norm alone": lambda: ConvSequential(nn.BatchNorm2d(3)),
    "another convolution": lambda: ConvSequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8)),
    **{
        name: functools.partial(
            lambda name: models.build(name, classes=2, channels=3, image_size=16, width=4, seed=0).stage("layer1"), name
        )
        for name in ("mobilenetv2", "efficientnet-b0")
    },
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NORM_LAST)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_batch_of_one_has_the_maps_layout(name, training):
    # torch's own batch norm reads the gradient of channels behind as one of rows of pixels (2.13).
    for dtype, memory in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16), (torch.contiguous_format, torch.channels_last)
    ):
        module = NORM_LAST[name]().train(training).to(dtype)
        x = images(1, 1 if "gray" in name else 3, 16, 16).to(dtype).contiguous().contiguous(memory_format=memory)
        y = module(x)
        weights, grad = list(module.parameters()), torch.randn_like(y)
        expected = torch.autograd.grad(y, weights, grad, retain_graph=True)
        for read in (lambda y: y.squeeze(0).permute(1, 2, 0), lambda y: y.flatten(2).mT):
            got = torch.autograd.grad(read(y), weights, read(grad).contiguous(), retain_graph=True)
            for gradient, reference in zip(got, expected, strict=True):
                assert float((gradient - reference).abs().max()) <= (0.1 if dtype is torch.bfloat16 else 1e-3) * float(
                    reference.abs().max()
                )
