"""Privacy options of FedIOD and the epsilon they give (docs/methods/fediod.md, section 12).

Nothing here sees data; the mechanisms are in `fedkern.methods.fediod.private_messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError
from fedkern.methods.base import option
from fedkern.methods.fediod.losses import asks_teachers
from fedkern.methods.options import Options
from fedkern.privacy import IMAGE, Guarantee, Unit
from fedkern.privacy.guarantee import listed


@dataclass(frozen=True)
class PrivacyOptions(Options):
    """Knobs of FedIOD's differential privacy."""

    epsilon: float | None = option(
        None, "target of the whole run for what is covered (everything only with teacher_dp): the noise that is left "
        "open (sigma_d; with teacher_dp the teacher's too) is solved for", above=0, type=float,
    )  # fmt: skip
    delta: float = option(1e-5, "the delta at which epsilon is met or told", above=0, high=0.5)
    shards: int = option(
        1, "disjoint parts of a client's data with a discriminator each; one, drawn in secret, serves each step", low=1
    )
    clip_d: float | None = option(
        None, "largest norm of an image's gradient through the discriminator, before the client's weight and w_real; "
        "best near the median, which a run without privacy, on data of the kind that anybody may see, tells of its "
        "clients as norm_d (with m shards, each of which trains a m-th as often, that of the first m-th of the run); "
        "open: 0.03 with bce=mean, 0.3 with bce=sum", above=0, type=float,
    )  # fmt: skip
    clip_t: float = option(
        0.5, "largest norm of an image's gradient through the teacher, before the client's weight; the median is told "
        "as norm_t", above=0,
    )  # fmt: skip
    sigma_d: float = option(
        0.0, "noise on the former over clip_d; 0: neither clipped nor noised, but for epsilon", low=0
    )
    sigma_t: float = option(0.0, "noise on the latter over clip_t; 0: neither clipped nor noised", low=0)
    scores: str = option(
        "withhold", "what a private client tells of its discriminator's confidence, which no noise can cover: nothing, "
        "or the confidence itself, which epsilon then does not cover", choices=("withhold", "release"),
    )  # fmt: skip
    histogram_noise: float = option(
        0.0, "standard deviation of the noise on a client's class counts, in images (for segmentation, all pixels of "
        "an image); 0: told as they are", low=0,
    )  # fmt: skip
    teacher_dp: bool = option(False, "train the teachers with DP-SGD, so that all that comes from them is covered")
    teacher_clip: float = option(
        1.0, "largest norm of a sample's (or the sum of a patient's) gradient in DP-SGD", above=0
    )
    teacher_sigma: float = option(1.0, "noise of DP-SGD over teacher_clip, where epsilon is not given", low=0)
    noise: str = option(
        "secret", "what noise and secret draws follow from: 128 bits that every client draws anew and keeps to itself "
        "(every release has a key of its own, made of them), or the run's seed, so that a run can be repeated and "
        "epsilon holds only while the seed is secret",
        choices=("secret", "seed"),
    )  # fmt: skip
    teacher_share: float = option(
        0.5, "share of epsilon that is at least the teacher's with teacher_dp", low=0.01, high=0.99
    )

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
"""What ``clip_d`` is by ``bce`` where it is left open: about the median norm of a row through the discriminator.

Measured on embedded digits (32 x 32; five clients, Dirichlet 0.1, 32 images a step), in the first third and the last of
80 iterations; a discriminator has 4 patches there, or 64 with critic_layers=2:

    bce=mean   4 patches 0.028 to 0.058, 64 patches 0.008 to 0.020
    bce=sum    4 patches 0.11 to 0.17,   64 patches 0.36 to 0.79
    batch=8 0.026 to 0.067, ten clients 0.032 to 0.028, Dirichlet 1 0.028 to 0.046 (mean, 4 patches)

The norm grows with what a discriminator has learnt: over 300 iterations with critic_lr=7e-4 from 0.05 to 1.1, while
in one with epsilon=10, shards=20 and Dirichlet 1, where each trains 15 times, it stays at 0.034 to 0.020, and with
shards=5 at 0.057 to 0.038.  Through the teacher the medians over 80 iterations are 0.16 and 0.64 (bce=mean, sum;
4 patches), 0.03 and 0.64 (64 patches), 0.05 (batch=8), 0.20 (ten clients) and 0.65 (Dirichlet 1); over those 300
0.65, and in those with shards 0.53 and 0.47.
"""


def clip_d(options: Any) -> float:
    """Largest norm of a row through the discriminator: as given, or about the median of such rows."""
    return CLIP_D[options.bce] if options.clip_d is None else float(options.clip_d)


def generates(options: Any) -> bool:
    """Whether there is a generator, whose images the clients are asked for gradients of."""
    return bool(getattr(options, "mode", "generator") == "generator")


def private(options: Any) -> bool:
    """Whether the clients' gradients are clipped and noised, so that every client's are needed on their own."""
    return generates(options) and (options.epsilon is not None or options.sigma_d > 0 or options.sigma_t > 0)


def tells_counts(options: Any) -> bool:
    """Whether a client says how often it has the classes, or which."""
    return bool(options.class_weights != "uniform")


def tells_scores(options: Any) -> bool:
    """Whether the discriminators' mean confidence in every image, in (0, 1), goes to the server.

    Noise that covers B numbers at every step is tens of times larger than they are.  So a private client withholds
    them, and the ensemble's weights follow the classes alone.
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
    """What epsilon covers and what not, of all that a client releases; None where nothing is private.

    With ``teacher_dp`` all that is made of the teachers is covered.  Without it ``sigma_t`` covers no more than what
    a client answers through its own teacher: that teacher's logits, to which no noise is added, also change what the
    others are asked the gradients of.
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
    asked = generates(options) and asks_teachers(options)
    if asked and options.sigma_t:
        covers["teacher_gradients"] = "a client's own gradients for the generator through its teacher"
    elif asked:
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
        options.delta,
        covers,
        leaves,
        _while(options),
        unit=unit,
        follows="the released generator and student" if generates(options) else "the released student",
        advice="" if options.teacher_dp else "teacher_dp=true covers what comes from the teachers",
        appraised=("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted"),
    )


def _while(options: Any) -> tuple[str, ...]:
    """What must stay secret for epsilon to hold, beside the clients' data."""
    if options.noise == "seed":
        return "checkpoints/ (the clients' networks as they are) stays with the clients", "the run's seed stays secret"
    return ("checkpoints/ (the clients' networks as they are, and their secret bits) stays with the clients",)


def _answers(options: Any) -> str:
    """The teachers' logits and, where they are not covered, where else they show."""
    reached = ["the student"]
    if generates(options) and (options.w_adv or (options.w_diverse and options.diversity != "none")):
        reached.append("other clients' gradients")  # by the mixture, of which every teacher's gradient depends
    if generates(options) and options.w_adv:
        reached.append("the adversarial term's gradient for the generator")
    if options.teacher_dp or len(reached) == 1:
        return "the teachers' answers that the student learns from"
    return f"the teachers' answers (which change {listed(tuple(reached))})"
