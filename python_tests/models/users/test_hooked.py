"""Features and stages of networks whose forward is a function: hooks give the results of a sequence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkern.data.forms import ImageForm, SampleForm
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.models.precision import compute_in
from fedkern.models.users.hooked import find_taps
from fedkern.models.users.user_models import ItemNetwork, Own, OwnNetwork
from fedkern.settings.config import RunConfig

SHAPE = (3, 8, 8)


class Functional(nn.Module):
    """LeNet with batch norms and dropout, whose activations and poolings are functions."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 5, padding=2), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 5, padding=2), nn.BatchNorm2d(6)
        self.fc1, self.fc2 = nn.Linear(24, 12), nn.Linear(12, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.fc1(x.view(len(x), -1)))
        return self.fc2(F.dropout(x, 0.2, self.training))


def sequence(network):
    """Return the same network as a sequence of modules, cut at the same places."""
    made = nn.Sequential(
        network.conv1, network.norm1, nn.ReLU(), nn.MaxPool2d(2), network.conv2, network.norm2, nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), network.fc1, nn.ReLU(), nn.Dropout(0.2), network.fc2,
    )  # fmt: skip
    made.stages = {"conv1": "0", "conv2": "4"}
    return copy.deepcopy(made)


class Scaled(Functional):
    """A network whose logits are not a linear layer's."""

    def forward(self, x):
        return 3 * super().forward(x)


class Skipping(Functional):
    """A network with a shortcut around the second convolution."""

    def forward(self, x):
        maps = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(maps)), 4) + maps.mean((1, 2, 3))[:, None, None, None]
        return self.fc2(F.relu(self.fc1(x.view(len(x), -1))))


