"""Differential privacy of FedIOD's messages: clipping, noise and booking (docs/methods/fediod.md, section 12).

A client's gradient comes through two networks. The *teacher* is trained under DP-SGD. Each *discriminator* is trained
on one of m disjoint shards, and one random shard serves a step. Replacing a record may change every row (one generated
image) of a batch of B by twice the clipping norm C, so noise of sigma C in every entry is a Gaussian mechanism whose
noise is sigma / (2 sqrt(B)) times its sensitivity.

The accountant assumes a shard drawn without replacement. That holds only if nothing else depends on the draw:

* Which discriminator *trains* follows a public schedule, round robin over the shards.
* Which discriminator *serves* the gradients is drawn in secret and independently for every step, so that no
  discriminator depends on which ones served before.
* A released confidence or realism is of the discriminator that trains; the serving one's would reveal the draw.

Noise and secret draws follow from each client's :func:`secret`: the run's seed is in config.toml, and whoever knows the
source of the noise can subtract it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.errors import UserError
from fedkern.methods.common.oneshot import OwnNetworks
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.protocol import OUTSIDE, Phase
from fedkern.methods.roles import Client, Server
from fedkern.ops import clip_and_noise
from fedkern.privacy import DPSGD, LEDGER, Accountant, Unit, least_noise, need_accounting
from fedkern.privacy.dpsgd import check_network, stream_name
from fedkern.privacy.keys import SECRET_BYTES, NoiseKey, noise_key

TERMS = "privacy_terms"
"""Key in a client's state of the server's noise terms."""
SECRET = "privacy_secret"
"""Key in a client's state of its secret, in hexadecimal digits."""
RELEASES = "privacy_releases"
"""Key in a client's state of its number of releases by channel."""
DISCRIMINATOR, TEACHER, HISTOGRAM = "discriminator", "teacher", "histogram"
TEACHER_CLIP = 1.0
"""Clipping norm of a sample's gradient in DP-SGD, or of the sum of a patient's gradients."""


def prepare(server: Server, options: IODOptions) -> None:
    """Find the noise before anything is written and keep it in ``server.state["privacy"]``."""
    if not options.claims_privacy:
        return
    if options.noises_gradients and not options.w_real and not options.teacher_dp:
        raise UserError(
            'Method option "epsilon" is for the gradients through the discriminators, and with w_real=0 there are none.'
        )
    need_accounting()
    sigma, steps = 0.0, options.count_steps(server.federation)
    if options.epsilon is not None and (options.needs_realism or options.noises_counts):
        epsilon, delta, unit = options.epsilon, options.delta, server.federation.unit
        if options.teacher_dp:  # the private teachers take the rest
            epsilon, delta = (1 - options.teacher_share) * epsilon, delta / 2
        sigma = least_noise(lambda noise: _plan_releases(options, noise, steps, unit), epsilon, delta)
    server.state["privacy"] = {"sigma_d": float(sigma), "steps": steps}


def _plan_releases(options: IODOptions, sigma: float, steps: int, unit: Unit) -> Accountant:
    """Book a client's noised releases of ``steps`` generator steps, except a private teacher's."""
    accountant = Accountant()
    if options.needs_realism and sigma:
        accountant.gaussian(DISCRIMINATOR, multiplier(sigma, options.batch), shards=options.shards, steps=steps)
    if options.noises_counts:
        accountant.gaussian(HISTOGRAM, _count_multiplier(options, unit))
    return accountant


def _count_multiplier(options: IODOptions, unit: Unit) -> float:
    """Return the noise over the sensitivity of the class counts (:func:`release_histogram`)."""
    return float(options.histogram_noise / (math.sqrt(2) * unit.images))


def multiplier(sigma: float, rows: int) -> float:
    """Return the noise over the sensitivity of ``rows`` rows clipped to C, all changed by one record."""
    return sigma / (2 * math.sqrt(rows))


# -- noise terms, secrets and shards of a client -----------------------------------------------------------------------


def keep_terms(client: Client, message: Mapping[str, Any]) -> None:
    """Keep the server's noise terms, which every client needs before its first step."""
    if message.get("privacy"):
        client.state[TERMS] = {name: float(value) for name, value in message["privacy"].items()}


def secret(client: Client, options: IODOptions) -> str:
    """Return the client's secret in hexadecimal digits, or "" with the seed.

    Kept in the client's state for a resumed run. It must not appear in any message, report or error.
    """
    if not options.draws_secrets:
        return ""
    if SECRET not in client.state:
        client.state[SECRET] = secrets.token_hex(SECRET_BYTES)
    return str(client.state[SECRET])


def next_key(client: Client, channel: str, options: IODOptions) -> NoiseKey:
    """Return the key of the client's next release in a channel, never the same twice, even after a resume."""
    digits = secret(client, options)
    # With noise=seed the 16 bytes follow from the run's seed: whoever knows the seed has them.
    material = bytes.fromhex(digits) if digits else client.rng("privacy", OUTSIDE).bytes(SECRET_BYTES)
    releases = client.state.setdefault(RELEASES, {})
    number = int(releases.get(channel, 0))
    releases[channel] = number + 1
    return noise_key(material, client.id, channel, number)


