"""FedIOD's differential privacy: everything that depends on private data leaves a client through here (notes 2.7).

FedIOD's own files call these functions and nothing else where a client answers, so that a mechanism stands here alone.
Without privacy every one of them hands on what it was given.

A client's gradient for the generator comes through two networks, which differ in privacy: its *discriminator*, of which
it has one for each of m disjoint shards of its data, one random shard serving a step; and its *teacher*, trained on all
of them.  Both gradients are clipped and noised row by row (one row is one generated image).  When a record is replaced
every row of a batch of B may change by twice the clipping norm C, so noise of sigma C in every entry is a Gaussian
mechanism with sigma / (2 sqrt(B)) times its sensitivity.  The guarantee rests on the client's random stream staying its
own secret: who knows the run's seed can subtract the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.methods.base import OUTSIDE, Client, Federation, Objective, Server, Step, option
from fedkern.methods.options import Options
from fedkern.ops import clip_and_noise
from fedkern.privacy import DPSGD, LEDGER, Accountant, Guarantee, least_noise, need_accounting
from fedkern.privacy.dpsgd import check_network

TERMS = "privacy_terms"
"""Where a client keeps the noise that was agreed on before the first step."""
DISCRIMINATOR, TEACHER, HISTOGRAM = "discriminator", "teacher", "histogram"


@dataclass(frozen=True)
class PrivacyOptions(Options):
    """Knobs of FedIOD's differential privacy."""

    epsilon: float | None = option(
        None, "target of the whole run: the noise that is left open (sigma_d; with teacher_dp the teacher's too) is "
        "solved for", above=0, type=float,
    )  # fmt: skip
    delta: float = option(1e-5, "the delta at which epsilon is met or told", above=0, high=0.5)
    shards: int = option(1, "disjoint parts of a client's data with a discriminator each; one serves each step", low=1)
    clip_d: float = option(1.0, "largest norm of an image's gradient through the discriminator", above=0)
    clip_t: float = option(1.0, "largest norm of an image's gradient through the teacher", above=0)
    sigma_d: float = option(
        0.0, "noise on the former over clip_d; 0: neither clipped nor noised, but for epsilon", low=0
    )
    sigma_t: float = option(0.0, "noise on the latter over clip_t; 0: neither clipped nor noised", low=0)
    scores: str = option(
        "withhold", "what a private client tells of its discriminator's confidence, which no noise can cover: nothing, "
        "or the confidence itself, which epsilon then does not cover", choices=("withhold", "release"),
    )  # fmt: skip
    histogram_noise: float = option(
        0.0, "standard deviation of the noise on a client's class counts, in records (for segmentation, all pixels of "
        "an image); 0: told as they are", low=0,
    )  # fmt: skip
    teacher_dp: bool = option(False, "train the teachers with DP-SGD, so that all that comes from them is covered")
    teacher_clip: float = option(1.0, "largest norm of a sample's gradient in DP-SGD", above=0)
    teacher_sigma: float = option(1.0, "noise of DP-SGD over teacher_clip, where epsilon is not given", low=0)
    teacher_share: float = option(0.5, "share of epsilon that is the teacher's with teacher_dp", low=0.01, high=0.99)

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
        if self.shards > 1 and not private(self):
            raise UserError('Method option "shards" is for privacy: give epsilon or sigma_d with it.')


def generates(options: Any) -> bool:
    """Whether there is a generator, whose images the clients are asked for gradients of."""
    return bool(getattr(options, "mode", "generator") == "generator")


def private(options: Any) -> bool:
    """Whether :func:`sanitise` does anything, so that every client's rows are needed on their own."""
    return generates(options) and (options.epsilon is not None or options.sigma_d > 0 or options.sigma_t > 0)


def claims(options: Any) -> bool:
    """Whether the run tells an epsilon."""
    return private(options) or options.teacher_dp or options.histogram_noise > 0


def prepare(server: Server, options: Any) -> None:
    """Settles the noise before anything is written (``Method.start``), in ``server.state["privacy"]``.

    Raises:
        UserError: dp-accounting is not installed, or no noise meets the target.
    """
    if not claims(options):
        return
    need_accounting()
    sigma = options.sigma_d
    if options.epsilon is not None and _beside_teachers(options):
        steps = planned_steps(server.federation, options)
        epsilon, delta = _part(options, 1 - options.teacher_share)

        def account(noise: float) -> Accountant:
            accountant = Accountant()
            if generates(options):
                each = multiplier(noise, options.batch)
                accountant.gaussian(DISCRIMINATOR, each, shards=options.shards, steps=steps)
            if options.sigma_t:
                accountant.gaussian(TEACHER, multiplier(options.sigma_t, options.batch), steps=steps)
            if options.histogram_noise and options.class_weights != "uniform":
                accountant.gaussian(HISTOGRAM, options.histogram_noise / math.sqrt(2))
            return accountant

        sigma = least_noise(account, epsilon, delta)
    server.state["privacy"] = {"sigma_d": float(sigma)}
    if not options.teacher_dp:
        server.warn(
            "teachers-uncovered",
            "Epsilon covers what comes from the discriminators, not the teachers' answers, which the student learns "
            "from: teacher_dp=true covers those too.",
        )


