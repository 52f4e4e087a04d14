"""Fast operators for federated learning, most of them differentiable.

A plain PyTorch reference specifies each.
"""

from fedkern.ops._aggregate.accumulator import Accumulator
from fedkern.ops._aggregate.distances import geometric_median, krum, pairwise_distances
from fedkern.ops._aggregate.lora import lora_merge
from fedkern.ops._aggregate.mean import weighted_mean
from fedkern.ops._aggregate.robust import clip_and_noise, clip_by_norm, median, trimmed_mean
from fedkern.ops._aggregate.server_step import ServerStep, server_step
from fedkern.ops._blend.blend import blend
from fedkern.ops._blend.boxes import erase_boxes, keep_boxes
from fedkern.ops._contrast.contrast import contrastive
from fedkern.ops._conv.conv_norm import conv_norm, conv_pool
from fedkern.ops._core.backend import use_backend, use_isa
from fedkern.ops._core.memory import empty_cache
from fedkern.ops._core.torchscript import unscriptable
from fedkern.ops._distill.consensus import consensus, js_div
from fedkern.ops._distill.ensemble import ensemble_kl
from fedkern.ops._distill.entropy import entropy
from fedkern.ops._distill.kl import dual_kl, kl_div
from fedkern.ops._fuse.fuse import fuse_concat, fuse_mean
from fedkern.ops._fuse.fused_blocks import FusedBlocks
from fedkern.ops._optimise.optimise import StepResult, adamw_step, sgd_step
from fedkern.ops.flat import FlatParameters

__all__ = [
    "Accumulator", "FlatParameters", "FusedBlocks", "ServerStep", "StepResult", "adamw_step", "blend", "clip_and_noise",
    "clip_by_norm", "consensus", "contrastive", "conv_norm", "conv_pool", "dual_kl", "empty_cache", "ensemble_kl",
    "entropy", "erase_boxes", "fuse_concat", "fuse_mean", "geometric_median", "js_div", "keep_boxes", "kl_div", "krum",
    "lora_merge", "median", "pairwise_distances", "server_step", "sgd_step", "trimmed_mean", "use_backend", "use_isa",
    "weighted_mean",
]  # fmt: skip

for _public in __all__:
    unscriptable(globals()[_public])
