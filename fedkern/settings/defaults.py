"""Default settings: common ones, those of a data set, of a method, and of a method on a data set."""

from collections.abc import Mapping
from typing import Any

from fedkern.data import lookup
from fedkern.models.networks.small_encoders import WIDTH

COMMON: Mapping[str, Any] = {
    "data": "colordigits", "model": "cnn", "rounds": 20, "local_epochs": 2, "batch_size": 32, "optimizer": "sgd",
    "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "image_encoder": "conv", "text_encoder": "words",
    "client_test": 0.0,
}  # fmt: skip

PAIRS: Mapping[str, Any] = {
    "width": WIDTH, "rounds": 15, "local_steps": 20, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05,
    "buffers": "pool",
}  # fmt: skip
"""Image-text pairs: the published optimiser and weight decay, with a learning rate for encoders trained from scratch.
The published average of the clients' batch norm statistics fits no client if clients differ, so all methods estimate
the statistics anew (``pool``)."""

DATA: Mapping[str, Mapping[str, Any]] = {
    "mnist": {"batch_size": 64},
    "fashionmnist": {"batch_size": 64},
    "colormnist": {"rounds": 12, "batch_size": 64},
    "colorfashion": {"rounds": 12, "batch_size": 64},
    "cifar10": {"rounds": 100, "batch_size": 64, "model": "resnet8", "weight_decay": 5e-4},
    "cifar100": {"rounds": 100, "batch_size": 64, "model": "resnet18", "weight_decay": 5e-4},
    "svhn": {"rounds": 100, "batch_size": 64, "model": "resnet8"},
    "folder": {"model": "resnet8"},
    "csv": {"model": "resnet8"},
    "arrays": {"model": "resnet8"},
    "segmentation": {"model": "unet", "batch_size": 16, "optimizer": "adamw", "lr": 0.003},
    "segdigits": {"model": "unet-small", "rounds": 30, "batch_size": 16, "optimizer": "adamw", "lr": 0.003},
    "captions": PAIRS,
    "pairs": {**PAIRS, "client_test": 0.2},
}  # fmt: skip
"""Settings of a data set that differ from the common ones.  Other clients, partitions and correlations are in
``fedkern.data.DATASETS``."""

USUAL = {"pairs": PAIRS}
"""Settings of data sets that are not in `DATA`, by the output of their networks (`fedkern.tasks.Task.network`)."""
NETWORKS = {"pixels": "unet"}
"""Default network by its output, if this is not classes of images."""

ONE_SHOT: Mapping[str, Any] = {"data": "digits", "model": "resnet8", "local_epochs": 20}
"""Settings that FuseFL and its baselines share, so that a client's whole budget is the same in all of them."""

DATA_FREE: Mapping[str, Any] = {
    "ngf": 16, "distill_epochs": 15, "generator_steps": 10, "generator_lr": 0.01, "restart": False, "bn_weight": 1.0,
    "synthesis_batch": 64, "distill_batch": 32, "temperature": 4.0, "distill_lr": 0.01,
}  # fmt: skip
"""Options of the methods with a generator, for small grey images and runs of a minute or two.

So few steps hardly train a generator that restarts for every batch, least of all at the published step size.  The
generator is therefore kept from batch to batch, with a larger step size.
"""

LR_END = 0.4
"""Share of the rate that FedIOD's teachers end with: 0.001 of 0.0025 in the released code (lsl001006/FedIOD at a6630ea,
config.py)."""

FEDIOD: Mapping[str, Any] = {
    **ONE_SHOT, "width": 8, "rounds": 40, "local_epochs": 10, "batch_size": 32, "lr": 0.1, "lr_end": LR_END,
    "weight_decay": 3e-4,
}  # fmt: skip
"""Settings of FedIOD's study (docs/fediod.md), for user-defined data: 1,200 iterations with narrow networks.

The published discriminators look at 10 x 10 pixels and never see the shape of an object of 32 x 32; the defaults of the
method options let them see all of it.  With so few iterations the generated images are of all classes only if realism
and balance weigh more than in the paper.  The student learns from the later images alone.
"""

