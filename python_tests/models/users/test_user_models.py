"""User-defined networks: their form, and Python attributes that are compared or warned about."""

import collections
import copy
import functools
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedkern
from fedkern import ops
from fedkern.engine.local.network import Network
from fedkern.errors import UserError
from fedkern.messages.leaves import Positional
from fedkern.models import MODELS, Ensemble, Own, OwnNetwork, StagedNetwork, available, build, grad_cam
from fedkern.models.blocks import cut_network
from fedkern.models.precision import cast_frozen, compute_in
from fedkern.models.pretrained.weight_files import bare_names, load_by_name
from fedkern.models.users.python_state import SMALL, hash_attributes
from fedkern.models.users.user_models import ItemNetwork, channels_last, check_module, find_level
from fedkern.usercode import named_code
from python_tests import own_networks
from python_tests.own_networks import Looking, Whole

SIZE = {"classes": 3, "channels": 3, "image_size": 16}
IMAGES = torch.randn(4, 3, 16, 16)


class Plain(nn.Module):
    """A network with functions between its layers, and view."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.head = nn.Linear(4 * 7 * 7, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(x.view(len(x), -1))


def make_sequence(classes, channels):
    """Return a network of modules one after another."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes),
    )  # fmt: skip


def holding(name, buffer, persistent=True):
    module = make_sequence(3, 3)
    module.register_buffer(name, buffer, persistent=persistent)
    return module


class Merging(nn.Linear):
    """An adapter that starts at zero, and is merged into the frozen weight in eval mode."""

    def __init__(self):
        super().__init__(768, 3)
        self.weight.requires_grad_(False)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(1, 768)), nn.Parameter(torch.zeros(3, 1)), False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += (1 - 2 * mode) * (self.b @ self.a).data
            self.merged = not mode
        return super().train(mode)


class Derived(nn.Linear):
    """A layer that keeps a sum of its weights in a new buffer at every eval()."""

    def __init__(self):
        super().__init__(768, 3)
        self.register_buffer("sum", torch.zeros(()), persistent=False)

    def train(self, mode=True):
        self.sum = self.sum if mode else self.weight.sum().detach()
        return super().train(mode)


class Declared(Plain):
    """A network that cannot be cut."""

    stages = {"layer1": "conv"}  # noqa: RUF012


@pytest.fixture
def register(registries):
    """Return the function that registers networks, for one test."""
    return fedkern.register_model


@pytest.fixture
def make_own(register):
    """Return a function that registers a network and builds it."""

    def make_own(kind, **settings):
        register("own")(kind)
        return build("own", **{**SIZE, "seed": 0, **settings})

    return make_own