def _beside_teachers(options: Any) -> bool:
    """Whether anything is released with noise beside what comes from private teachers."""
    return generates(options) or (options.histogram_noise > 0 and options.class_weights != "uniform")


def _part(options: Any, share: float) -> tuple[float, float]:
    """Of the target: all of it, or a share of epsilon and half of delta beside another kind (Accountant.epsilon)."""
    if options.teacher_dp and _beside_teachers(options):
        return share * options.epsilon, options.delta / 2
    return options.epsilon, options.delta


def planned_steps(federation: Federation, options: Any) -> int:
    """Generator steps of the whole run, each of which asks every client for its gradient once."""
    batches = options.iterations or math.ceil(max(federation.samples) / options.batch)
    return federation.rounds * batches


def multiplier(sigma: float, rows: int) -> float:
    """Noise over sensitivity of ``rows`` rows, each clipped to C and noised with ``sigma`` C: a record changes all."""
    return sigma / (2 * math.sqrt(rows))


# -- what the client is told, and cuts its data into -------------------------------------------------------------------


def terms(server: Server) -> dict[str, float]:
    """What every client must know before its first step; travels once, under ``"privacy"``."""
    return dict(server.state.get("privacy", {}))


def agree(client: Client, message: Mapping[str, Any]) -> None:
    """Keeps what :func:`terms` said."""
    if message.get("privacy"):
        client.state[TERMS] = {name: float(value) for name, value in message["privacy"].items()}


def shards(client: Client, options: Any) -> Sequence[np.ndarray]:
    """The client's samples cut into disjoint parts with one discriminator each: positions int64 in its split.

    The same at every call of a run, and drawn without a look at the data.

    Raises:
        UserError: the client has fewer samples than shards.
    """
    if options.shards == 1:
        return [np.arange(client.samples)]
    if client.samples < options.shards:
        raise UserError(
            f'Method option "shards" is {options.shards}, but client {client.id} has {client.samples} samples: use '
            "fewer shards, or larger clients."
        )
    order = client.rng("shards", OUTSIDE).permutation(client.samples)
    return [np.sort(part) for part in np.array_split(order, options.shards)]


def serving(client: Client, step: Step, options: Any) -> int:
    """Which shard's discriminator trains and answers in the exchange of ``step``, drawn from the client's stream."""
    return 0 if options.shards == 1 else int(client.rng("serving", step).integers(options.shards))


# -- what leaves the client ----------------------------------------------------------------------------------------


def release_histogram(client: Client, step: Step, histogram: Tensor, options: Any) -> Tensor:
    """The client's class counts fp32 [C] (samples, or pixels for segmentation) as they go to the server, once.

    The noise is in records: a record counts once, and an image with a class for every pixel as often as it has pixels,
    N, known or not, because how many are known is private itself.  Replacing a record takes counts c >= 0 with a sum of
    at most N away and adds others, c', so the counts change by ||c' - c|| <= sqrt(||c||^2 + ||c'||^2) <= sqrt(2) N in
    the Euclidean norm: sqrt(2) records, which is reached where all N move from one class to another.
    """
    if not options.histogram_noise or options.class_weights == "uniform":
        return histogram  # as it is, or not told at all
    record = math.prod(client.labels.shape[1:])  # what a record may count for: 1, or all of its pixels
    noisy = _noise(client, HISTOGRAM, histogram[None].float(), None, options.histogram_noise * record)[0]
    _book(client, HISTOGRAM, options.histogram_noise / math.sqrt(2))
    return noisy.clamp_min(0)


def release_scores(client: Client, step: Step, scores: Tensor, options: Any) -> Tensor:
    """The discriminator's mean confidence in every image, fp32 [B] in (0, 1), as it goes to the server.

    Noise that covers B numbers at every step is tens of times larger than they are.  So a private client withholds
    them: all ones, and the ensemble's weights follow the class counts alone.
    """
    return torch.ones_like(scores) if withholds(options) else scores


def withholds(options: Any) -> bool:
    """Whether the discriminators' confidence stays where it is."""
    return private(options) and options.scores == "withhold"


