"""The places where something that depends on private data leaves a client of FedIOD: the seams of its privacy.

FedIOD's own files call these functions and nothing else where a client answers, so that a mechanism stands here alone.
Without privacy every one of them hands on what it was given (methods notes 2.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedkern.methods.base import Client, Federation, Objective, Server, Step
from fedkern.methods.options import Options


@dataclass(frozen=True)
class PrivacyOptions(Options):
    """Knobs of FedIOD's differential privacy."""


def private(options: Any) -> bool:
    """Whether :func:`sanitise` does anything, so that every client's rows are needed on their own."""
    return False


def prepare(server: Server, options: Any) -> None:
    """Called once before anything is written (``Method.start``): may fill ``server.state["privacy"]``."""


def shards(client: Client, options: Any) -> Sequence[np.ndarray]:
    """The client's samples cut into disjoint parts with one discriminator each: positions int64 in its split.

    The same at every call of a run: drawn from ``client.rng`` of a fixed step.
    """
    return [np.arange(client.samples)]


def serving(client: Client, step: Step, options: Any) -> int:
    """Which shard's discriminator trains and answers in the exchange of ``step``, drawn from the client's stream."""
    return 0


def train_teacher(
    method: Objective, client: Client, step: Step, module: nn.Module, rows: np.ndarray, options: Any
) -> bool:
    """Trains the client's teacher with differential privacy on the samples at ``rows``, in place.

    Returns:
        False where it is to be trained as usual.
    """
    return False


def release_histogram(client: Client, step: Step, histogram: Tensor, options: Any) -> Tensor:
    """The client's class counts fp32 [C] (samples, or pixels for segmentation) as they go to the server, once."""
    return histogram


def release_scores(client: Client, step: Step, scores: Tensor, options: Any) -> Tensor:
    """The discriminator's mean confidence in every image, fp32 [B] in (0, 1), as it goes to the server."""
    return scores


def sanitise(client: Client, step: Step, u_d: Tensor, u_t: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """The two gradients of a generator step as they go to the server; state belongs in ``client.state["privacy"]``.

    Args:
        u_d: fp32 [B, C, H, W], row b the gradient of the realism of image b alone (no client weight, no 1 / B) with
            respect to the image, through the private discriminator.
        u_t: fp32 [B, C, H, W], the gradient through the teacher of the terms that use its logits, times B, so that a
            row's size does not depend on the batch.

    Returns:
        Both, clipped and noised row by row; the server adds ``realism weight * u_d + u_t`` over the clients.
    """
    return u_d, u_t


def report(server: Server, federation: Federation, options: Any) -> dict[str, float]:
    """Figures of the privacy spent so far (``epsilon``, ``delta``), for the server's report after every round."""
    return {}
