"""Networks with group norm: equal except for their norms, and samples do not affect each other."""

import pytest
import torch
from torch import nn

from fedkern import models


def make(name):
    return models.build(name, classes=4, channels=3, image_size=16, seed=0, width=8)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
def test_only_the_norms_differ(name):
    plain, grouped = make(name), make(f"{name}-gn")
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
