"""Differential privacy of FedIOD's messages: clipping, noise and booking (docs/methods/fediod.md, section 12).

FedIOD's own files call these functions and nothing else where a client answers, so that a mechanism stands here alone.
Without privacy every one of them hands on what it was given.

A client's gradient for the generator comes through two networks, which differ in privacy: its *discriminator*, of which
it has one for each of m disjoint shards of its data, one random shard serving a step; and its *teacher*, trained on all
of them.  Both gradients are clipped and noised row by row (one row is one generated image).  When a record is replaced
every row of a batch of B may change by twice the clipping norm C, so noise of sigma C in every entry is a Gaussian
mechanism with sigma / (2 sqrt(B)) times its sensitivity.

A step is that mechanism on a shard drawn without replacement only if nothing else depends on the draw, whatever the
steps before released.  So *which discriminator trains* follows a schedule that everybody may know, round robin over
the shards, and *which one serves* is drawn in secret for every step, independently: the discriminators are then
functions of their own shards and of the images, none of them of what served before.  A confidence or realism that is
told is that of the shard whose turn it is to train, or it would tell which one serves.

Noise and secret draws follow from 128 bits that a client draws anew and that stay in its own state (:func:`secret`):
the run's root seed stands in config.toml, and who knows what the noise follows from can subtract it.  Every release has
a key of its own, made of those bits (`fedkern.privacy.keys`), and a number that is never used again.  With
``noise=seed`` they follow from that seed nevertheless, which makes a run repeatable and the guarantee conditional on
the seed.
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
from fedkern.methods.base import OUTSIDE, Client, Federation, Objective, Server, Step
from fedkern.methods.fediod.losses import asks_teachers
from fedkern.methods.fediod.privacy_options import asks_discriminators, claims, clip_d, private, tells_counts
from fedkern.ops import clip_and_noise
from fedkern.privacy import DPSGD, LEDGER, Accountant, Unit, least_noise, need_accounting
from fedkern.privacy.dpsgd import check_network, stream_name
from fedkern.privacy.keys import SECRET_BYTES, NoiseKey, noise_key

TERMS = "privacy_terms"
"""Where a client keeps the noise that was agreed on before the first step."""
SECRET = "privacy_secret"
"""Where a client keeps the bits that its noise follows from, in hexadecimal digits."""
RELEASES = "privacy_releases"
"""Where a client keeps how often it has released something in a channel: the number of the next release's key."""
DISCRIMINATOR, TEACHER, HISTOGRAM = "discriminator", "teacher", "histogram"


def prepare(server: Server, options: Any) -> None:
    """Settles the noise before anything is written (``Method.start``), in ``server.state["privacy"]``.

    Raises:
        UserError: dp-accounting is not installed, no noise meets the target, or there is nothing to add it to.
    """
    if not claims(options):
        return
    if not options.w_real and (options.sigma_d or (options.epsilon is not None and not options.teacher_dp)):
        name = "sigma_d" if options.sigma_d else "epsilon"
        raise UserError(
            f'Method option "{name}" is for the gradients through the discriminators, and with w_real=0 there are none.'
        )
    if options.sigma_t and not asks_teachers(options):
        raise UserError(
            'Method option "sigma_t" is for the gradients through the teachers, and without w_clear, w_diverse, w_adv '
            "and w_balance there are none."
        )
    need_accounting()
    sigma = options.sigma_d
    if options.epsilon is not None and _beside_teachers(options):
        steps = planned_steps(server.federation, options)
        epsilon, delta = _part(options, 1 - options.teacher_share)
        unit = server.federation.unit
        sigma = least_noise(lambda noise: _beside(options, noise, steps, unit), epsilon, delta)
    server.state["privacy"] = {"sigma_d": float(sigma), "steps": planned_steps(server.federation, options)}


def _beside(options: Any, sigma: float, steps: int, unit: Unit) -> Accountant:
    """What a client releases beside its teacher's answers in a whole run of so many generator steps."""
    accountant = Accountant()
    if asks_discriminators(options) and sigma:
        accountant.gaussian(DISCRIMINATOR, multiplier(sigma, options.batch), shards=options.shards, steps=steps)
    if options.sigma_t:
        accountant.gaussian(TEACHER, multiplier(options.sigma_t, options.batch), steps=steps)
    if options.histogram_noise and tells_counts(options):
        accountant.gaussian(HISTOGRAM, _counted(options, unit))
    return accountant


