"""Fast operators for federated learning, most of them differentiable; a plain PyTorch reference specifies each."""

from fedkern.ops._memory import empty_cache
from fedkern.ops.aggregate import weighted_mean
from fedkern.ops.aggregate_accumulator import Accumulator
from fedkern.ops.aggregate_distances import geometric_median, krum, pairwise_distances
from fedkern.ops.aggregate_privacy import clip_and_noise, clip_by_norm
from fedkern.ops.aggregate_robust import median, trimmed_mean
from fedkern.ops.aggregate_server_step import ServerStep, server_step
from fedkern.ops.backend import use_backend, use_isa
from fedkern.ops.blend import blend
from fedkern.ops.boxes import erase_boxes, keep_boxes
from fedkern.ops.contrast import contrastive
from fedkern.ops.distill import consensus, dual_kl, ensemble_kl, entropy, js_div, kl_div
from fedkern.ops.flat import FlatParameters
from fedkern.ops.fuse import fuse_concat, fuse_mean
from fedkern.ops.fuse_blocks import FusedBlocks
from fedkern.ops.optimise import StepResult, adamw_step, sgd_step
from fedkern.ops.torchscript import unscriptable

__all__ = [
    "Accumulator",
    "FlatParameters",
    "FusedBlocks",
    "ServerStep",
    "StepResult",
    "adamw_step",
    "blend",
    "clip_and_noise",
    "clip_by_norm",
    "consensus",
    "contrastive",
    "dual_kl",
    "empty_cache",
    "ensemble_kl",
    "entropy",
    "erase_boxes",
    "fuse_concat",
    "fuse_mean",
    "geometric_median",
    "js_div",
    "keep_boxes",
    "kl_div",
    "krum",
    "median",
    "pairwise_distances",
    "server_step",
    "sgd_step",
    "trimmed_mean",
    "use_backend",
    "use_isa",
    "weighted_mean",
]

for _public in __all__:
    unscriptable(globals()[_public])