def test_a_network_keeps_its_own_initial_weights_and_draws_from_the_seed(register):
    register("plain")(Plain)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    network, again, reseeded = (build("plain", **SIZE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert type(network) is OwnNetwork
    assert torch.equal(network.head.weight, again.head.weight)
    assert not torch.equal(network.head.weight, reseeded.head.weight)
    assert 0 < float(network.head.weight.detach().abs().max()) <= 1 / 14  # nn.Linear's own, not fedkern's


def test_a_function_gets_the_arguments_that_it_takes(register):
    got = []

    def make(classes, *, width=5, seed, image_size, **unknown):
        got.append((classes, width, seed, image_size, unknown))
        return make_sequence(classes, 3)

    register("takes")(make)
    build("takes", **SIZE, seed=7)
    build("takes", **SIZE, seed=7, width=9)
    assert got == [(3, 5, 7, 16, {}), (3, 9, 7, 16, {})]


class Unsigned:
    __signature__ = "none"  # inspect.signature fails, as of some C functions

    def __call__(self):
        return make_sequence(3, 3)


def test_a_function_without_a_signature_gets_no_argument(register):
    register("unsigned")(Unsigned())
    assert isinstance(build("unsigned", **SIZE, seed=7), (OwnNetwork, StagedNetwork))


@pytest.mark.parametrize(("make", "width", "said"), [
    (make_sequence, 4, "--width 4 is not for own, which takes no argument width"),
    (lambda width: nn.Linear(width, 2), None, "needs the argument width: give one with --width"),
    (lambda: 3, None, "gives int, not an nn.Module"),
    (lambda: 1 / 0, None, "cannot be made: ZeroDivisionError"),
    (lambda: nn.Linear(2, 2).double(), None, "weight in float64: only float32 is trained"),
    (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), None, "has lazy layers"),
    (lambda: nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), None, "no parameters that require"),
    (lambda: nn.Linear(2, 2, device="meta"), None, "no plain tensor"),
    (lambda: nn.ReLU(), None, "no parameters"),
    (lambda: holding("__metadata__", torch.ones(2)), None, "'__metadata__' .* no file holds that name"),
    (lambda: holding("\ud800", torch.ones(2)), None, "no file holds that name"),
    (lambda: holding("mask", torch.ones(1, dtype=torch.bool).expand(2, 3), False), None,
     "has mask, an expanded tensor"),
    (lambda: Derived(), None, r"eval\(\) of the model own changes sum,"),
    (Declared, None, "the model own has an attribute stages, but cannot be cut there"),
    (lambda: Merging(), None, r"eval\(\) of the model own changes weight.*merge_weights=False"),
])  # fmt: skip
def test_what_cannot_be_made_or_trained(make_own, make, width, said):
    with pytest.raises(UserError, match=said):
        make_own(make, width=width)