def _counted(options: Any, unit: Unit) -> float:
    """Noise over sensitivity of the class counts (see :func:`release_histogram`)."""
    return float(options.histogram_noise / (math.sqrt(2) * unit.images))


def _beside_teachers(options: Any) -> bool:
    """Whether anything is released with noise beside what comes from private teachers."""
    return asks_discriminators(options) or (options.histogram_noise > 0 and tells_counts(options))


def _part(options: Any, share: float) -> tuple[float, float]:
    """Of the target: all of it, or a share of epsilon and half of delta beside private teachers."""
    if options.teacher_dp and _beside_teachers(options):
        return share * options.epsilon, options.delta / 2
    return options.epsilon, options.delta


def planned_steps(federation: Federation, options: Any) -> int:
    """Generator steps of the whole run, each of which asks every client for its gradient once."""
    return federation.rounds * iterations(federation, options)


def iterations(federation: Federation, options: Any) -> int:
    """Iterations of a round."""
    return options.iterations or batches(max(federation.samples), options)


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


def draws_secrets(options: Any) -> bool:
    """Whether the clients' noise is drawn from what nobody else knows."""
    return options.noise != "seed" and claims(options)


def secret(client: Client, options: Any) -> str:
    """What is mixed into the streams that nobody else may know: hexadecimal digits, or "" where the seed is to do.

    Drawn at the first call and kept in the client's state, so that a resumed run goes on with the same; it belongs in
    no message, report or error.
    """
    if not draws_secrets(options):
        return ""
    if SECRET not in client.state:
        client.state[SECRET] = secrets.token_hex(SECRET_BYTES)
    return str(client.state[SECRET])


def check_noise(client: Client) -> None:
    """Raises UserError where an earlier version drew the client's noise, from one key for all releases of a channel.

    What it released since the last checkpoint would be released again, with other noise, and be counted once.
    """
    if (LEDGER in client.state or "privacy_places" in client.state) and RELEASES not in client.state:
        raise UserError(
            f"The noise of client {client.id} was drawn by an earlier version of fedkern, in a way that this one does "
            "not go on with: finish the run with the version that began it, or start it again."
        )


def next_key(client: Client, channel: str, options: Any) -> NoiseKey:
    """The key of the client's next release in a channel; no key is given twice, also not by a resumed client."""
    check_noise(client)
    own = secret(client, options)
    # With noise=seed the 16 bytes are the run's, and so anybody's who knows its seed.
    material = bytes.fromhex(own) if own else client.rng("privacy", OUTSIDE).bytes(SECRET_BYTES)
    releases = client.state.setdefault(RELEASES, {})
    number = int(releases.get(channel, 0))
    releases[channel] = number + 1
    return noise_key(material, client.id, channel, number)


def hidden(client: Client, purpose: str, step: Step, options: Any) -> np.random.Generator:
    """``client.rng`` of a purpose that nobody else may foresee."""
    return client.rng(stream_name(purpose, secret(client, options)), step)


def shards(client: Client, options: Any) -> Sequence[np.ndarray]:
    """The client's samples cut into disjoint parts with one discriminator each: positions int64 in its split.

    The same at every call of a run, and drawn without a look at the data.  Patients stay whole where they are the unit
    of privacy.

    Raises:
        UserError: the client has fewer samples, or patients, than shards.
    """
    if options.shards == 1:
        return [np.arange(client.samples)]
    units = np.arange(client.samples) if client.patients is None else client.patients
    count = int(units.max(initial=-1)) + 1
    if count < options.shards:
        raise UserError(
            f'Method option "shards" is {options.shards}, but client {client.id} has {count} '
            f"{'samples' if client.patients is None else 'patients'}: use fewer shards, or larger clients."
        )
    order = client.rng("shards", OUTSIDE).permutation(count)
    return [np.flatnonzero(np.isin(units, part)) for part in np.array_split(order, options.shards)]


def batches(samples: int, options: Any) -> int:
    """Batches that a client's samples fill, which is how often it can train a discriminator in a round."""
    return math.ceil(samples / options.batch)


def trainings(client: Client, options: Any) -> int:
    """Iterations of a round in which the client trains a discriminator, the first ones."""
    own = batches(client.declared, options)
    return min(options.iterations or own, own)


def training(client: Client, round: int, iteration: int, options: Any) -> int:
    """Which shard's discriminator trains: round robin over the client's trainings of the run, a public schedule."""
    return (round * trainings(client, options) + iteration) % options.shards


