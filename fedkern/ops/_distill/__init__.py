"""distill: losses on rows of class logits (class axis 1): divergences and entropies, of one teacher or of K."""

from __future__ import annotations

from fedkern.ops._core.backend import serve
from fedkern.ops._distill.consensus import consensus, js_div
from fedkern.ops._distill.ensemble import ensemble_kl
from fedkern.ops._distill.entropy import entropy
from fedkern.ops._distill.kernels import DistillKernels
from fedkern.ops._distill.kl import dual_kl, kl_div

__all__ = [
    "consensus",
    "dual_kl",
    "ensemble_kl",
    "entropy",
    "js_div",
    "kl_div",
]

for _name, _check in (
    *[(name, "logits_fit") for name in ("kl_div", "dual_kl", "entropy")],
    *[(name, "tensors_fit") for name in ("ensemble_kl", "js_div", "consensus")],
):
    serve(
        _name,
        cpu=DistillKernels,
        cuda=DistillKernels,
        triton="_distill.triton.distill:TritonDistill",
        fits=_check,
    )