class Rectified(Functional):
    """The network with in-place activations."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x)), inplace=True), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x)), inplace=True), 2)
        x = F.relu(self.fc1(x.view(len(x), -1)), inplace=True)
        return self.fc2(F.dropout(x, 0.2, self.training))


class InPlace(Functional):
    """A network whose activations and dropout change their inputs."""

    def forward(self, x):
        x = F.dropout(self.norm1(self.conv1(x)), 0.2, self.training, inplace=True)
        x = F.max_pool2d(F.relu(x, inplace=True), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x)), inplace=True), 2)
        return self.fc2(F.relu(self.fc1(x.view(len(x), -1)), inplace=True))


class Doubled(Functional):
    """A network with in-place steps on maps and images, where a second pass would show."""

    def forward(self, x):
        x = self.conv1(x.sub_(0.5)).mul_(2)
        x = F.max_pool2d(self.conv2(F.max_pool2d(x, 2)).mul_(2), 2)
        return self.fc2(self.fc1(x.view(len(x), -1)).mul_(2))


class EvalOnly(Functional):
    """A network with a layer that training skips."""

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2).view(len(x), -1)
        return self.fc2(x[:, :12] if self.training else self.fc1(x))


class Twice(Functional):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(0))


def cut_at(module, stages=(), features=None, shape=SHAPE):
    kind, *taps = find_taps(OwnNetwork(module), stages, features, form_of(shape), "net")
    return kind(module, *taps)


def form_of(shape):
    return ImageForm(shape, (0.5,) * shape[0], (0.2,) * shape[0])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Functional()


@pytest.fixture
def images():
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stage", ["conv1", "conv2"])
def test_a_pass_from_a_stage_on_is_that_of_the_sequence(stage, network, images):
    """The part before the stage runs again without a trace in values, gradients and running statistics."""
    plain, parts = network.train(), sequence(network).train()
    front, back = parts[: 1 if stage == "conv1" else 5], parts[1 if stage == "conv1" else 5 :]
    found = cut_at(plain, ["conv1", "conv2"]).train()
    for mode in (True, False):
        found.train(mode)
        parts.train(mode)
        torch.manual_seed(2)
        own = found.stages(images, upto=stage)
        logits = found.head(found.tail(own, after=stage))
        again = found.head(found.tail(own.flip(0), after=stage))
        torch.manual_seed(2)
        maps = front(images)
        torch.testing.assert_close(own, maps)
        torch.testing.assert_close(logits, plain_logits := back(maps))
        torch.testing.assert_close(again, mixed := back(maps.flip(0)))
        (logits + again).square().sum().backward()
        (plain_logits + mixed).square().sum().backward()
        for plain_part, part in zip(plain.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(plain_part.grad, part.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close([*plain.buffers()], [*parts.buffers()])
        assert plain.training is mode


@pytest.mark.parametrize("stage", ["norm1", "norm2", "fc1"])
@pytest.mark.parametrize("training", [True, False])
def test_results_stay_as_they_are_before_in_place_layers(stage, training, images):
    """A method mixes the maps of a stage, not the result of an in-place ReLU on them."""
    torch.manual_seed(0)
    found = cut_at(InPlace(), [stage]).train(training)
    torch.manual_seed(2)
    own = found.stages(images, upto=stage)
    assert own.min() < 0
    with torch.no_grad():
        torch.manual_seed(2)
        assert torch.equal(own, found.stages(images, upto=stage))
    mixed = own + 1
    before = mixed.clone()
    found.tail(mixed, after=stage)
    assert torch.equal(mixed, before)


@pytest.mark.parametrize("stage", ["conv1", "conv2", "fc1"])
def test_in_place_steps_are_taken_once(stage, images):
    found = cut_at(Doubled().eval(), [stage])
    logits = found(images.clone())
    own = found.stages(images.clone(), upto=stage)
    torch.testing.assert_close(found.head(found.tail(own.clone(), after=stage)), logits)


def test_items_may_be_changed_in_place():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 5), nn.Linear(5, 3))
    form = SampleForm(("float32 [2, 4]",), {"args": ["float32 [2, 4]"], "kwargs": {}}, None)
    kind, *taps = find_taps(ItemNetwork(module, None), [], "1", form, "net")
    network, x = kind(module, *taps), torch.randn(6, 4)
    torch.testing.assert_close(network.head(network.features(x).clone()), network(x))


def test_a_sequence_leaves_maps_as_they_are(images):
    # Also if a stage ends before an in-place ReLU.
    parts = sequence(Functional())
    parts[2], parts[6] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    parts.stages = {"norm1": "1", "norm2": "5"}
    network = Own(parts, "net")(classes=3, channels=3, sides=SHAPE[1:], seed=0, word=0, width=None)
    for stage in network.stage_names[:-1]:
        own = network.stages(images, upto=stage)
        before = own.clone()
        network.tail(own, after=stage)
        assert own.min() < 0
        assert torch.equal(own, before)


class Xception(nn.Module):
    """A network with a block that begins with an in-place ReLU, as Xception's do."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x):
        return self.inside(x) + x


