"""What FedIOD shows of a round: the generator's images, the teachers' weights, and how far the teachers agree."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fedkern.methods.base import Server, Step
from fedkern.methods.fediod.losses import normalised
from fedkern.methods.fediod.server import Ensemble

SHOWN = 8
"""Images in a row."""


def show(server: Server, generator: Any, options: Any, ensemble: Ensemble | None) -> None:
    """Offers the three pictures of the last iteration of a round.

    Args:
        generator: the one that makes the student's images, in train mode; None without one.
        options: the method's, settled.
        ensemble: the clients that answered, and what their teachers said of the student's images; None where nobody
            was asked, which leaves the images alone.
    """
    everyone = server.federation.clients
    if generator is not None:
        server.log_image("generated", lambda: _images(server, generator, options))
    if ensemble is None:
        return
    ids, logits, weights = ensemble.ids, ensemble.logits, normalised(ensemble.weights, ensemble.mask)
    server.log_image("teacher_weights", lambda: _rows(weights.mean(1), ids, everyone), axes=("client", "class"))
    server.log_image(
        "agreement", lambda: _rows(_rows(agreement(logits), ids, everyone).T, ids, everyone), axes=("client", "client")
    )


def agreement(logits: Tensor) -> Tensor:
    """Share of the images (pixels) of which two teachers say the same class, ``[K, K]``, from ``[K, B, C, ...]``."""
    said = logits.argmax(2).flatten(1)
    return torch.stack([(said == own).float().mean(1) for own in said])


def _rows(table: Tensor, ids: list[int], count: int) -> Tensor:
    """The table with a row for every client, NaN for those that did not answer."""
    whole = table.new_full((count, table.shape[1]), float("nan"))
    whole[ids] = table
    return whole


@torch.no_grad()
def _images(server: Server, generator: Any, options: Any) -> Tensor:
    """Images in [0, 1] of the same noise in every round."""
    draw = torch.Generator().manual_seed(int(server.rng("shown", Step(-1, "", "update")).integers(2**63)))
    z = torch.randn(options.batch, options.nz, generator=draw).to(server.device)
    # A copy: batch norm makes the images of a batch in train mode, and would remember these.
    x = copy.deepcopy(generator).train()(z)[:SHOWN]
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (server.mean, server.std))
    return x * std + mean