def sanitise(client: Client, step: Step, u_d: Tensor, u_t: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """The two gradients of a generator step as they go to the server.

    A row that is not finite goes as noise around 0: had it made the answer NaN, that would tell of the data.

    Args:
        u_d: fp32 [B, C, H, W], row b the gradient of the realism of image b alone (no client weight, no 1 / B) with
            respect to the image, through the private discriminator.
        u_t: fp32 [B, C, H, W], the gradient through the teacher of the terms that use its logits, times B, so that a
            row's size does not depend on the batch.

    Returns:
        Both, clipped and noised row by row where their noise is not 0; the server adds ``realism weight * u_d + u_t``
        over the clients.

    Raises:
        ValueError: the client was not told the noise.
    """
    if not private(options):
        return u_d, u_t
    if TERMS not in client.state:
        raise ValueError(f"sanitise: expected client {client.id} to have been told the noise, given no terms")
    sigma = client.state[TERMS]["sigma_d"]
    if sigma:
        u_d = _noise(client, DISCRIMINATOR, u_d, options.clip_d, sigma)
        _book(client, DISCRIMINATOR, multiplier(sigma, len(u_d)), options.shards)
    if options.sigma_t:
        u_t = _noise(client, TEACHER, u_t, options.clip_t, options.sigma_t)
        _book(client, TEACHER, multiplier(options.sigma_t, len(u_t)))
    return u_d, u_t


def _noise(client: Client, channel: str, rows: Tensor, bound: float | None, noise: float) -> Tensor:
    """Rows clipped to ``bound`` (None: as they are) and noised from the place of the stream reached so far."""
    places = client.state.setdefault("privacy_places", {})
    seed = int(client.rng(f"privacy/{channel}", OUTSIDE).integers(1 << 64, dtype=np.uint64))
    flat = rows.detach().reshape(len(rows), -1).contiguous()
    start = int(places.get(channel, 0))
    if bound is None:
        result = flat + clip_and_noise(torch.zeros_like(flat), 1.0, noise, seed, start)
    else:
        finite = torch.isfinite(flat).all(1, keepdim=True)
        result = clip_and_noise(flat.masked_fill(~finite, 0.0), bound, noise, seed, start)
    places[channel] = start + flat.numel()  # a place is never used twice
    return result.reshape(rows.shape)


def _book(client: Client, channel: str, noise: float, shards: int = 1) -> None:
    accountant = Accountant(client.state.get(LEDGER))
    accountant.gaussian(channel, noise, shards=shards)
    client.state[LEDGER] = accountant.state


# -- the teacher -----------------------------------------------------------------------------------------------------


def check(client: Client, make: Callable[[], nn.Module], options: Any) -> None:
    """Asked before anything is written; ``make`` gives the client's teacher, untrained.

    Raises:
        UserError: the teacher is to be private and cannot be: it has batch norm, or is brought along.
    """
    shards(client, options)
    if not options.teacher_dp:
        return
    teacher = make()
    if client.brought(teacher):
        raise UserError(
            'Method option "teacher_dp" trains the teachers privately and cannot vouch for those of --teachers: leave '
            "one of them out."
        )
    check_network(teacher, f"the network of client {client.id}")


def train_teacher(
    method: Objective, client: Client, step: Step, module: nn.Module, rows: np.ndarray, options: Any
) -> bool:
    """Trains the client's teacher with DP-SGD on the samples at ``rows``, in place.

    Returns:
        False where it is to be trained as usual.
    """
    if not options.teacher_dp:
        return False

    def noise(rate: float, steps: int) -> float:
        if options.epsilon is None:
            return float(options.teacher_sigma)

        def account(sigma: float) -> Accountant:
            accountant = Accountant()
            accountant.dp_sgd(TEACHER, sigma, rate=rate, steps=steps)
            return accountant

        return least_noise(account, *_part(options, options.teacher_share))

    client.fit_privately(method, step, module, DPSGD(options.teacher_clip, noise, TEACHER), rows=rows)
    return True


# -- what is said of it ------------------------------------------------------------------------------------------------


def guarantee(options: Any) -> Guarantee | None:
    """What epsilon covers and what not; None where nothing is private."""
    if not claims(options):
        return None
    covers: list[str] = []
    leaves: list[str] = []

    def place(text: str, covered: bool) -> None:
        (covers if covered else leaves).append(text)

    if generates(options):
        place(
            "the generator's gradients through the discriminators", options.epsilon is not None or options.sigma_d > 0
        )
        place("those through the teachers", options.teacher_dp or options.sigma_t > 0)
    place("the teachers' answers that the student learns from", options.teacher_dp)
    if options.class_weights != "uniform":
        place("the clients' class counts", options.histogram_noise > 0)
    if generates(options) and options.disc_weight is not False and not withholds(options):
        leaves.append("the discriminators' confidence in every image")
    if covers and not leaves:
        covers.append("so the released generator and student" if generates(options) else "so the released student")
    leaves.append("the losses and accuracies that the run's records tell of a client")
    return Guarantee(options.delta, tuple(covers), tuple(leaves))
