"""Tensors on the CPU give results on the CPU, whatever torch's default device is or was at the import."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALLS = """
import torch
{before}
a, b, k = (torch.randn(s, device="cpu", requires_grad=True) for s in ((40, 30), (40, 30), (12, 40, 30)))
flat, images = b.detach(), torch.rand(1, 2, 4, 4, device="cpu")
convolved = torch.rand(2, 8, 8, 3, device="cpu").permute(0, 3, 1, 2)
calls = {{
    "kl_div": lambda: ops.kl_div(a, b),
    "kl_div, rows": lambda: ops.kl_div(a, b, reduction="none"),
    "kl_div, hot": lambda: ops.kl_div(a, b, 1e3),
    "dual_kl": lambda: ops.dual_kl(a, b, b, float("inf")),
    "entropy": lambda: ops.entropy(a),
    "ensemble_kl": lambda: ops.ensemble_kl(a, k),
    "js_div": lambda: ops.js_div(k),
    "consensus": lambda: sum(ops.consensus(k)),
    "consensus, one": lambda: ops.consensus(k)[1],
    "contrastive": lambda: ops.contrastive(a, b),
    "blend": lambda: ops.blend(a, b),
    "boxes": lambda: ops.erase_boxes(images, torch.zeros(1, 1, 4, device="cpu")),
    "fuse_mean": lambda: ops.fuse_mean([a, b]),
    "conv_norm": lambda: ops.conv_norm(convolved, a[:9].view(10, 3, 3, 3)[:8], a[0, :8], b[0, :8], None, None),
    "conv_pool": lambda: ops.conv_pool(convolved, a[:9].view(10, 3, 3, 3)[:8], a[0, :8], padding=1),
    "weighted_mean": lambda: ops.weighted_mean(flat, [1.0] * 40),
    "median": lambda: ops.median(flat),
    "krum": lambda: ops.krum(flat, 2),
    "clip_and_noise": lambda: ops.clip_and_noise(flat, 1.0, 1.0, 3),
    "sgd_step": lambda: ops.sgd_step(flat[0].clone(), flat[1], lr=0.1).squared_norm,
    "server_step": lambda: ops.server_step(flat[0], flat, [1.0] * 40).model,
}}
for name, call in calls.items():
    result = call()
    assert result.is_cpu and result.isfinite().all(), name
    for x in (a, b, k) if result.requires_grad else ():
        (gradient,) = torch.autograd.grad(result.sum(), x, allow_unused=True, retain_graph=True)
        assert gradient is None or gradient.is_cpu, name
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "before",
    [
        "torch.set_default_device('meta')\nfrom fedkern import ops\ntorch.set_default_device(None)",
        "with torch.inference_mode(), torch.device('meta'):\n    from fedkern import ops",
        "from fedkern import ops\ntorch.set_default_device('meta')",
    ],
    ids=["import", "import within modes", "calls"],
)
def test_the_default_device_changes_nothing(before: str) -> None:
    subprocess.run([sys.executable, "-c", CALLS.format(before=before)], check=True, timeout=300)
