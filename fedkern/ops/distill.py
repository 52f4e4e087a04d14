"""distill: losses on rows of class logits (class axis 1): divergences and entropies, of one teacher or of K.

This module collects the family. References, public functions with their autograd, torch.library entries and kernels
are in the other ``distill_*`` files.
"""

from __future__ import annotations

from fedkern.ops import distill_launch as _cpu  # noqa: F401  registers the CPU kernels
from fedkern.ops.cuda import core as cuda
from fedkern.ops.cuda.distill import CudaDistill
from fedkern.ops.distill_consensus import consensus, js_div
from fedkern.ops.distill_ensemble import ensemble_kl
from fedkern.ops.distill_entropy import entropy
from fedkern.ops.distill_kernels import ALL_DTYPES
from fedkern.ops.distill_kl import dual_kl, kl_div
from fedkern.ops.distill_reference import entropy_reference, kl_div_reference

__all__ = [
    "consensus",
    "dual_kl",
    "ensemble_kl",
    "entropy",
    "entropy_reference",
    "js_div",
    "kl_div",
    "kl_div_reference",
]

for _name in ("kl_div", "dual_kl", "entropy", "ensemble_kl", "js_div", "consensus"):
    cuda.register(_name, CudaDistill, ALL_DTYPES)
