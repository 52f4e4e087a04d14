"""Networks that hypothesis makes: what waits has torch's bits, and what operators serve is near float64."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedkern
from fedkern.deferred import calls
from python_tests.guest_networks import close, equal, played

LAYERS = ("conv3", "conv3", "conv1", "strided", "biased", "norm", "norm", "norm", "group", "relu", "relu_", "function",
          "pool", "add", "iadd", "scale", "dropout", "twice")  # fmt: skip


class Made(nn.Module):
    """Layers in a row; sums take the latest map of the same shape."""

    def __init__(self, names, channels):
        super().__init__()
        self.names, self.layers = names, nn.ModuleList()
        for name in names:
            kind = {"conv3": 3, "biased": 3, "strided": 3, "conv1": 1}.get(name)
            layer = nn.Identity()
            if kind is not None:
                stride = 2 if name == "strided" else 1
                layer = nn.Conv2d(channels, channels, kind, stride, kind // 2, bias=name == "biased")
            elif name == "norm":
                layer = nn.BatchNorm2d(channels)
            elif name == "group":
                layer = nn.GroupNorm(4, channels)
            elif name in ("relu", "relu_"):
                layer = nn.ReLU(inplace=name == "relu_")
            elif name == "pool":
                layer = nn.MaxPool2d(2)
            self.layers.append(layer)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        x = x.repeat(1, 11, 1, 1)[:, : self.head.in_features]
        seen = [x]
        for name, layer in zip(self.names, self.layers, strict=True):
            if name == "relu_":  # nobody else may hold what changes
                x = x + 0
            if name in ("pool", "strided") and x.shape[2] < 4:
                continue
            x = layer(x)
            same = next((each for each in reversed(seen) if each.shape == x.shape), None)
            if name == "function":
                x = F.relu(x)
            elif name == "scale":
                x = x * 0.5
            elif name == "dropout":
                x = F.dropout(x, 0.25, self.training)
            elif name == "add" and same is not None:
                x = x + same
            elif name == "iadd" and same is not None:
                x = (x + 0).add_(same)
            elif name == "twice":
                x = F.relu(x) - 0.1 * x
            if name in ("conv3", "norm", "add"):
                seen.append(x)
        return self.head(x.mean((2, 3)))


def network(names, channels, seed):
    torch.manual_seed(seed)
    return Made(names, channels)


names = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(names=names, channels=st.sampled_from([8, 16, 32]), seed=st.integers(0, 3))
def test_what_waits_has_the_bits_of_any_network(names, channels, seed):
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    plain = network(names, channels, seed)
    other, serve = fedkern.accelerate(copy.deepcopy(plain)), calls._serve
    calls._serve = lambda chain, dense: None
    try:
        assert equal(played(other, images), played(plain, images), exact=False)
    finally:
        calls._serve = serve


@settings(max_examples=40, deadline=None)
@given(names=names, channels=st.sampled_from([16, 32]), seed=st.integers(0, 3))
def test_what_is_served_is_near_float64(names, channels, seed):
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    plain = network([each for each in names if each != "dropout"], channels, seed)
    exact = played(copy.deepcopy(plain).double(), images.double())
    found = played(fedkern.accelerate(plain), images)
    found = tuple(_double(part) for part in found)
    close(found, exact)


def _double(part):
    if isinstance(part, list):
        return [each.double() for each in part]
    return {name: None if each is None else each.double() if each.is_floating_point() else each
            for name, each in part.items()}  # fmt: skip
