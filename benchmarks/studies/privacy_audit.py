"""Audit of the private channels: the privacy loss that their releases show, beside the claims of their ledgers.

    python -m benchmarks.studies.privacy_audit            # some minutes
    python -m benchmarks.studies.privacy_audit --draw     # the figure again, from the JSON

Writes ``benchmarks/studies/results/privacy_audit.json`` and ``.png``.  ``python -m benchmarks.pages`` then writes the
table of docs/privacy.md.  The audited code runs in federations: ``fediod.private_messages`` for FedIOD's gradients and
counts, ``engine.private_training`` for DP-SGD.

Every mechanism gets the pair of neighbouring data sets that is easiest to tell apart: a canary, one record whose
gradient is longer than the clipping norm and points one way in one data set and the opposite way in the other, where
nothing else points.  Repeats share a call where the mechanism treats them independently, since a call per repeat would
take hours: images of a batch are noised row by row, and canaries of one training have a parameter each.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.page import RESULTS
from benchmarks.recorded import recorded_versions
from benchmarks.studies.audit import audit, claimed_mu
from fedkern.data import Split
from fedkern.data.forms import ImageForm
from fedkern.engine.batches.images import Images
from fedkern.engine.local import private_training
from fedkern.engine.local.training import Schedule
from fedkern.methods.base import Objective, Phase
from fedkern.methods.fediod import private_messages
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.privacy import DPSGD, IMAGE, LEDGER, dpsgd
from fedkern.report.figures import plots
from fedkern.streams import stream

RESULT = RESULTS / "privacy_audit.json"

REPEATS, CONFIDENCE = 50_000, 0.99
HUGE = 1e6  # of a gradient: clipped, whatever the norm
SIDE = 32  # pixels of a side: canaries of one training, and its parameters

Ledger = dict[str, list[list[Any]]]
Runs = Callable[[int, float], tuple[Tensor, Ledger]]
"""From a number of repeats and the canary's direction, 1 or -1, to a score of each and the ledger of one."""


@dataclass(frozen=True)
class Mechanism:
    """Audited mechanism: its name on the page, and its runs."""

    name: str
    runs: Runs


class Client:
    """Client with a stream and a state, like the engine's."""

    def __init__(self, seed: int, samples: int = 2) -> None:
        self.id, self.samples, self.seed = 0, samples, seed
        self.unit, self.patients = IMAGE, None
        self.state: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.labels = torch.zeros(samples, dtype=torch.int64)

    def rng(self, purpose: str, phase: Phase) -> np.random.Generator:
        return stream(self.seed, f"{purpose}/{phase.exchange}", round=phase.round, client=self.id)


# -- FedIOD's channels -------------------------------------------------------------------------------------------------


def channels(*, sigma: float, releases: int = 1, rows: int = 4, shards: int = 1) -> Runs:
    """Return the gradients of a generator's steps through the discriminator, with noise of ``sigma`` clipping norms.

    The canary turns every row of a batch around.  Its direction alternates over rows and releases, and the score takes
    the signs back, so that noise that is used twice cancels.
    """

    def runs(repeats: int, sign: float) -> tuple[Tensor, Ledger]:
        options = IODOptions(batch=rows, iterations=releases, noise="seed", epsilon=1.0, shards=shards)
        client = Client(seed=0 if sign > 0 else 1, samples=shards)
        private_messages.keep_terms(client, {"privacy": {"sigma_d": sigma}})  # type: ignore[arg-type]
        direction = torch.full((1, 4, 4), 0.25)
        scores = torch.zeros(repeats, dtype=torch.float64)
        for t in range(releases):
            flips = (1.0 - 2.0 * ((torch.arange(rows) + t) % 2)).repeat(repeats)[:, None, None, None]
            serves = torch.tensor([_serves(client, t, i, options) for i in range(repeats)])
            u_d = sign * HUGE * flips * direction * serves.repeat_interleave(rows)[:, None, None, None]
            noisy = private_messages.sanitise(client, u_d, options)  # type: ignore[arg-type]
            assert noisy is not None
            # In multiples of the noise, times the signal in it: what tells most of independent parts.
            products = (noisy * flips * direction).flatten(1).sum(1).double() / (sigma * options.clip_d) / sigma
            scores += products.view(repeats, rows).sum(1)
        return scores, _of_one(client.state[LEDGER], repeats)

    return runs


def _serves(client: Client, t: int, repeat: int, options: Any) -> float:
    """Return 1 where the shard that holds the canary serves, as a step of its own draws it."""
    if options.shards == 1:
        return 1.0
    phase = Phase(repeat, "round", f"images {t}")
    return float(private_messages.serving_shard(client, phase, options) == 0)  # type: ignore[arg-type]


