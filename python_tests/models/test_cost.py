"""Cost of a network, counted without importing torch's compiler unless needed."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedkern.models import build
from fedkern.models import cost as module
from fedkern.models.cost import count_flops, measure_cost

NAMES = ["cnn", "mlp", "resnet8", "resnet18", "resnet8-t", "resnet8-gn", "vit-tiny", "mobilenetv2"]


def make(name):
    return build(name, classes=10, channels=3, image_size=32, seed=0, width=None if name == "vit-tiny" else 8)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_torchs(name, monkeypatch):
    images = torch.zeros(2, 3, 32, 32)
    found = measure_cost(make(name), images)
    monkeypatch.setattr(module, "_PLAIN", set())  # torch counts all networks
    assert found == measure_cost(make(name), images)
    assert found.training_flops > found.inference_flops > 0


def test_which_networks_are_counted_by_layers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.flop_counter", None)
    with count_flops(make("resnet8")):
        pass
    for network in (make("vit-tiny"), make("mobilenetv2"), torch.nn.Linear(2, 2), None):
        with pytest.raises(ImportError), count_flops(network):
            pass


def test_nothing_is_counted_behind_the_end():
    network, images = make("cnn"), torch.zeros(2, 3, 32, 32)
    with count_flops(network) as counted:
        network(images)
    flops = counted.flops
    network(images)
    assert counted.flops == flops > 0


def test_gradients_are_counted_where_there_are_any():
    """The first convolution is frozen, so neither its weights nor its output have a gradient."""
    images = torch.zeros(2, 3, 32, 32)
    network = make("cnn")
    next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)).requires_grad_(False)
    with count_flops(network) as ours:
        network(images).sum().backward()
    with FlopCounterMode(display=False) as torchs:
        network(images).sum().backward()
    assert ours.flops == torchs.get_total_flops() > 0