def serving(client: Client, step: Step, options: Any) -> int:
    """Which shard's discriminator gives the gradients of ``step``, drawn in secret and from a stream of its own."""
    return 0 if options.shards == 1 else int(hidden(client, "serving", step, options).integers(options.shards))


# -- what leaves the client ----------------------------------------------------------------------------------------


def release_histogram(client: Client, histogram: Tensor, options: Any) -> Tensor:
    """The client's class counts fp32 [C] (samples, or pixels for segmentation) as they go to the server, once.

    The noise is in records: a record counts once, and an image with a class for every pixel as often as it has pixels,
    N, known or not, because how many are known is private itself.  Replacing a record takes counts c >= 0 with a sum of
    at most N away and adds others, c', so the counts change by ||c' - c|| <= sqrt(||c||^2 + ||c'||^2) <= sqrt(2) N in
    the Euclidean norm: sqrt(2) records, which is reached where all N move from one class to another.  A patient with at
    most k images counts for k records.
    """
    if not options.histogram_noise or not tells_counts(options):
        return histogram  # as it is, or not told at all
    record = math.prod(client.labels.shape[1:])  # what a record may count for: 1, or all of its pixels
    noisy = _noise(client, HISTOGRAM, histogram[None].float(), None, options.histogram_noise * record, options)[0]
    _book(client, HISTOGRAM, _counted(options, client.unit))
    return noisy.clamp_min(0)


def sanitise(
    client: Client, u_d: Tensor | None, u_t: Tensor | None, options: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The two gradients of a generator step as they go to the server.

    A row that is not finite goes as noise around 0: had it made the answer NaN, that would tell of the data.

    Args:
        u_d: fp32 [B, C, H, W], row b the gradient of the batch's realism with respect to image b, through the private
            discriminator; None where the generator's loss has no realism.
        u_t: fp32 [B, C, H, W], the gradient through the teacher of the terms that use its logits; None where the loss
            has no such terms.  Neither has the 1 / B of a mean over images nor the weight pi_k of the client, both of
            which are public and come after the noise, so that a row's size depends neither on the batch nor on the
            number of clients.

    Returns:
        Both, clipped and noised row by row where their noise is not 0; the client sends ``pi_k (w_real u_d + u_t)``.

    Raises:
        ValueError: the client was not told the noise.
    """
    if not private(options):
        return u_d, u_t
    if TERMS not in client.state:
        raise ValueError(f"sanitise: expected client {client.id} to have been told the noise, given no terms")
    sigma = client.state[TERMS]["sigma_d"]
    if sigma and u_d is not None:
        u_d = _noise(client, DISCRIMINATOR, u_d, clip_d(options), sigma, options)
        _book(client, DISCRIMINATOR, multiplier(sigma, len(u_d)), options.shards)
    if options.sigma_t and u_t is not None:
        u_t = _noise(client, TEACHER, u_t, options.clip_t, options.sigma_t, options)
        _book(client, TEACHER, multiplier(options.sigma_t, len(u_t)))
    return u_d, u_t


def _noise(client: Client, channel: str, rows: Tensor, bound: float | None, noise: float, options: Any) -> Tensor:
    """One release: rows clipped to ``bound`` (None: as they are), and noise from a key of its own."""
    key = next_key(client, channel, options)
    flat = rows.detach().reshape(len(rows), -1).contiguous()
    if bound is None:
        result = flat + clip_and_noise(torch.zeros_like(flat), 1.0, noise, key.seed, key.offset)
    else:
        finite = torch.isfinite(flat).all(1, keepdim=True)
        result = clip_and_noise(flat.masked_fill(~finite, 0.0), bound, noise, key.seed, key.offset)
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
    if client.load_pretrained(teacher):
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

        agreed = client.state.get(TERMS, {"sigma_d": 0.0, "steps": 0})

        def account(sigma: float) -> Accountant:
            accountant = _beside(options, agreed["sigma_d"], int(agreed["steps"]), client.unit)
            accountant.dp_sgd(TEACHER, sigma, rate=rate, steps=steps)
            return accountant

        return least_noise(account, options.epsilon, options.delta)  # all that the rest leaves

    check_noise(client)
    client.state.setdefault(RELEASES, {})  # before the ledger, which without it is an earlier version's
    patients, images = client.patients, client.unit.images
    spending = DPSGD(options.teacher_clip, noise, TEACHER, secret(client, options), patients, images)
    client.fit_privately(method, step, module, spending, rows=rows)
    return True
