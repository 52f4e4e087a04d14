"""Python attributes of user-defined networks: the compared attributes, and warnings when they change."""

import collections
import functools
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.engine.local.network import Network
from fedkern.models import build
from fedkern.models.users.python_state import SMALL, hash_attributes
from fedkern.models.users.user_models import Own, OwnNetwork
from python_tests import own_networks

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