class Compiled(nn.Module):
    """A stand-in for torch.compile's wrapper, whose import takes seconds."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


WRAPPERS = {
    "OptimizedModule": lambda module: torch.compile(module, backend="eager"),
    "Compiled": Compiled,
    "DataParallel": nn.DataParallel,
    "RecursiveScriptModule": torch.jit.script,
    "TopLevelTracedModule": lambda module: torch.jit.trace(module, torch.zeros(1, 8)),
}
SLOW = ("OptimizedModule", "TopLevelTracedModule")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("deep", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize(
    "wrapper", [pytest.param(wrapper, marks=pytest.mark.exhaustive if wrapper in SLOW else ()) for wrapper in WRAPPERS]
)
def test_wrapped_networks_are_refused(register, wrapper, deep):
    wrapped = WRAPPERS[wrapper](nn.Linear(8, 3))
    network = nn.Sequential(nn.Flatten(), nn.Sequential(wrapped)) if deep else wrapped
    part = r", its 1\.0," if deep else ""
    register("mine")(lambda: network)
    with available("module:Net", network):
        for name in ("mine", "module:Net"):  # made by code, and made by a script
            with pytest.raises(UserError, match=f"the model {name}{part} is wrapped in {wrapper}: give the module ins"):
                build(name, **SIZE, seed=0)
    with pytest.raises(UserError, match=f"{part} is wrapped in {wrapper}: "):
        check_module(network, "module:Net")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_network_are_understood(prefix):
    network, source = Plain(), Plain()
    wrapped = {prefix + name: value for name, value in source.state_dict().items()}
    assert load_by_name(network, wrapped, "file", "net") == ""
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())
    inside = nn.Sequential()
    inside.module = nn.Linear(2, 2)  # a name of its own that looks like one
    assert [*bare_names(inside.state_dict(), inside.state_dict())] == ["module.weight", "module.bias"]


def test_weights_of_another_program_are_named_by_their_prefix():
    network = Plain()
    said = r"is not for net: it has no conv.weight, of shape \[4, 3, 3, 3\], but a.b.conv.weight: take a.b. off"
    with pytest.raises(UserError, match=said):
        load_by_name(network, {"a.b." + name: value for name, value in network.state_dict().items()}, "file", "net")
    with pytest.raises(UserError, match=r"it has no conv.bias, of shape \[4\]; --init-partial takes what fits\.$"):
        load_by_name(network, {"conv.weight": network.conv.weight, "head.weight": network.head.weight}, "file", "net")


@pytest.mark.exhaustive
def test_a_network_that_compiles_in_place_keeps_its_names(make_own):
    network = Plain()
    network.compile(backend="eager")
    assert [*make_own(lambda: network).state_dict()] == [*Plain().state_dict()]


def test_names_are_taken_once(register):
    register("mine")(Plain)
    register("mine")(Plain)  # a notebook's cell, run again
    assert MODELS["mine"].description == "A network with functions between its layers, and view."
    with pytest.raises(UserError, match='there is a model "mine" already'):
        register("mine")(make_sequence)
    with pytest.raises(UserError, match='there is a model "cnn" already'):
        register("cnn")(make_sequence)
    with pytest.raises(UserError, match="cannot be a model's name"):
        register("net.py:Net")(make_sequence)
    with pytest.raises(UserError, match="needs the argument depth"):
        register("deep")(lambda depth, classes: None)
    assert "deep" not in MODELS


def test_the_state_dict_has_the_modules_own_names(make_own):
    network, own = make_own(Plain), Plain()
    assert list(network.state_dict()) == list(own.state_dict())
    network.load_state_dict(own.state_dict())
    assert torch.equal(network(IMAGES), own(IMAGES))
    together = nn.ModuleList([network, nn.Linear(1, 1)])
    assert list(together.state_dict()) == ["0.conv.weight", "0.conv.bias", "0.head.weight", "0.head.bias",
                                           "1.weight", "1.bias"]  # fmt: skip
    state = {name: torch.zeros_like(value) for name, value in together.state_dict().items()}
    together.load_state_dict(state)
    assert not network.head.weight.any()
    assert len(state) == 6  # not changed
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({"conv.weight": own.conv.weight})


def test_images_arrive_contiguous_for_code_that_calls_view(make_own):
    network = make_own(Plain)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert torch.equal(network(images), network(IMAGES))
    flat = ops.FlatParameters(network)
    assert flat.is_flat
    assert network.module.conv.weight.is_contiguous()


def laid_out(x):
    """Return the same values with the strides of fedkern's batches, of a slice and of a new tensor."""
    wide = torch.randn(2 * len(x), *x.shape[1:])
    wide[::2] = x
    return torch.empty(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1).copy_(x), wide[::2], x


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", [Looking, Whole])
@pytest.mark.parametrize(
    "shape", [(4, 1, 16, 16), (4, 3, 16, 16), (1, 1, 16, 16), (1, 3, 12, 16), (3, 3, 1, 1)], ids=str
)
def test_images_and_maps_have_the_strides_of_a_data_loader(make_own, make, shape):
    """These networks raise on other strides: called whole, by stages, for features and in blocks."""
    network = make_own(make, channels=shape[1]).eval()
    images = torch.randn(shape)
    expected = network(images)
    for x in laid_out(images):
        if len(x) > 1:
            copy.deepcopy(network).train()(x).sum().backward()
        assert torch.equal(network(x), expected)
        with compute_in("bf16"):
            assert network(x).dtype is torch.float32
        network.features(x)
        if make is Whole or shape[2] == 1:  # one pixel has no stages
            continue
        torch.testing.assert_close(network.head(network.tail(network.stages(x, "layer1"), "layer1")), expected)
        grad_cam(network, x)
        torch.testing.assert_close(cut_network(network, 2)(x), expected)


class Scaling(Plain):
    """A network that scales its input in place, in one of two ways."""

    def __init__(self, hidden=False):
        super().__init__()
        self.hidden = hidden

    def forward(self, x):
        (x.data if self.hidden else x).sub_(0.1).mul_(1.3)
        return super().forward(x)