def _of_one(ledger: Ledger, repeats: int) -> Ledger:
    """Return the ledger of one batch from that of so many, whose sensitivity is smaller by the root of their number."""
    return {
        channel: [[kind, noise * math.sqrt(repeats), rate, steps] for kind, noise, rate, steps in rows]
        for channel, rows in ledger.items()
    }


def histogram(**settings: Any) -> Runs:
    """Return the class counts of a client, where every canary moves between two classes of its own."""

    def runs(repeats: int, sign: float) -> tuple[Tensor, Ledger]:
        options = IODOptions(batch=4, iterations=1, noise="seed", **settings)
        client = Client(seed=0 if sign > 0 else 1)
        counts = torch.full((repeats, 2), 1000.0)
        counts[:, 0 if sign > 0 else 1] += 1
        noisy = private_messages.release_histogram(client, counts.flatten(), options)  # type: ignore[arg-type]
        return noisy.view(repeats, 2).diff(dim=1)[:, 0].double().neg(), client.state[LEDGER]

    return runs


# -- DP-SGD ------------------------------------------------------------------------------------------------------------


class _Canaries(Objective):
    """Linear network whose i-th parameter only the i-th sample moves, and the parameters before each step."""

    def __init__(self, sign: float) -> None:
        self.sign, self.seen = sign, list[Tensor]()

    def loss(self, model: nn.Module, batch: Any, received: Any) -> Tensor:
        flip = 1.0 - 2.0 * (len(self.seen) % 2)  # noise that is used twice cancels
        self.seen.append(next(model.parameters()).detach().flatten().clone())
        return HUGE * self.sign * flip * model(batch.inputs.flatten(1)).mean()


def dp_sgd(*, noise: float, steps: int = 1, rate: float = 1.0) -> Runs:
    """Return training with Poisson-sampled batches: a canary's score is its parameter's change, signs taken back."""

    def runs(repeats: int, sign: float) -> tuple[Tensor, Ledger]:
        size = SIDE * SIDE
        images = torch.zeros(size, 1, SIDE, SIDE, dtype=torch.uint8)
        images.view(size, size).fill_diagonal_(255)
        split = Split(images, torch.zeros(size, dtype=torch.int64))
        data = Images(split, ImageForm(tuple(split.images.shape[1:]), (0.0,), (1.0,)), torch.device("cpu"), cache=True)
        batch = round(rate * size)
        schedule = Schedule(1.0, 0.0, 0.0, 0.0, 1, batch, max_steps=steps)
        scores: list[Tensor] = []
        while len(scores) * size < repeats:
            client = Client(seed=2 * len(scores) + (0 if sign > 0 else 1), samples=size)
            module, canaries = nn.Linear(size, 1, bias=False), _Canaries(sign)
            nn.init.zeros_(module.weight)
            spending = DPSGD(1.0, lambda rate, steps: noise, "dp-sgd", "")
            phase = Phase(0, "teachers", "teachers")
            private_training.train_privately(client, canaries, phase, module, data, None, schedule, spending, None)  # type: ignore[arg-type]
            path = torch.stack([*canaries.seen, next(module.parameters()).detach().flatten()]).double()
            flips = 1.0 - 2.0 * (torch.arange(steps) % 2)
            scores.append(batch * (flips[:, None] * -path.diff(dim=0)).sum(0))
        return torch.cat(scores)[:repeats], client.state[LEDGER]

    return runs


MECHANISMS = (
    Mechanism("discriminators, one release", channels(sigma=4.0)),
    Mechanism("discriminators, four releases", channels(sigma=8.0, releases=4)),
    Mechanism("discriminators, one of five shards", channels(sigma=2.0, shards=5)),
    Mechanism("class counts", histogram(histogram_noise=1.0)),
    Mechanism("DP-SGD, one step on all samples", dp_sgd(noise=2.0)),
    Mechanism("DP-SGD, four steps on all samples", dp_sgd(noise=4.0, steps=4)),
    Mechanism("DP-SGD, one step, a quarter sampled", dp_sgd(noise=1.0, rate=0.25)),
)


# -- mechanisms that do not do what they book --------------------------------------------------------------------------