FEDIOD_SEGMENTS: Mapping[str, Any] = {
    "width": 8, "rounds": 75, "local_epochs": 30, "batch_size": 16, "lr": 0.01,
    "options": {
        "iterations": 4, "batch": 16, "student_steps": 4, "generator_lr": 2e-3, "critic_lr": 1e-3, "critic_layers": 2,
        "warmup": 0.25, "w_balance": 1.0, "disc_weight": True, "student_optimizer": "adamw", "student_lr": 3e-3,
    },
}  # fmt: skip
"""FedIOD on segmentation data.  The student's optimiser is AdamW: in so few steps SGD hardly trains a U-Net, not even
on real images."""

METHOD: Mapping[str, Mapping[str, Any]] = {
    "fedlpfm": {"data": "digits", "public_samples": 300},
    "fml": {"data": "digits"},
    **dict.fromkeys(("fusefl", "oneshot-fedavg", "ccvr", "fedcgs", "dense"), ONE_SHOT),
    "ensemble": {**ONE_SHOT, "lr_end": LR_END},
    "feddf": {**ONE_SHOT, "public_samples": 1000},
    "feddra": {"data": "captions"},
    "fediod": FEDIOD,
}
"""Settings that differ from the data set's, by method: ``data`` is its default data set, ``options`` are method options
by published name.  FedAvg and FedProx use the data set's settings, so that comparisons are fair."""

METHOD_ON: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # Short rounds without momentum: under a class split batch norm's statistics drift apart within a long round.
    ("fml", "digits"): {"partition": "classes:2", "rounds": 40, "local_epochs": 1, "momentum": 0.0},
    ("fedlpfm", "digits"): {
        "partition": "classes:2",
        "rounds": 40,
        "local_epochs": 1,
        "lr": 0.1,
        "momentum": 0.0,
        "options": {"lambda": 0.9, "temperature": 4.0},  # the best of a few by validation accuracy, 3 seeds
    },
    # rho: the published radius allows a client with 5 % of the samples a weight of 0.77, at a high cost for the others.
    # stage_schedule: in three seeds the worst client's loss was 4.44 with alternating stages and 3.45 with sequential.
    ("feddra", "captions"): {"options": {"rho": 0.1, "alignment_steps": 10, "stage_schedule": "sequential"}},
    ("feddf", "digits"): {"public_samples": 200},
    # A quarter of the study's iterations, for a run of under three minutes.
    ("fediod", "digits"): {
        "partition": "dirichlet:0.1", "rounds": 32, "local_epochs": 20, "lr": 0.05, "weight_decay": 0.0,
        "options": {"iterations": 10, "critic_lr": 4e-4, "holdout": 0.1},
    },
    ("fediod", "segmentation"): FEDIOD_SEGMENTS,
    ("fediod", "segdigits"): {
        "partition": "dirichlet:0.3", "rounds": 20, "local_epochs": 20, "batch_size": 16, "lr": 0.003,
        "weight_decay": 0.0,
        # w_balance keeps its default: without balance the generator makes backgrounds alone, a sure class for teachers.
        "options": {
            "batch": 16, "iterations": 20, "student_steps": 4, "generator_lr": 2e-3, "critic_lr": 1e-3, "warmup": 0.25,
            "student_optimizer": "adamw", "student_lr": 3e-3, "disc_weight": True, "holdout": 0.1,
        },
    },
    ("dense", "digits"): {"options": DATA_FREE},
}  # fmt: skip
"""Settings by method and data set, which replace those of `METHOD` and `DATA`."""


def default_data(method: str) -> str:
    return str(METHOD.get(method, {}).get("data", COMMON["data"]))


def defaults(method: str, data: str) -> dict[str, Any]:
    """Return the default settings of a run, with differing method options as ``options``."""
    info = lookup(data)
    data_defaults = {"clients": info.clients, "partition": info.partition, "correlation": info.correlation}
    tables = METHOD.get(method, {}), METHOD_ON.get((method, data), {})
    options = {name: value for table in tables for name, value in table.get("options", {}).items()}
    kind = info.task.network
    data_settings = DATA.get(data, USUAL.get(kind, {}))
    result = {**COMMON, **data_defaults, **data_settings, **tables[0], **tables[1], "data": data}
    if kind in NETWORKS:  # networks in METHOD are for classes of images
        result["model"] = {"model": NETWORKS[kind], **DATA.get(data, {}), **tables[1]}["model"]
    return {**result, "options": options} if options else result