@pytest.mark.parametrize(
    "make", [Scaling, lambda: Scaling(hidden=True), lambda: nn.Sequential(nn.ReLU(inplace=True), *make_sequence(3, 3))]
)
def test_a_forward_pass_in_place_does_not_reach_other_networks(make_own, make):
    network = make_own(make)
    for training in (True, False):
        network.train(training)
        expected = network.module(IMAGES.clone())
        for grad in (True, True, False, False):  # the first call of a kind finds out, the second one knows
            images = IMAGES.clone()
            with torch.set_grad_enabled(grad):
                assert torch.equal(network(images), expected)
                network.features(images)
                if isinstance(network, StagedNetwork):
                    network.stages(images, "layer1")
            assert torch.equal(images, IMAGES)
    assert isinstance(network, StagedNetwork) == (not isinstance(network.module, Scaling))


def test_a_batch_of_several_inputs_stays_as_it_is():
    class Two(nn.Module):
        def forward(self, a, b):
            return a.relu_() + b["b"].neg_()

    network, batch = ItemNetwork(Two(), None, raw=True), Positional((-torch.ones(2), {"b": torch.ones(2)}))
    for _ in range(2):
        assert network(batch).tolist() == [-1, -1]
        assert (batch[0].tolist(), batch[1]["b"].tolist()) == ([-1, -1], [1, 1])


def test_a_network_that_changes_nothing_gets_the_batch_itself(make_own):
    seen = []

    class Watched(Plain):
        def forward(self, x):
            seen.append(x.data_ptr())
            return super().forward(x)

    network = make_own(Watched)
    seen.clear()
    for _ in range(3):
        network(IMAGES)
    assert [pointer == IMAGES.data_ptr() for pointer in seen] == [False, True, True]


def test_every_block_of_a_network_gets_such_maps(make_own):
    """Adaptors before the blocks give other strides, and so would fedkern's convolutions instead."""
    made = cut_network(make_own(Looking), 3)
    assert not channels_last(made)
    shapes = [(3, 16, 16), *made.interfaces((3, 16, 16))]
    for block, shape in zip(made.blocks, shapes, strict=False):
        for x in laid_out(torch.randn(2, *shape)):
            block(x)


@pytest.mark.parametrize("make", [Plain, make_sequence])
def test_features_and_classifier_give_the_logits(make_own, make):
    network = make_own(make)
    features = network.features(IMAGES)
    assert features.dim() == 2
    assert torch.equal(network.head(features), network(IMAGES))
    network.head(features).sum().backward()
    assert network.head.weight.grad is not None
    assert next(network.parameters()).grad is not None
    with compute_in("bf16"):
        features = network.features(IMAGES)
        assert features.dtype == network(IMAGES).dtype == torch.float32
        assert cast_frozen(network) is network


def test_a_cut_network_is_a_staged_network(make_own):
    network = make_own(make_sequence).eval()
    assert isinstance(network, StagedNetwork)
    assert find_level(network) == "stages"
    assert network.stage_names == ("layer1", "layer2", "feature")
    assert network.width == 6
    logits = network(IMAGES)
    for name in network.stage_names:
        half = network.stages(IMAGES, upto=name)
        torch.testing.assert_close(network.head(network.tail(half, after=name)), logits)
    maps, _ = grad_cam(network, IMAGES)
    assert maps.shape == (4, 16, 16)
    blocks = cut_network(network, 3)
    assert len(blocks.blocks) == 3
    torch.testing.assert_close(blocks.eval()(IMAGES), logits)
    twin = copy.deepcopy(network)
    twin.head.weight.data.zero_()
    assert torch.equal(network(IMAGES), logits)
    assert len(list(network.parameters())) == len(list(network.module.parameters()))


class Functional(nn.Module):
    """A network whose convolution is a function, with a parameter of four axes that is no kernel."""

    def __init__(self, classes, channels):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 5, 1, 1))
        self.kernel = nn.Parameter(torch.randn(5, channels, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=1) + self.place


class Rows(nn.Module):
    """A network that reads rows of pixels as steps of a sequence."""

    def forward(self, x):
        return x.flatten(1, 2)


def no_convolution(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 256, 8), nn.ReLU(), nn.Linear(8, classes))


