"""Networks made on the meta device get memory as torch's to_empty gives it, without what that imports."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fedkern import UserError, models
from fedkern.models.allocate import allocate
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["cnn", "resnet8", "unet"])
def test_building_a_network_imports_no_symbolic_algebra(name):
    code = (
        "import sys, fedkern.models as m; "
        f"m.build({name!r}, classes=3, channels=3, image_size=32, seed=0); "
        "sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


STEPS = (
    "import sys, torch; from fedkern.models.optimisers import SGD, Adam; x = torch.ones(3); x.grad = x.clone()\n"
    "SGD([x], 0.1, 0.9).step(); Adam([x], 0.1).step(); print(x.numel())"
)
FUSED = (
    "import sys, torch; from torch import nn; from fedkern.models.fused import make_adaptor\n"
    "from fedkern.ops import FusedBlocks\n"
    "make_adaptor('cnn1x1', (4, 3, 3), 2)\n"
    "block = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1))\n"
    "fused = FusedBlocks([block(), block()]).eval(); print(fused(torch.ones(2, 3, 9, 9)).shape[1])"
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("code", "told"), [(STEPS, "3"), (FUSED, "16")], ids=["steps", "fused"])
def test_neither_torchs_compiler_nor_sympy_is_imported(code, told):
    """Importing them takes a second of a run, and of every worker."""
    code += "\nprint(*(name in sys.modules for name in ('torch._dynamo', 'sympy')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == [told, "False", "False"]
