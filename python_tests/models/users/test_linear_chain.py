"""Tests of linear_chain: what counts as linear layers with ReLU between them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkern.models.users.linear_chain import linear_chain


class Net(nn.Module):
    """A network as tutorials write it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8)])
        self.head = nn.Sequential(nn.Identity(), nn.Linear(8, 3))

    def forward(self, x):
        x = x.reshape(x.shape[0], 12)
        for layer in self.hidden:
            x = layer(x).relu()
        return self.head(x)


def net(forward):
    return type("Other", (Net,), {"forward": forward})


class Counting(Net):
    def forward(self, x):
        self.size = x.shape
        return self.fc2(F.relu(self.fc1(x)))


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(2 * x)


def with_own_forward():
    network = Net()
    network.fc1.forward = lambda x: F.linear(x, network.fc1.weight)
    return network


def with_a_hook_of_a_parameter():
    network = Net()
    network.fc1.weight.register_post_accumulate_grad_hook(lambda _: None)
    return network


def with_a_hook():
    network = Net()
    network.fc1.register_forward_hook(lambda *_: None)
    return network


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), 1),
    "subclass": (lambda: type("Logistic", (nn.Linear,), {})(4, 3), 1),
    "rows": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), 2),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(type("Wide", (nn.Linear,), {})(12, 8), nn.ReLU()), nn.Linear(8, 3)),
        2,
    ),
    "view": (Net, 2),
    "flatten": (net(lambda self, x: self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))), 2),
    "loop": (Deep, 3),
}


@pytest.mark.parametrize(("make", "count"), LAYERS.values(), ids=LAYERS)
def test_chains_are_found_in_order(make, count):
    network = make()
    layers = linear_chain(network)
    assert layers == [part for part in network.modules() if isinstance(part, nn.Linear)]
    assert len(layers) == count
    x = torch.randn(5, layers[0].in_features)
    y = x
    for place, layer in enumerate(layers):
        y = layer(y if place == 0 else y.relu())
    torch.testing.assert_close(network(x), y, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        net(lambda self, x: self.fc2(F.relu(hidden := self.fc1(x)) + hidden)),
        net(lambda self, x: self.fc2(F.relu(self.fc1(x)) if self.training else self.fc1(x))),
        net(lambda self, x: print(x.shape) or self.fc2(F.relu(self.fc1(x)))),
        net(lambda self, x: self.fc2(F.relu(self.fc1(x))).view(-1, 3)),
        net(lambda self, x: self.fc2(F.relu(self.fc2(x)))),
        Counting, with_a_hook, with_own_forward, with_a_hook_of_a_parameter, nn.ReLU,
        lambda: nn.Sequential(type("Skipped", (nn.Linear,), {"forward": lambda self, x: x})(4, 3)),
        lambda: type("Scaled", (nn.Linear,), {"forward": lambda self, x: F.linear(2 * x, self.weight)})(4, 3),
        lambda: Called(nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 3)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    ],
)  # fmt: skip
def test_other_networks_are_no_chains(make):
    assert linear_chain(make()) is None
