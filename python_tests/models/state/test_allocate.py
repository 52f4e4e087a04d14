"""Networks from the meta device get memory as from torch's to_empty, without its imports."""

import pytest
import torch
from torch import nn

from fedkern import UserError, models
from fedkern.models.state.allocate import allocate
from fedkern.process import machine


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("kept", torch.ones(2, device="cpu"))
        self.register_buffer("none", None)


def test_as_to_empty():
    with torch.device("meta"):
        ours, torchs = Tied(), Tied()
    allocate(ours)
    torchs.to_empty(device="cpu")
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(module, kind)(remove_duplicate=False)) for module in (ours, torchs))
        assert list(a) == list(b)
        for name, tensor in a.items():
            assert type(tensor) is type(b[name])
            assert (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device) == (
                b[name].shape, b[name].dtype, b[name].requires_grad, b[name].device,
            )  # fmt: skip
    assert ours.first.weight is ours.second.weight
    assert ours.kept.tolist() == [1, 1]


def test_a_network_without_memory_is_refused_before_it_takes_any(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1_000_000_000)
    with pytest.raises(UserError, match=r"takes 0\.5 GB, twice that with its copies, and the machine has 1\.0 GB free"):
        models.build("mlp", classes=10, channels=1, image_size=8, seed=0, width=1 << 13)
