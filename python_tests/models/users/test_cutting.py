"""Cutting user-defined networks: stages and classifier that give the network's own logits, or a reason."""

import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkern.errors import UserError
from fedkern.models.users.cutting import NotCut, find_cut, find_head

IMAGES = torch.randn(2, 3, 16, 16)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride, 1)
        self.norm = nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, stride)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + self.short(x))


class Residual(nn.Module):
    """A network like torchvision's ResNet: a stem, layers, pooling, flatten in forward, a classifier."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Tutorial(nn.Module):
    """A network whose activations and pooling are functions, and whose maps become features by view."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2 = nn.Linear(6 * 2 * 2, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


def sequence(*more):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def names(cut):
    return {stage: list(pieces) for stage, pieces in cut.stages}


def test_a_sequence_is_cut_before_every_layer_with_weights():
    cut = find_cut(sequence(), IMAGES)
    found = {"layer1": ["0", "1", "2", "3"], "layer2": ["4", "5"], "feature": ["6", "7"]}
    assert names(cut) == found
    assert (cut.head, cut.maps) == ("8", 2)


def test_layers_of_blocks_are_the_stages_and_the_stem_belongs_to_the_first():
    cut = find_cut(Residual(), IMAGES)
    assert names(cut) == {"layer1": ["conv1", "relu", "layer1"], "layer2": ["layer2"], "feature": ["avgpool", ""]}
    assert (cut.head, cut.maps) == ("fc", 2)


def test_a_body_that_is_one_sequence_is_taken_apart():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
            self.pool = nn.AdaptiveAvgPool2d(2)
            self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 3))

        def forward(self, x):
            return self.classifier(self.pool(self.features(x)).flatten(1))

    cut = find_cut(Wrapped(), IMAGES)
    assert [stage for stage, _ in cut.stages] == ["layer1", "layer2", "feature"]
    assert cut.head == "classifier.1"


def test_a_stack_of_linear_layers_has_stages_without_maps():
    cut = find_cut(nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(),
                                 nn.Linear(4, 3)), IMAGES)  # fmt: skip
    assert names(cut) == {"layer1": ["0", "1", "2"], "layer2": ["3", "4"], "feature": []}
    assert cut.maps == 0


@pytest.mark.parametrize(("declared", "stages"), [
    ({"layer1": "layer1", "layer2": "layer2.0"}, ["layer1", "layer2", "feature"]),
    ({"early": "relu", "late": "layer2"}, ["early", "late", "feature"]),
    (["layer1", "layer2"], ["layer1", "layer2", "feature"]),
])  # fmt: skip
def test_declared_stages_end_where_they_say(declared, stages):
    cut = find_cut(Residual(), IMAGES, declared)
    assert [stage for stage, _ in cut.stages] == stages
    ends = [pieces[-1] for _, pieces in cut.stages[:-1]]
    assert ends == list(declared.values() if isinstance(declared, dict) else declared)


@pytest.mark.parametrize(("declared", "said"), [
    ({"layer1": "layer3"}, 'ends "layer1" with "layer3", which is no submodule'),
    ({"a": "layer2", "b": "layer1"}, 'has "b" after a stage that ends later'),
    ({"feature": "layer1"}, "without a stage called feature"),
    ("layer1", "must name submodules"),
    ([], "must name submodules"),
])  # fmt: skip
def test_stages_that_do_not_exist(declared, said):
    with pytest.raises(UserError, match=said):
        find_cut(Residual(), IMAGES, declared)


class Pairs(nn.Module):
    """A module that is called with more than a tensor."""

    class Part(nn.Linear):
        def forward(self, pair):
            return super().forward(pair.images.flatten(1))

    def __init__(self):
        super().__init__()
        self.part, self.head = self.Part(768, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.part(types.SimpleNamespace(images=x)))


class Zero(Tutorial):
    """A network whose classifier starts at zero, so that every cut would have the same logits."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.fc2.weight)


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = sequence()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.body(x) * self.scale


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.one, self.two, self.head = (nn.Linear(n, m) for n, m in ((768, 4), (4, 4), (4, 4), (4, 3)))
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(self.two(self.one(self.start(x.flatten(1)))))


class InPlace(nn.Module):
    """A network that zeroes its images in place, so that a later pass without this step agrees."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x.mul_(0)))


@pytest.mark.parametrize(("make", "why"), [
    (Tutorial, "give other logits|do not run"),
    (Pairs, "do not run one after another"),
    (Zero, "give other logits|do not run"),
    (Raw, "parameters outside"),
    (Tied, "one and two share parameters"),
    (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "no linear layer"),
    (lambda: nn.Linear(16, 3), "no submodules"),
    (InPlace, "give other logits"),
])  # fmt: skip
def test_why_a_network_is_not_cut(make, why):
    with pytest.raises(NotCut, match=why):
        find_cut(make(), IMAGES)


def test_dropout_between_the_modules_shows_in_train_mode():
    class Dropping(nn.Sequential):
        def forward(self, x):
            layers = list(self)
            x = F.dropout(nn.Sequential(*layers[:4])(x), 0.5, self.training)
            return nn.Sequential(*layers[4:])(x)

    with pytest.raises(NotCut, match="give other logits"):
        find_cut(Dropping(OrderedDict(sequence().named_children())), IMAGES)


def test_the_classifier_is_the_layer_that_gives_the_logits():
    assert find_head(Tutorial(), IMAGES) == "fc2"
    assert find_head(Zero(), IMAGES) == "fc2"
    assert find_head(Pairs(), IMAGES) == "head"
    assert find_head(Tied(), IMAGES) == "head"
    assert find_head(Raw(), IMAGES) is None  # the logits are scaled
    assert find_head(nn.Sequential(sequence(), nn.LogSoftmax(1)), IMAGES) is None


def test_cutting_changes_nothing_and_draws_nothing():
    network = Residual()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    find_cut(network, IMAGES)
    find_head(network, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
