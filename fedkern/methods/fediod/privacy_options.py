"""Privacy options of FedIOD and the epsilon they give (docs/methods/fediod.md, section 12).

This module sees no data; the mechanisms are in `fedkern.methods.fediod.private_messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError, listed
from fedkern.methods.fediod.losses import asks_teachers
from fedkern.methods.options import Options
from fedkern.privacy import IMAGE, Guarantee, Unit
from fedkern.typed_option import option


@dataclass(frozen=True)
class PrivacyOptions(Options):
    """Options of FedIOD's differential privacy."""

    epsilon: float | None = option(
        None, "target epsilon of the whole run, for the releases that are covered (all of them with teacher_dp). The "
        "run solves for the noise that is left open: sigma_d, and with teacher_dp teacher_sigma", above=0, type=float,
    )  # fmt: skip
    delta: float = option(1e-5, "delta at which epsilon is met or reported", above=0, high=0.5)
    shards: int = option(
        1, "disjoint parts of a client's data, each with its own discriminator. A secret draw chooses the "
        "discriminator that serves a step", low=1,
    )  # fmt: skip
    clip_d: float | None = option(
        None, "clipping norm of an image's gradient through the discriminator, before the client's weight and w_real. "
        "Choose it near the median norm; a non-private run on public data of the same kind reports that median as "
        "norm_d (with m shards, of the first m-th of the run). Open: 0.03 with bce=mean, 0.3 with bce=sum",
        above=0, type=float,
    )  # fmt: skip
    clip_t: float = option(
        0.5, "clipping norm of an image's gradient through the teacher, before the client's weight. A non-private run "
        "reports the median norm as norm_t", above=0,
    )  # fmt: skip
    sigma_d: float = option(
        0.0, "Gaussian noise on the discriminator channel, in multiples of clip_d. 0: no clipping and no noise, unless "
        "epsilon is set", low=0,
    )  # fmt: skip
    sigma_t: float = option(
        0.0, "Gaussian noise on the teacher channel, in multiples of clip_t. 0: no clipping and no noise", low=0
    )
    scores: str = option(
        "withhold", "what a private client sends of its discriminator's confidence: nothing, or the confidence itself, "
        "which epsilon then does not cover", choices=("withhold", "release"),
    )  # fmt: skip
    histogram_noise: float = option(
        0.0, "standard deviation of the noise on a client's class counts, in images (for segmentation, all pixels of "
        "an image). 0: the exact counts", low=0,
    )  # fmt: skip
    teacher_dp: bool = option(False, "train the teachers with DP-SGD, so that their logits and gradients are covered")
    teacher_clip: float = option(
        1.0, "clipping norm of a sample's gradient in DP-SGD (of the sum of a patient's gradients), in place of "
        "--clip-norm", above=0,
    )  # fmt: skip
    teacher_sigma: float = option(
        1.0, "noise of DP-SGD, in multiples of teacher_clip, where epsilon is not given", low=0
    )
    noise: str = option(
        "secret", "source of noise and secret draws: 128 bits that every client draws and keeps (each release has a "
        "key made of them), or the run's seed. With the seed a run can be repeated, and epsilon holds only while the "
        "seed is secret", choices=("secret", "seed"),
    )  # fmt: skip
    teacher_share: float = option(0.5, "least share of epsilon for the teacher, with teacher_dp", low=0.01, high=0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is not None and self.sigma_d:
            raise UserError('Method options "epsilon" and "sigma_d" exclude each other: one follows from the other.')
        if self.teacher_dp and self.sigma_t:
            raise UserError(
                'Method option "sigma_t" adds nothing with teacher_dp: what comes from a private teacher is covered.'
            )
        if self.teacher_dp and getattr(self, "select", "last") != "last":
            raise UserError(
                'Method option "teacher_dp" needs select = last: the choice of a best epoch is not covered by DP-SGD.'
            )
        noised = self.sigma_d > 0 or self.sigma_t > 0 or (self.epsilon is not None and not self.teacher_dp)
        if noised and not generates(self):
            raise UserError(
                'Method option "mode" = public sends no gradients to add noise to: only teacher_dp makes it private.'
            )
        if self.shards > 1 and not (private(self) and (self.epsilon is not None or self.sigma_d)):
            raise UserError(
                'Method option "shards" is for the gradients through the discriminators: give epsilon or sigma_d with '
                "it."
            )


CLIP_D = {"mean": 0.03, "sum": 0.3}
"""Default of ``clip_d`` by ``bce``: about the median norm of a row through the discriminator.

Median norms measured on embedded digits (32 x 32).  Unless a row says otherwise: five clients, Dirichlet 0.1, 32 images
a step, bce=mean, 4 patches (64 with critic_layers=2), 80 iterations.  Early and late are the first and the last third
of 80 iterations, or the start and the end of 300.

    run                                         discriminator early    late   teacher
    bce=mean, 4 patches                                      0.028    0.058   0.16
    bce=mean, 64 patches                                     0.008    0.020   0.03
    bce=sum, 4 patches                                       0.11     0.17    0.64
    bce=sum, 64 patches                                      0.36     0.79    0.64
    batch=8                                                  0.026    0.067   0.05
    ten clients                                              0.032    0.028   0.20
    Dirichlet 1                                              0.028    0.046   0.65
    300 iterations, critic_lr=7e-4                           0.05     1.1     0.65
    300 iterations, epsilon=10, shards=20, Dirichlet 1       0.034    0.020   0.53
    300 iterations, epsilon=10, shards=5, Dirichlet 1        0.057    0.038   0.47

The norm through a discriminator grows with the discriminator's training.  With shards each discriminator trains less
often (15 times with shards=20), and the norm does not grow.
"""


def clip_d(options: Any) -> float:
    """Clipping norm of a row through the discriminator: the option, or where that is open `CLIP_D`."""
    return CLIP_D[options.bce] if options.clip_d is None else float(options.clip_d)


def generates(options: Any) -> bool:
    """Whether the run has a generator, for whose images the clients send gradients."""
    return bool(getattr(options, "mode", "generator") == "generator")


def private(options: Any) -> bool:
    """Whether the clients' gradients are clipped and noised, so that each client's gradients are needed alone."""
    return generates(options) and (options.epsilon is not None or options.sigma_d > 0 or options.sigma_t > 0)


def tells_counts(options: Any) -> bool:
    """Whether clients disclose class counts, or which classes they have."""
    return bool(options.class_weights != "uniform")


def tells_scores(options: Any) -> bool:
    """Whether clients send the discriminators' mean confidence in every image, in (0, 1), to the server.

    Noise that covers B confidences at every step would be tens of times larger than the confidences.  So a private
    client withholds them unless ``scores=release``, and the ensemble's weights follow the classes alone.
    """
    withheld = private(options) and options.scores == "withhold"
    return generates(options) and bool(options.disc_weight) and not withheld


def asks_discriminators(options: Any) -> bool:
    """Whether the generator's loss uses the discriminators at all."""
    return generates(options) and options.w_real > 0


def claims(options: Any) -> bool:
    """Whether the options ask for differential privacy of anything."""
    return private(options) or options.teacher_dp or (options.histogram_noise > 0 and tells_counts(options))


def guarantee(options: Any, unit: Unit = IMAGE) -> Guarantee | None:
    """Guarantee of a run: which of a client's releases epsilon covers and which not.

    None where nothing is private.

    ``teacher_dp`` covers everything that is computed from the teachers.  ``sigma_t`` covers only the gradients that a
    client computes through its own teacher.  That teacher's logits carry no noise, and they also change the gradients
    that the server asks of other clients.
    """
    if not claims(options):
        return None
    covers: dict[str, str] = {}
    leaves: dict[str, str] = {}

    def place(name: str, text: str, covered: bool) -> None:
        (covers if covered else leaves)[name] = text

    if asks_discriminators(options):
        text = "the generator's gradients through the discriminators"
        place("discriminator_gradients", text, options.epsilon is not None or options.sigma_d > 0)
    through_teachers = generates(options) and asks_teachers(options)
    if through_teachers and options.sigma_t:
        covers["teacher_gradients"] = "a client's own gradients for the generator through its teacher"
    elif through_teachers:
        place("teacher_gradients", "the generator's gradients through the teachers", options.teacher_dp)
    place("teacher_logits", _answers(options), options.teacher_dp)
    if tells_counts(options):
        counts = options.class_weights == "counts"
        name, text = (
            ("class_counts", "the clients' class counts") if counts else ("known_classes", "which classes a client has")
        )
        place(name, text, options.histogram_noise > 0)
    if tells_scores(options):
        leaves["scores"] = "the discriminators' confidence in every image"
    return Guarantee(
        options.delta, covers, leaves, _while(options), unit=unit,
        follows="the released generator and student" if generates(options) else "the released student",
        advice="" if options.teacher_dp else "teacher_dp=true covers what comes from the teachers",
        appraised=("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted"),
    )  # fmt: skip


def _while(options: Any) -> tuple[str, ...]:
    """Conditions of epsilon: what must stay secret beside the clients' data."""
    if options.noise == "seed":
        return "checkpoints/ (the clients' networks as they are) stays with the clients", "the run's seed stays secret"
    return ("checkpoints/ (the clients' networks as they are, and their secret bits) stays with the clients",)


def _answers(options: Any) -> str:
    """The teachers' logits in words and, where they are not covered, what else they change."""
    reached = ["the student"]
    if generates(options) and (options.w_adv or (options.w_diverse and options.diversity != "none")):
        reached.append("other clients' gradients")  # through the mixture, on which every gradient depends
    if generates(options) and options.w_adv:
        reached.append("the adversarial term's gradient for the generator")
    if options.teacher_dp or len(reached) == 1:
        return "the teachers' answers that the student learns from"
    return f"the teachers' answers (which change {listed(tuple(reached))})"