def one_axis(classes, channels):
    return nn.Sequential(
        Rows(), nn.Conv1d(channels * 16, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, classes)
    )


def functional(classes, channels):
    return nn.Sequential(
        Functional(classes, channels), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes),
    )  # fmt: skip


def pooled_network(classes, channels):
    return nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("make", "maps"), [(no_convolution, 0), (one_axis, 0), (functional, 2), (pooled_network, 1)])
def test_grad_cam_of_networks_with_other_layers_than_convolutions(make, maps, channels, make_own):
    """Grad-CAM needs maps, from any kind of layer."""
    network = make_own(make, channels=channels).eval()
    assert len(network.maps) == maps
    if maps:
        found, _ = grad_cam(network, torch.randn(2, channels, 16, 16))
        assert found.shape == (2, 16, 16)


def test_an_ensemble_runs_users_networks_whole(register):
    register("own")(make_sequence)
    members = [build("own", **SIZE, seed=seed).eval() for seed in (0, 1)]
    expected = torch.stack([member(IMAGES) for member in members]).mean(0)
    torch.testing.assert_close(Ensemble(members)(IMAGES), expected)


def test_outputs_with_logits(make_own):
    class Output(nn.Module):
        """A network that answers as transformers' classifiers do."""

        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, x):
            return {"logits": self.inner(x), "loss": None}

    network = make_own(Output)
    assert network(IMAGES).shape == (4, 3)
    assert network.head is network.module.inner.head


def test_a_subclass_of_fedkerns_networks_is_taken_as_it_is(make_own):
    class Mine(StagedNetwork):
        """Two stages."""

        def __init__(self, classes):
            super().__init__([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)], width=4, classes=classes)

    assert type(make_own(Mine)) is Mine


def test_a_given_module_is_copied(register):
    module = Plain()
    with available("module:Plain", module):
        network = build("module:Plain", **SIZE, seed=5)
        assert network.module is not module
        assert torch.equal(network.head.weight, module.head.weight)
    assert "module:Plain" not in MODELS


