"""FedIOD's options; docs/fediod.md says what each was measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from fedkern.methods.base import Method
from fedkern.methods.fediod.privacy_options import PrivacyOptions
from fedkern.typed_option import option


@dataclass(frozen=True)
class IODOptions(PrivacyOptions, Method.Options):
    """Options of FedIOD; the defaults are the settings of docs/fediod.md."""

    mode: str = option(
        "generator",
        "images that the student learns on: generated ones, or public ones (then only outputs travel)",
        choices=("generator", "public"),
    )
    models: str = option(
        "", "networks of the clients in turn, as name[:width] separated by commas; empty: --model for all"
    )
    holdout: float = option(
        0.0,
        "share of a client's samples that its teacher does not train on; its discriminator sees them",
        low=0,
        high=0.9,
    )
    iterations: int = option(30, "iterations of a round; 0: as many as the largest client has batches", low=0)
    batch: int = option(32, "generated images per step, and real ones per step of a discriminator", low=2)
    warmup: float = option(
        0.5,
        "share of the iterations before the student's first one; until then only generator and discriminators learn",
        low=0,
        high=0.99,
    )
    student_steps: int = option(3, "steps of the student per iteration, each on fresh images", low=1)
    ngf: int = option(16, "base number of the generator's channels: its layers have 4, 2 and 1 times as many", low=1)
    ndf: int = option(16, "channels of a discriminator's first map", low=1)
    critic_layers: int = option(
        0,
        "convolutions of stride 2 in a discriminator: 2 judge 10 x 10 pixels at once, 3 22 x 22, 4 46 x 46; 0: "
        "enough to judge a whole image",
        choices=(0, 2, 3, 4, 5, 6, 7, 8),
    )
    generator_lr: float = option(1e-3, "learning rate of the generator (Adam, cosine to 0)", above=0)
    critic_lr: float = option(2e-4, "learning rate of the discriminators (Adam, cosine to 0)", above=0)
    student_optimizer: str = option(
        "sgd",
        "optimiser of the student; a segmentation network learns much faster with adamw",
        choices=("sgd", "adamw"),
    )
    student_lr: float = option(0.05, "initial learning rate of the student (cosine to 1e-5)", above=0)
    w_real: float = option(8.0, "weight of the realism loss; clarity and diversity have the weight 1", low=0)
    w_balance: float = option(2.0, "weight of the loss for balanced classes in a batch", low=0)
    class_weights: str = option(
        "counts",
        "weight of a client for a class: counts (its share of the class's samples), or uniform (equal among all; "
        "discloses nothing)",
        choices=("counts", "uniform"),
    )
    disc_weight: bool = option(False, "scale a client's weight by its discriminator's confidence")
    pixels: str = option(
        "float32", "data type of images in messages; uint8 takes a quarter of the bytes", choices=("float32", "uint8")
    )
    batched: bool = option(
        True, "ask the clients' networks in one pass where the clients share a process; off: as workers and nodes do"
    )