def shards(client: Client, options: IODOptions) -> Sequence[np.ndarray]:
    """Return the client's samples in disjoint shards, int64 positions, independent of the data.

    Patients stay whole if they are the unit of privacy.
    """
    if options.shards == 1:
        return [np.arange(client.samples)]
    units = np.arange(client.samples) if client.patients is None else client.patients
    count = int(units.max(initial=-1)) + 1
    if count < options.shards:
        raise UserError(
            f'Method option "shards" is {options.shards}, but client {client.label} has {count} '
            f"{'samples' if client.patients is None else 'patients'}: use fewer shards, or larger clients."
        )
    order = client.rng("shards", OUTSIDE).permutation(count)
    return [np.flatnonzero(np.isin(units, part)) for part in np.array_split(order, options.shards)]


def count_trainings(client: Client, options: IODOptions) -> int:
    """Return the number of iterations, a round's first, in which the client trains a discriminator."""
    count = options.count_batches(client.declared)
    return min(options.iterations or count, count)


def training_shard(client: Client, round: int, iteration: int, options: IODOptions) -> int:
    """Return the shard whose discriminator trains, by a public schedule."""
    return (round * count_trainings(client, options) + iteration) % options.shards


def serving_shard(client: Client, phase: Phase, options: IODOptions) -> int:
    """Return the shard whose discriminator serves the gradients of ``phase``, drawn in secret."""
    if options.shards == 1:
        return 0
    return int(client.rng(stream_name("serving", secret(client, options)), phase).integers(options.shards))


# -- what leaves the client ----------------------------------------------------------------------------------------


def release_histogram(client: Client, histogram: Tensor, options: IODOptions) -> Tensor:
    """Return the client's class counts fp32 [C] for the server, once.

    The noise is measured in records, each a count of N: 1 for classification, all pixels of an image for segmentation,
    also unknown ones, whose number is itself private. Replacing a record turns counts c >= 0 with a sum of at most N
    into c', and ||c' - c|| <= sqrt(||c||^2 + ||c'||^2) <= sqrt(2) N, reached if all N move from one class to another. A
    patient with at most k images counts as k records.
    """
    if not options.noises_counts:
        return histogram  # sent as it is, or not at all
    record = math.prod(client.labels.shape[1:])  # N: 1, or all pixels of an image
    rows = histogram.detach()[None].float().contiguous()
    noisy = rows + _noise(client, HISTOGRAM, torch.zeros_like(rows), 1.0, options.histogram_noise * record, options)
    _book(client, HISTOGRAM, _count_multiplier(options, client.unit))
    return noisy[0].clamp_min(0)


def sanitise(client: Client, u_d: Tensor | None, options: IODOptions) -> Tensor | None:
    """Return the gradient of a generator step through the private discriminator, clipped and noised row by row.

    A row that is not finite is released as noise around 0, because a NaN would leak. ``u_d`` is fp32 [B, C, H, W], row
    b the gradient of the batch's realism with respect to image b. The 1 / B of a mean and the client's weight pi_k are
    public and applied after the noise, so that a row's size depends on neither.
    """
    if not options.noises_gradients:
        return u_d
    if TERMS not in client.state:
        raise ValueError(f"sanitise: expected client {client.id} to have been told the noise, given no terms")
    sigma = client.state[TERMS]["sigma_d"]
    if not sigma or u_d is None:
        return u_d
    rows = u_d.detach().reshape(len(u_d), -1).contiguous()
    finite = torch.isfinite(rows).all(1, keepdim=True)
    noisy = _noise(client, DISCRIMINATOR, rows.masked_fill(~finite, 0.0), options.clip_d, sigma, options)
    _book(client, DISCRIMINATOR, multiplier(sigma, len(u_d)), options.shards)
    return noisy.reshape(u_d.shape)


def _noise(client: Client, channel: str, rows: Tensor, bound: float, noise: float, options: IODOptions) -> Tensor:
    key = next_key(client, channel, options)
    noisy: Tensor = clip_and_noise(rows, bound, noise, key.seed, key.offset)
    return noisy


def _book(client: Client, channel: str, noise: float, shards: int = 1) -> None:
    accountant = Accountant(client.state.get(LEDGER))
    accountant.gaussian(channel, noise, shards=shards)
    client.state[LEDGER] = accountant.state


# -- the teacher -----------------------------------------------------------------------------------------------------


def check(client: Client, make: Callable[[], nn.Module], options: IODOptions) -> None:
    """Raise UserError if a client has too little data for its shards, or its teacher cannot be private."""
    shards(client, options)
    if not options.teacher_dp:
        return
    teacher = make()
    if client.load_pretrained(teacher):
        raise UserError(
            'Method option "teacher_dp" trains the teachers privately and cannot vouch for those of --teachers: leave '
            "one of them out."
        )
    check_network(teacher, f"the network of client {client.label}")


def train_teacher(method: OwnNetworks, client: Client, phase: Phase, module: nn.Module, rows: np.ndarray) -> bool:
    """Train the client's teacher with DP-SGD in place, or return False without privacy."""
    options, epsilon = method.options, method.options.epsilon
    if not options.teacher_dp or epsilon is None:
        return False

    def noise(rate: float, steps: int) -> float:
        agreed = client.state.get(TERMS, {"sigma_d": 0.0, "steps": 0})

        def account(sigma: float) -> Accountant:
            accountant = _plan_releases(options, agreed["sigma_d"], int(agreed["steps"]), client.unit)
            accountant.dp_sgd(TEACHER, sigma, rate=rate, steps=steps)
            return accountant

        return least_noise(account, epsilon, options.delta)  # the budget that other releases leave

    patients, images = client.patients, client.unit.images
    spending = DPSGD(TEACHER_CLIP, noise, TEACHER, secret(client, options), patients, images)
    client.fit_privately(method, phase, module, spending, rows=rows)
    return True
