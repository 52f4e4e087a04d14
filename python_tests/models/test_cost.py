"""What a network costs, counted without importing torch's compiler where that is not needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedkern.models import build
from fedkern.models import cost as module
from fedkern.models.cost import cost, count_flops
from fedkern.models.flops import Counting

NAMES = ["cnn", "mlp", "resnet8", "resnet18", "resnet8-t", "resnet8-gn", "vgg16", "vit-tiny", "mobilenetv2"]


def made(name):
    return build(name, classes=10, channels=3, image_size=32, seed=0, width=None if name == "vit-tiny" else 8)


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_torchs(name, monkeypatch):
    images = torch.zeros(2, 3, 32, 32)
    found = cost(made(name), images)
    monkeypatch.setattr(module, "_PLAIN", set())
    assert isinstance(count_flops(made(name)), module._Torchs)
    assert found == cost(made(name), images)
    assert found.training_flops > found.inference_flops > 0


def test_which_networks_are_counted_by_layers():
    assert isinstance(count_flops(made("resnet8")), Counting)
    for network in (made("vit-tiny"), made("mobilenetv2"), torch.nn.Linear(2, 2), None):
        assert not isinstance(count_flops(network), Counting)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "code",
    [
        "from fedkern.models.cost import cost; cost(network, torch.zeros(2, 3, 32, 32))",
        "from fedkern.models.blocks import cut; cut(network, 2).interfaces((3, 32, 32))",
    ],
    ids=["cost", "blocks"],
)
def test_the_compiler_is_not_imported(code):
    start = "import sys, torch; from fedkern.models import build; "
    start += "network = build('resnet8', classes=3, channels=3, image_size=32, seed=0); "
    subprocess.run([sys.executable, "-c", f"{start}{code}; sys.exit('torch._dynamo' in sys.modules)"], check=True)