@pytest.mark.parametrize("before", [[], [nn.Dropout(0.2)]])
def test_a_sequence_leaves_the_input_of_a_block_as_it_is(before, images):
    # Also behind a layer that returns its input, such as dropout in evaluation.
    parts = nn.Sequential(
        nn.Conv2d(3, 4, 3), *before, Xception(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    parts.stages = {"stem": "0", "block": str(1 + len(before))}
    network = Own(parts, "net")(classes=3, channels=3, sides=SHAPE[1:], seed=0, word=0, width=None)
    for training in (True, False):
        own = network.train(training).stages(images, upto="stem")
        before_tail = own.clone()
        network.tail(own, after="stem")
        assert own.min() < 0
        assert torch.equal(own, before_tail)


def test_what_is_known_is_not_computed_again(network, images):
    calls = []
    network.conv1.register_forward_hook(lambda *_: calls.append(1))
    found = cut_at(network, ["conv1"])
    calls.clear()
    own = found.stages(images, upto="conv1")
    found.head(found.tail(own, after="conv1"))
    assert len(calls) == 1
    found.tail(own * 2, after="conv1")
    assert len(calls) == 2
    with torch.no_grad():
        later = []
        network.fc1.register_forward_hook(lambda *_: later.append(1))
        found.stages(images, upto="conv1")
    assert not later


@pytest.mark.parametrize("module", [Functional, Scaled])
def test_features_are_what_the_named_module_gives(module, images):
    torch.manual_seed(0)
    found = cut_at(module().eval(), features="fc1")
    z = found.features(images)
    torch.testing.assert_close(found.head(z), found(images))
    torch.testing.assert_close(found.head(z.clone()), found(images))
    assert (found.head.in_features, found.head.out_features) == (12, 3)
    assert copy.deepcopy(found).head(z).shape == (5, 3)


def test_bf16(network, images):
    with compute_in("bf16"):
        found = cut_at(network.eval(), ["conv1"])
        own = found.stages(images, upto="conv1")
        assert own.dtype is torch.bfloat16
        features = found.tail(own, after="conv1")
        assert features.dtype is torch.float32
        torch.testing.assert_close(found.head(features), found(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("module", "given", "said"), [
    (Functional, {"stages": ["conv3"]}, r'--stages: the network net has no submodule "conv3". Did you mean "conv'),
    (Functional, {"features": "cf1"}, r'--features: .* no submodule "cf1". Did you mean "fc1"'),
    (Scaled, {"stages": ["conv1"]}, "--stages: net ends in no linear layer.*: give --features too"),
    (Skipping, {"stages": ["conv2"]}, "--stages conv2: the logits of net depend on more than it gives"),
    (Twice, {"features": "fc1"}, "--features fc1: net calls it 2 times"),
    (EvalOnly, {"features": "fc1"}, "--features fc1: net calls it 0 times in train mode"),
])  # fmt: skip
def test_what_cannot_be_cut_is_one_sentence(module, given, said):
    with pytest.raises(UserError, match=said):
        cut_at(module(), **given)


def test_other_networks_have_no_such_names(network):
    for module in (nn.Linear(2, 2), ItemNetwork(network, None, raw=True)):
        with pytest.raises(UserError, match="are for a network of your own that gives logits, not net"):
            find_taps(module, ["conv1"], None, form_of(SHAPE), "net")


def test_fedkern_s_networks_have_none_either(make_data, tmp_path):
    config = RunConfig.make("fedavg", rounds=1, clients=3, features="head", model="cnn")
    with pytest.raises(UserError, match="are for a network of your own that gives logits, not cnn: leave them out"):
        run(config, out=tmp_path / "run", data=make_data())


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "given"),
    [("fedgid", {"stages": "conv1,conv2"}), ("fedgid", {"stages": "conv2"}), ("fedgid", {"stages": "norm1,norm2"}),
     ("fedproto", {"features": "fc1"}),
     ("moon", {"features": "fc1"}), ("moon", {}), ("fedproto", {}), ("fml", {})],
)  # fmt: skip
def test_a_method_has_the_result_of_the_sequence(method, given, network, make_data, tmp_path):
    how = {"rounds": 2, "local_epochs": 1, "batch_size": 4, "clients": 3, "threads": 1, "grad_cam": 0, "seed": 3}
    parts = sequence(network)
    parts.stages = {"conv2": "4"} if given.get("stages") == "conv2" else parts.stages
    if given.get("stages") == "norm1,norm2":  # before in-place activations
        parts.stages = {"norm1": "1", "norm2": "5"}
        network.__class__ = Rectified
    for name, model, own in (("hooks", network, given), ("parts", parts, {})):
        if method != "fedgid" and given and name == "parts":
            own = {"features": "9"}
        config = RunConfig.make(method, **how, **own)
        run(config, out=tmp_path / name, data=make_data(), script=ScriptObjects(model))
    found, expected = (
        torch.cat([t.flatten().double() for t in _weights(tmp_path / name)]) for name in ("hooks", "parts")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _weights(out):
    from safetensors.torch import load_file

    return [tensor for _, tensor in sorted(load_file(out / "model.safetensors").items(), key=_place)]


ORDER = ("conv1", "norm1", "conv2", "norm2", "fc1", "fc2")
NUMBERS = ("0", "1", "4", "5", "9", "12")


def _place(entry):
    head, _, stem = entry[0].rpartition(".")
    last = head.rpartition(".")[2]
    return (*([ORDER.index(last)] if last in ORDER else [NUMBERS.index(last)]), stem)
