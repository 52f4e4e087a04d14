"""Options of FedIOD, the plan's numbers and the releases that epsilon covers.

docs/fediod.md has the measured effect of each option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.common.oneshot import CLASS_WEIGHTS, TeacherOptions
from fedkern.methods.protocol import Federation
from fedkern.privacy import IMAGE, Guarantee, Unit
from fedkern.typed_option import option


@dataclass(frozen=True)
class IODOptions(TeacherOptions, Method.Options):
    """Options of FedIOD.

    The defaults are the settings of docs/fediod.md.
    """

    epsilon: float | None = option(
        None, "target epsilon of the whole run, for the releases that are covered (all of them with teacher_dp). The "
        "run solves for the noise on the discriminators' gradients, and with teacher_dp for that of DP-SGD",
        above=0,
    )  # fmt: skip
    delta: float = option(1e-5, "delta at which epsilon is met or reported", above=0, high=0.5)
    shards: int = option(
        1, "disjoint parts of a client's data, each with its own discriminator. A secret draw chooses the "
        "discriminator that serves a step", low=1,
    )  # fmt: skip
    clip_d: float = option(
        0.03, "clipping norm of an image's gradient through the discriminator, before the client's weight and w_real. "
        "Choose it near the median norm; a non-private run on public data of the same kind reports that median as "
        "norm_d (with m shards, of the first m-th of the run)", above=0,
    )  # fmt: skip
    histogram_noise: float = option(
        0.0, "standard deviation of the noise on a client's class counts, in images (for segmentation, all pixels of "
        "an image). 0: the exact counts", low=0,
    )  # fmt: skip
    teacher_dp: bool = option(
        False, "train the teachers with DP-SGD, so that their logits and gradients are covered; needs epsilon"
    )
    noise: str = option(
        "secret", "source of noise and secret draws: 128 bits that every client draws and keeps (each release has a "
        "key made of them), or the run's seed. With the seed a run can be repeated, and epsilon holds only while the "
        "seed is secret", choices=("secret", "seed"),
    )  # fmt: skip
    teacher_share: float = option(0.5, "least share of epsilon for the teacher, with teacher_dp", low=0.01, high=0.99)
    mode: str = option(
        "generator",
        "images that the student learns on: generated ones, or public ones (then only outputs travel)",
        choices=("generator", "public"),
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
    class_weights: str = option("counts", CLASS_WEIGHTS, choices=("counts", "uniform"))
    disc_weight: bool = option(False, "scale a client's weight by its discriminator's confidence")
    pixels: str = option(
        "float32", "data type of images in messages; uint8 takes a quarter of the bytes", choices=("float32", "uint8")
    )
    batched: bool = option(
        True, "ask the clients' networks in one pass where the clients share a process; off: as workers and nodes do"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_dp and self.epsilon is None:
            raise UserError('Method option "teacher_dp" needs a target for its noise: give epsilon with it.')
        if self.epsilon is not None and not (self.teacher_dp or self.makes_images):
            raise UserError(
                'Method option "mode" = public sends no gradients to add noise to: only teacher_dp makes it private.'
            )
        if self.shards > 1 and not self.noises_gradients:
            raise UserError(
                'Method option "shards" is for the gradients through the discriminators: give epsilon with it.'
            )

    @property
    def makes_images(self) -> bool:
        return self.mode == "generator"

    @property
    def noises_gradients(self) -> bool:
        """True if gradients are clipped and noised, each client's alone."""
        return self.makes_images and self.epsilon is not None

    @property
    def tells_counts(self) -> bool:
        return self.class_weights != "uniform"

    @property
    def noises_counts(self) -> bool:
        return self.histogram_noise > 0 and self.tells_counts

    @property
    def tells_scores(self) -> bool:
        """True if clients send the discriminators' confidences in every image.

        Noise that covers them at every step would be tens of times larger, so a private client withholds them.
        """
        return self.makes_images and self.disc_weight and not self.noises_gradients

    @property
    def needs_realism(self) -> bool:
        return self.makes_images and self.w_real > 0

    @property
    def claims_privacy(self) -> bool:
        return self.epsilon is not None or self.noises_counts

    @property
    def draws_secrets(self) -> bool:
        return self.noise != "seed" and self.claims_privacy

    def count_batches(self, samples: int) -> int:
        """Return the batches of a client's samples: its most discriminator steps in a round."""
        return math.ceil(samples / self.batch)

    def count_iterations(self, federation: Federation) -> int:
        return self.iterations or self.count_batches(max(federation.samples))

    def count_steps(self, federation: Federation) -> int:
        """Return the iterations of a run, which each ask a client for one gradient."""
        return federation.rounds * self.count_iterations(federation)

    def find_first_taught(self, federation: Federation) -> int:
        return int(self.warmup * self.count_steps(federation)) if self.makes_images else 0

    def guarantee(self, unit: Unit = IMAGE) -> Guarantee | None:
        """Return the guarantee of a run, or None if nothing is private."""
        if not self.claims_privacy:
            return None
        covers: dict[str, str] = {}
        leaves: dict[str, str] = {}

        def place(name: str, text: str, covered: bool) -> None:
            (covers if covered else leaves)[name] = text

        if self.needs_realism:
            text = "the generator's gradients through the discriminators"
            place("discriminator_gradients", text, self.epsilon is not None)
        if self.makes_images:
            place("teacher_gradients", "the generator's gradients through the teachers", self.teacher_dp)
        text = "the teachers' answers that the student learns from"
        if self.makes_images and not self.teacher_dp:  # every gradient depends on the mixture of the answers
            text = "the teachers' answers (which change the student and other clients' gradients)"
        place("teacher_logits", text, self.teacher_dp)
        if self.tells_counts:
            place("class_counts", "the clients' class counts", self.histogram_noise > 0)
        if self.tells_scores:
            leaves["scores"] = "the discriminators' confidence in every image"
        seeded = self.noise == "seed"
        secrets = "" if seeded else ", and their secret bits"
        conditions = [f"checkpoints/ (the clients' networks as they are{secrets}) stays with the clients"]
        return Guarantee(
            self.delta, covers, leaves, (*conditions, *["the run's seed stays secret"] * seeded), unit=unit,
            follows="the released generator and student" if self.makes_images else "the released student",
            advice="" if self.teacher_dp else "teacher_dp=true covers what comes from the teachers",
            derived_figures=("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted"),
        )  # fmt: skip
