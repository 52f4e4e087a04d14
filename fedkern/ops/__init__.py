"""Fast operators of federated learning, with gradients, each specified by a reference in plain PyTorch."""

from fedkern.ops.aggregate import weighted_mean
from fedkern.ops.aggregate_accumulator import Accumulator
from fedkern.ops.backend import use_backend, use_isa
from fedkern.ops.blend import blend
from fedkern.ops.boxes import erase_boxes, keep_boxes
from fedkern.ops.distill import dual_kl, entropy, kl_div
from fedkern.ops.flat import FlatParameters
from fedkern.ops.fuse import fuse_concat, fuse_mean

__all__ = [
    "Accumulator",
    "FlatParameters",
    "blend",
    "dual_kl",
    "entropy",
    "erase_boxes",
    "fuse_concat",
    "fuse_mean",
    "keep_boxes",
    "kl_div",
    "use_backend",
    "use_isa",
    "weighted_mean",
]
