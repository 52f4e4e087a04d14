"""Privacy options of FedIOD and the epsilon they give (docs/methods/fediod.md, section 12).

This module sees no data; the mechanisms are in `fedkern.methods.fediod.private_messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError
from fedkern.methods.options import Options
from fedkern.privacy import IMAGE, Guarantee, Unit
from fedkern.typed_option import option


@dataclass(frozen=True)
class PrivacyOptions(Options):
    """Options of FedIOD's differential privacy."""

    epsilon: float | None = option(
        None, "target epsilon of the whole run, for the releases that are covered (all of them with teacher_dp). The "
        "run solves for the noise on the discriminators' gradients, and with teacher_dp for that of DP-SGD",
        above=0, type=float,
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_dp and self.epsilon is None:
            raise UserError('Method option "teacher_dp" needs a target for its noise: give epsilon with it.')
        if self.epsilon is not None and not (self.teacher_dp or generates(self)):
            raise UserError(
                'Method option "mode" = public sends no gradients to add noise to: only teacher_dp makes it private.'
            )
        if self.shards > 1 and not private(self):
            raise UserError(
                'Method option "shards" is for the gradients through the discriminators: give epsilon with it.'
            )


def generates(options: Any) -> bool:
    """Return whether the run has a generator, for whose images the clients send gradients."""
    return bool(getattr(options, "mode", "generator") == "generator")


def private(options: Any) -> bool:
    """Return whether the clients' gradients are clipped and noised, so that each client's are needed alone."""
    return generates(options) and options.epsilon is not None


def tells_counts(options: Any) -> bool:
    """Return whether clients disclose their class counts."""
    return bool(options.class_weights != "uniform")


def tells_scores(options: Any) -> bool:
    """Return whether clients send the discriminators' mean confidence in every image, in (0, 1), to the server.

    Noise that covers B confidences at every step would be tens of times larger than the confidences.  So a private
    client withholds them, and the ensemble's weights follow the classes alone.
    """
    return generates(options) and bool(options.disc_weight) and not private(options)


def asks_discriminators(options: Any) -> bool:
    """Return whether the generator's loss uses the discriminators at all."""
    return generates(options) and options.w_real > 0


def noises_counts(options: Any) -> bool:
    """Return whether clients disclose class counts with noise."""
    return options.histogram_noise > 0 and tells_counts(options)


def claims(options: Any) -> bool:
    """Return whether the options ask for differential privacy of anything."""
    return options.epsilon is not None or noises_counts(options)


def guarantee(options: Any, unit: Unit = IMAGE) -> Guarantee | None:
    """Return the guarantee of a run: which of a client's releases epsilon covers and which not.

    None where nothing is private.  ``teacher_dp`` covers everything that is computed from the teachers.
    """
    if not claims(options):
        return None
    covers: dict[str, str] = {}
    leaves: dict[str, str] = {}

    def place(name: str, text: str, covered: bool) -> None:
        (covers if covered else leaves)[name] = text

    makes_images = generates(options)
    if asks_discriminators(options):
        text = "the generator's gradients through the discriminators"
        place("discriminator_gradients", text, options.epsilon is not None)
    if makes_images:
        place("teacher_gradients", "the generator's gradients through the teachers", options.teacher_dp)
    text = "the teachers' answers that the student learns from"
    if makes_images and not options.teacher_dp:  # every gradient depends on the mixture of the answers
        text = "the teachers' answers (which change the student and other clients' gradients)"
    place("teacher_logits", text, options.teacher_dp)
    if tells_counts(options):
        place("class_counts", "the clients' class counts", options.histogram_noise > 0)
    if tells_scores(options):
        leaves["scores"] = "the discriminators' confidence in every image"
    conditions = ["checkpoints/ (the clients' networks as they are, and their secret bits) stays with the clients"]
    if options.noise == "seed":
        conditions = [
            "checkpoints/ (the clients' networks as they are) stays with the clients", "the run's seed stays secret"
        ]  # fmt: skip
    return Guarantee(
        options.delta, covers, leaves, tuple(conditions), unit=unit,
        follows="the released generator and student" if makes_images else "the released student",
        advice="" if options.teacher_dp else "teacher_dp=true covers what comes from the teachers",
        derived_figures=("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted"),
    )  # fmt: skip