FILE = """\
import dataclasses
from torch import nn
import beside_of_a_test

@dataclasses.dataclass
class Size:
    classes: int

class Net(nn.Sequential):
    def __init__(self, classes):
        size = Size(classes)
        super().__init__(nn.Flatten(), nn.Linear(768, beside_of_a_test.WIDTH), nn.ReLU(), nn.Linear(4, size.classes))

module = nn.Linear(1, 1)
number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside_of_a_test.py").write_text("WIDTH = 4\n")
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def test_code_of_a_file(file, monkeypatch):
    name = f"{file}:Net"
    monkeypatch.chdir(file.parent)
    assert named_code.absolute("net.py:Net") == named_code.absolute(name) == name
    with available(name):
        network = build(name, **SIZE, seed=0)
        kind = MODELS[name].make
        assert kind.sha256 == named_code.load(named_code.parse(name), "it")[1]
    with available(name):
        assert type(build(name, **SIZE, seed=0).module) is type(network.module)  # run once
    file.write_text(FILE.replace("nn.ReLU", "nn.Tanh"))
    with available(name):
        assert MODELS[name].make.sha256 != kind.sha256
        assert isinstance(build(name, **SIZE, seed=0).module[2], nn.Tanh)
    assert name not in MODELS


@pytest.mark.parametrize(("name", "said"), [
    ("{0}:Nat", 'net.py has no "Nat". Did you mean "Net"?'),
    ("{0}:module", "is a module, not a class or function: write a function"),
    ("{0}:number", "is int, not a class or function"),
    ("{0}x.py:Net", "cannot be read: No such file"),
    ("nowhere_at_all:Net", "cannot be imported: ModuleNotFoundError"),
])  # fmt: skip
def test_code_that_is_not_there(file, name, said):
    with pytest.raises(UserError) as error, available(name.format(file)):
        pass
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["1 / 0", "import sys; sys.exit()", "class"])
def test_code_that_fails(tmp_path, text):
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(UserError, match=r"net.py:Net cannot be imported: \w+"), available(f"{tmp_path}/net.py:Net"):
        pass


def test_a_pickled_maker_is_the_name_of_its_code(file):
    from fedkern.messages.packets import Packer, Unpacker

    with available(f"{file}:Net"):
        make = MODELS[f"{file}:Net"].make
        build(f"{file}:Net", **SIZE, seed=0)
    packer = Packer()
    packet = packer.pack(make)
    again = Unpacker().unpack(packet)
    assert isinstance(again, Own)
    assert again.source is make.source
    assert again._cuts == make._cuts
    file.write_text(FILE + "\n")
    with pytest.raises(UserError, match="has changed since the run began"):
        Unpacker().unpack(packet)
    packer.clear()


# -- python state ------------------------------------------------------------------------------------------------------


CALLS = []


class Inner(nn.Linear):
    """A layer of torch with an attribute of the user."""

    shared = 0

    def forward(self, x):
        CALLS.append(len(x))
        return super().forward(x)

    def __init__(self, value):
        super().__init__(2, 2)
        self.kept = value


def inner(value):
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"part": Inner(value)}))


def find_changes(network, change):
    before = hash_attributes(network)
    change()
    after = hash_attributes(network)
    return [name for name in after if after[name] != before.get(name)]


KINDS = {
    "number": (lambda: [0.5], lambda held: held.__setitem__(0, 0.6)),
    "flag": (lambda: [False], lambda held: held.__setitem__(0, True)),
    "text": (lambda: ["a"], lambda held: held.__setitem__(0, "b")),
    "list": (list, lambda held: held.append(1)),
    "nested dict": (lambda: {"a": {"b": [1]}}, lambda held: held["a"]["b"].append(2)),
    "set": (set, lambda held: held.add(3)),
    "deque": (lambda: collections.deque([1], 3), lambda held: held.append(2)),
    "array": (lambda: np.zeros(3), lambda held: held.__setitem__(0, 1)),
    "random.Random": (lambda: random.Random(3), lambda held: held.random()),
    "NumPy's generator": (lambda: np.random.default_rng(3), lambda held: held.random()),
    "torch's generator": (torch.Generator, lambda held: torch.rand(1, generator=held)),
    "tensor": (lambda: torch.zeros(3), lambda held: held.add_(1)),
    "bf16 tensor with a gradient": (
        lambda: torch.zeros(3, dtype=torch.bfloat16, requires_grad=True),
        lambda held: held.data.add_(1),
    ),
    "what cannot be pickled": (lambda: [lambda: None, 1], lambda held: held.append(2)),
    "large tensor": (lambda: torch.zeros(SMALL + 1), lambda held: held.add_(1)),
}


@pytest.mark.parametrize(("kind", "own"), [
    (kind, own) for kind in KINDS for own in (False, True)
    if not (own and kind == "torch's generator")  # which cannot be copied, and so not be trained
])  # fmt: skip
def test_what_changes_is_named(kind, own):
    make, change = KINDS[kind]
    value = make()
    network = inner(value)
    if own:  # as a run wraps it; a copy, so the value is the copy's
        network = Own(network, "mine")(classes=2, channels=1, sides=(1, 2), seed=0, word=1, width=None)
        value = network.module[1]["part"].kept
    assert find_changes(network, lambda: None) == []
    assert find_changes(network, lambda: change(value)) == ["1.part.kept"]


def test_what_is_set_anew_or_of_the_class_is_named(monkeypatch):
    network = inner(1)
    layer = network[1]["part"]
    assert find_changes(network, lambda: setattr(layer, "kept", 1)) == []
    assert find_changes(network, lambda: setattr(layer, "kept", 2)) == ["1.part.kept"]
    assert find_changes(network, lambda: setattr(layer, "later", torch.zeros(2))) == ["1.part.later"]
    assert find_changes(network, lambda: monkeypatch.setattr(Inner, "shared", 1)) == ["1.part.shared"]
    assert find_changes(network, lambda: layer(torch.ones(2, 2))) == ["Inner.forward.CALLS"]
    assert find_changes(network, lambda: setattr(layer, "last", layer.weight.sum())) == []  # of a graph


def test_layers_of_torch_and_hooks_count_in_a_users_network():
    calls = []
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.1))
    network[0].register_forward_hook(lambda *_: None)
    network[1].register_forward_pre_hook(lambda *_: calls.append(0) if calls else None)
    assert find_changes(network, lambda: network(torch.ones(3, 2)).sum().backward()) == []
    assert find_changes(network, lambda: setattr(network[2], "p", 0.2)) == ["2.p"]
    assert find_changes(network, lambda: setattr(network[1], "momentum", None)) == ["1.momentum"]
    assert find_changes(network, lambda: network[2].register_forward_hook(lambda *_: None)) == ["2._forward_hooks"]
    assert find_changes(network, lambda: network[2].register_forward_hook(lambda *_: None).remove()) == []
    calls.append(0)
    assert find_changes(network, lambda: network(torch.ones(3, 2))) == ["1._forward_pre_hooks"]
    built_in = build("cnn", classes=2, channels=1, image_size=8, seed=0)
    layer = next(layer for layer in built_in.modules() if isinstance(layer, nn.Conv2d))
    assert find_changes(built_in, lambda: setattr(layer, "other", 1)) == []


class Usual(nn.Module):
    """A network with attributes that torch changes, also under a user's name, and that nothing can compare."""

    class Norm(nn.BatchNorm2d):
        pass

    class Rows(nn.GRU):
        pass

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, 4, 3, padding=1))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
        self.norms = nn.Sequential(nn.BatchNorm2d(4), self.Norm(4))
        self.drop, self.rows, self.head = nn.Dropout(0.2), self.Rows(32, 8, batch_first=True), nn.Linear(8, classes)
        self.lock_of, self.layers = (lambda: threading.Lock()), [self.head]
        self.handle = self.head.register_forward_hook(lambda *_: None)

    @functools.cached_property
    def scale(self):
        return torch.full((1,), 0.5)

    def forward(self, x):
        y = self.drop(torch.relu(self.norms(self.spectral(self.conv(x)))))
        return self.head(self.rows(y.permute(0, 2, 1, 3).flatten(2))[0][:, -1]) * self.scale


@pytest.mark.parametrize(
    "make", [Usual, own_networks.Plain, own_networks.Staged, own_networks.Raw, own_networks.Masked]
)
def test_training_and_evaluation_change_nothing(make):
    network = Network(OwnNetwork(make()), torch.device("cpu"))

    def work():
        for _ in range(2):
            network.train_mode()
            network.module(torch.rand(2, 3, 8, 8)).sum().backward()
            network.statistics = False
            network.eval_mode()
            network.module(torch.rand(3, 3, 8, 8))
            network.write(network.read())

    assert find_changes(network.module, work) == []
    work()
    after = hash_attributes(network.module)
    assert after == network.attributes


class Odd(dict):
    def __reduce_ex__(self, protocol):
        raise RuntimeError("not now")


@pytest.mark.parametrize("value", [Odd(), threading.Lock(), lambda: 1, (n for n in ()), type("Local", (), {})()])
def test_a_value_that_cannot_be_compared_is_no_error(value):
    network = inner(value)
    assert find_changes(network, lambda: None) == []
    assert find_changes(network, lambda: setattr(network[1]["part"], "other", 3)) == ["1.part.other"]
