"""Smoke test of an installed fedkern, in an empty folder: python smoke.py [CORE], the backend that must serve.

Plays doctor, the README's first command at a small size, its continuation and its report, and an operator's forward
and backward pass.  The workflow of the wheels, python_tests/test_wheel.py and docs/releasing.md run it.
"""

import subprocess
import sys
from pathlib import Path

import torch

import fedkern
from fedkern import ops
from fedkern.ops._core import backend

SMALL = "--rounds 1 --train-samples 60 --clients 2 --local-epochs 1 --width 4 --workers 1".split()  # noqa: SIM905
COMMANDS = (["doctor"], ["fedgid", *SMALL, "--out", "run"], ["extend", "run", "--rounds", "2"], ["report", "run"])

assert Path(fedkern.__file__).resolve().parents[1] != Path(__file__).resolve().parents[1], "this is the checkout"
for command in COMMANDS:
    subprocess.run([sys.executable, "-P", "-m", "fedkern.run", *command], check=True)
for name in ("summary.json", "model.safetensors", "report.html"):
    assert Path("run", name).exists(), name

student, teacher = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.randn(8, 5, dtype=torch.float64)
loss = ops.kl_div(student, teacher, temperature=2.0)
logs = torch.log_softmax(student / 2, 1), torch.log_softmax(teacher / 2, 1)
expected = 4 * torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
for value in (loss, expected):
    value.backward()
    gradient, student.grad = student.grad, None
    print(f"kl_div {value.item():.6f}, norm of the gradient {gradient.norm().item():.6f}")
assert torch.allclose(loss, expected), "the operator and PyTorch disagree"

serving = sorted({row.backend for row in backend.status() if row.serves})
print("smoke test passed:", fedkern.__version__, *serving)
assert set(sys.argv[1:]) <= set(serving), f"{sys.argv[1:]} does not serve, {serving} do"
