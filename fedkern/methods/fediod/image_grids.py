"""Pictures of a FedIOD round: images, teacher weights and teachers' agreement."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fedkern.methods.common.oneshot_distill import torch_stream
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.losses import normalise_weights
from fedkern.methods.fediod.server import NOISE, Ensemble
from fedkern.methods.protocol import BEFORE
from fedkern.methods.roles import Server
from fedkern.models.networks.generator import Generator

SHOWN = 8
"""Number of generated images in the picture."""


def log_pictures(server: Server, generator: Generator | None, options: IODOptions, ensemble: Ensemble | None) -> None:
    """Log the pictures of a round's last iteration, from what there is of generator and ensemble."""
    everyone = server.federation.clients
    if generator is not None:
        server.log_image("generated", lambda: _images(server, generator, options))
    if ensemble is None:
        return
    ids, logits, weights = ensemble.ids, ensemble.logits, normalise_weights(ensemble.weights, ensemble.mask)
    server.log_image(
        "teacher_weights",
        lambda: _rows(weights.mean(1), ids, everyone),
        axes=("client", "class", "weight of the client's teacher"),
    )
    server.log_image(
        "agreement",
        lambda: _rows(_rows(agreement(logits), ids, everyone).T, ids, everyone),
        axes=("client", "client", "share of images with the same predicted class"),
    )


def agreement(logits: Tensor) -> Tensor:
    """Return the share of images with equal predictions of two teachers, ``[K, K]``."""
    classes = logits.argmax(2).flatten(1)
    return torch.stack([(classes == row).float().mean(1) for row in classes])


def _rows(table: Tensor, ids: list[int], count: int) -> Tensor:
    rows = table.new_full((count, table.shape[1]), float("nan"))
    rows[ids] = table
    return rows


@torch.no_grad()
def _images(server: Server, generator: Generator, options: IODOptions) -> Tensor:
    """Return generated images in [0, 1], from the same noise in every round."""
    draw = torch_stream(server, "shown", BEFORE)
    z = torch.randn(options.batch, NOISE, generator=draw).to(server.device)
    # A copy: a forward pass in train mode would change the running statistics of batch norm.
    x: Tensor = copy.deepcopy(generator).train()(z)[:SHOWN]
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (server.mean, server.std))
    return x * std + mean
