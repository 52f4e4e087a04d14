"""FedIOD's options, and the values that the presets ``study``, ``paper`` and ``code`` give to open options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.fediod.privacy_options import PrivacyOptions
from fedkern.typed_option import option

PUBLISHED: Mapping[str, Any] = {
    "iterations": 0, "batch": 64, "warmup": 0.0, "student_steps": 5, "nz": 100, "ngf": 64, "ndf": 128,
    "critic_layers": 2, "generator_lr": 1e-4, "critic_lr": 1e-4, "student_lr": 5e-3,
    "student_decay": 3e-5, "ema": 0.0, "kd": "logit_var",
}  # fmt: skip
"""Sizes, steps and learning rates of the released CIFAR-10 script (docs/methods/fediod.md, section 9)."""
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "study": {
        "w_real": 8.0, "w_clear": 1.0, "w_diverse": 1.0, "w_adv": 0.0, "w_balance": 2.0, "js_sign": -1,
        "diversity": "jsd", "disc_weight": False, "bce": "mean", "mix": "log_probs",
    },
    "paper": {
        **PUBLISHED,
        "w_real": 1.0, "w_clear": 1.0, "w_diverse": 1.0, "w_adv": 0.0, "w_balance": 0.0, "js_sign": -1,
        "diversity": "jsd", "disc_weight": True, "bce": "mean", "mix": "log_probs",
    },
    "code": {
        **PUBLISHED,
        "w_real": 1.0, "w_clear": 1.0, "w_diverse": 5.0, "w_adv": 0.2, "w_balance": 10.0, "js_sign": 1,
        "diversity": "reverse_kl", "disc_weight": False, "bce": "sum", "mix": "logits",
    },
}  # fmt: skip
"""Values of each preset for the options that the user leaves open (docs/methods/fediod.md, section 9).

``study`` has no sizes, steps or rates: the plain defaults of these options are the study's (docs/fediod.md).
"""


@dataclass(frozen=True)
class IODOptions(PrivacyOptions, Method.Options):
    """Options of FedIOD; the defaults are the settings of docs/fediod.md, the published settings :data:`PUBLISHED`."""

    preset: str = option(
        "study",
        "source of the options that are left open: our study, the paper, or the released code's CIFAR-10 script."
        " paper and code take the script's sizes and learning rates, and about ten times as long for an "
        "iteration",
        choices=("study", "paper", "code"),
    )
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
    select: str = option(
        "last",
        "teacher that is kept: that of the last epoch, or the best one on the client's own hold-out",
        choices=("last", "best"),
    )
    teacher_lr_end: float | None = option(
        None, "final learning rate of a teacher's cosine schedule; open: a constant learning rate", low=0, type=float
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
    nz: int = option(100, "dimensions of the generator's noise", low=1)
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
    student_decay: float = option(3e-5, "weight decay of the student", low=0)
    ema: float = option(
        0.0,
        "decay of a moving average of the generator, which then makes the student's images; 0: no average",
        low=0,
        high=0.99999,
    )
    w_real: float | None = option(None, "weight of the realism loss", low=0, type=float)
    w_clear: float | None = option(None, "weight of the clarity loss (mean entropy of the teachers)", low=0, type=float)
    w_diverse: float | None = option(None, "weight of the diversity loss", low=0, type=float)
    w_adv: float | None = option(
        None, "weight of the adversarial loss (images that are hard for the student)", low=0, type=float
    )
    w_balance: float | None = option(None, "weight of the loss for balanced classes in a batch", low=0, type=float)
    diversity: str | None = option(
        None,
        "diversity loss: jsd (between clients), reverse_kl (released code), mutual_information (of image and "
        "class), none",
        choices=("jsd", "reverse_kl", "mutual_information", "none"),
        type=str,
    )
    js_sign: int | None = option(
        None,
        "sign of the diversity loss: -1 maximises the diversity (paper), 1 minimises it (released code)",
        choices=(-1, 1),
        type=int,
    )
    class_weights: str = option(
        "counts",
        "weight of a client for a class: counts (its share of the class's samples), known (equal among the "
        "clients that have the class), uniform (equal among all; discloses nothing)",
        choices=("counts", "known", "uniform"),
    )
    disc_weight: bool | None = option(None, "scale a client's weight by its discriminator's confidence", type=bool)
    mix: str | None = option(
        None,
        "what the ensemble averages: the teachers' logits (released code), log-probabilities or probabilities",
        choices=("log_probs", "logits", "probs"),
        type=str,
    )
    kd: str = option(
        "logit_var",
        "loss of the student: logit_var (half the variance of the logit difference, the limit of high "
        "temperature), kl (divergence at a temperature), l1 (mean absolute difference)",
        choices=("logit_var", "kl", "l1"),
    )
    temperature: float = option(4.0, "temperature of kd=kl", above=0, infinite=True)
    bce: str | None = option(
        None,
        "reduction of a discriminator's loss: mean over patches, or sum per image",
        choices=("mean", "sum"),
        type=str,
    )
    pixels: str = option(
        "float32", "data type of images in messages; uint8 takes a quarter of the bytes", choices=("float32", "uint8")
    )
    absent: float = option(0.0, "share of the iterations that a client misses, drawn at random", low=0, high=0.99)
    batched: bool = option(True, "ask the clients' networks in one pass where the clients share a process")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "best" and self.holdout == 0:
            raise UserError(
                'Method option "select" = best needs a hold-out: give holdout above 0, or keep the last epoch.'
            )
        if self.mode == "public" and self.absent:
            raise UserError(
                'Method option "absent" is for mode=generator; with mode=public clients answer once, before the '
                "student learns: leave it out."
            )

    @classmethod
    def resolved(cls, values: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
        """Fills in the preset's values.

        A preset that the user names overrules the data set's defaults.  Otherwise it only fills options without a
        value.  An option that the user gives stays as it is.
        """
        named = "preset" in chosen
        preset = PRESETS[str(values["preset"])]
        return {
            name: preset[name] if name in preset and name not in chosen and (named or value is None) else value
            for name, value in values.items()
        }


def settle(options: IODOptions) -> Any:
    """The options with the preset's values for open ones."""
    preset = PRESETS[options.preset]
    return replace(options, **{name: value for name, value in preset.items() if getattr(options, name) is None})