@contextmanager
def draws(change: Callable[..., dict[str, Any]]) -> Iterator[None]:
    """Return mechanisms whose noise is not the noise that they book.

    Args:
        change: from the settings of a draw to others: ``max_norm``, ``noise`` (the multiplier), ``seed`` and ``offset``
            of ``clip_and_noise``; DP-SGD's are the first two.
    """
    right, steps = private_messages.clip_and_noise, dpsgd.private_steps

    def clip_and_noise(vectors: Tensor, max_norm: float, noise: float, seed: int, offset: int = 0) -> Any:
        return right(vectors, **change(max_norm=max_norm, noise=noise, seed=seed, offset=offset))

    def private_steps(*arguments: Any, max_norm: float, noise: float, **settings: Any) -> Any:
        return steps(*arguments, **change(max_norm=max_norm, noise=noise), **settings)

    with (
        mock.patch.object(private_messages, "clip_and_noise", clip_and_noise),
        mock.patch.object(dpsgd, "private_steps", private_steps),
    ):
        yield


def halve_noise(**settings: Any) -> dict[str, Any]:
    """Return the settings with half the noise that is booked."""
    return {**settings, "noise": settings["noise"] / 2}


@contextmanager
def stop_sampling() -> Iterator[None]:
    """Disable sampling: the canary's shard always serves, and every sample is in every batch."""
    right = Client.rng

    def rng(self: Client, purpose: str, phase: Phase) -> Any:
        return _Zeros() if purpose.startswith(("serving", "batches")) else right(self, purpose, phase)

    with mock.patch.object(Client, "rng", rng):
        yield


class _Zeros:
    """Generator of the smallest numbers."""

    def integers(self, high: int) -> int:
        return 0

    def random(self, size: int) -> np.ndarray:
        return np.zeros(size)


# -- results -----------------------------------------------------------------------------------------------------------


def measure(mechanism: Mechanism, repeats: int) -> dict[str, Any]:
    """Return the lower bound on mu beside the claimed one, for the mechanism and for a defective one.

    The defect is half the noise, or no sampling where there was some; ``half`` is then the result of half the noise.
    """
    figures = run_audit(mechanism, repeats)
    sampled = any(rate < 1 for rows in figures["ledger"].values() for _, _, rate, _ in rows)
    with stop_sampling() if sampled else draws(halve_noise):
        wrong = run_audit(mechanism, repeats)
    defect = "sampling left out" if sampled else "half the noise"
    caught = {"defect": defect, "lower": wrong["lower"], "claimed": wrong["claimed"]}
    row = {"mechanism": mechanism.name, **figures, "caught": caught}
    if sampled:
        with draws(halve_noise):
            half = run_audit(mechanism, repeats)
        row["half"] = {"lower": half["lower"], "claimed": half["claimed"]}
    return row


def run_audit(mechanism: Mechanism, repeats: int) -> dict[str, Any]:
    """Return an audit's figures, the claimed mu at its false positives, and the ledger of one repeat."""
    scores, ledger = mechanism.runs(repeats, -1.0)
    shifted, _ = mechanism.runs(repeats, 1.0)
    result = audit(scores, shifted, confidence=CONFIDENCE)
    return {**result.to_dict(), "claimed": claimed_mu(ledger, result.false_positives), "ledger": ledger}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw claimed mu, its lower bound, and the lower bound of the mechanism with a defect."""
    figure = plots.new_figure(7.2, 0.8 + 0.34 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["claimed"] for row in rows], 0.7, color="#d8d8d8", label="claimed")
    axes.plot([row["lower"] for row in rows], places, "o", color=plots.BLUE, label="lower bound")
    axes.plot(
        [row["caught"]["lower"] for row in rows], places, "x", color=plots.ORANGE,
        label="lower bound with a defect: half the noise, or sampling left out",
    )  # fmt: skip
    axes.set_yticks(places, [row["mechanism"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("μ of Gaussian differential privacy")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    plots.save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs on each of the two data sets")
    parser.add_argument("--draw", action="store_true", help="only the figure, from the JSON")
    options = parser.parse_args()
    if not options.draw:
        rows = []
        for mechanism in MECHANISMS:
            rows.append(measure(mechanism, options.repeats))
            wrong = rows[-1]["caught"]
            print(
                f"{mechanism.name}: claimed {rows[-1]['claimed']:.3f}, lower bound {rows[-1]['lower']:.3f}, with "
                f"{wrong['defect']} {wrong['lower']:.3f}",
                flush=True,
            )
        known = recorded_versions()
        made_with = {name: known[name] for name in ("fedkern", "torch", "numpy", "python", "commit")}
        RESULT.write_text(json.dumps({"versions": made_with, "mechanisms": rows}, indent=1) + "\n")
    rows = json.loads(RESULT.read_text())["mechanisms"]
    draw(rows, RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
