"""Distributionally robust client weights: min over models, max over mixtures of clients (FedDRA, agnostic FL).

    min_theta max_{w in Q} sum_k w_k L_k(theta)

After a round every client says how large the loss l_k of the new model is on samples that it never trains on, and the
server takes ``v_k = w_k exp(eta l_k)`` back to the set Q of mixtures around a centre
(`fedkern.methods.common.robust_weights`).  The weights act in the next round, by default as the weights of the
average: local SGD on ``sum_k w_k L_k``.

The step moves weight among those that took part alone; the way back into Q, where it is needed, moves all.  A client
keeps the model that it was asked about and is sent no other one to train, so the losses cost a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkern.data.cases import drawn_rows
from fedkern.errors import UserError
from fedkern.methods.base import (
    OUTSIDE,
    VECTORS,
    Client,
    ClientId,
    Declaration,
    LocalTraining,
    Message,
    Number,
    Received,
    Round,
    Server,
    Step,
    Upload,
    option,
)
from fedkern.methods.common.robust_weights import Weights, distance, exponentiated_step, project
from fedkern.methods.common.supervised import batches_of, supervised_loss

LOSSES = "losses"
"""The exchange in which the server learns the clients' losses."""
LEAST = 1e-12
"""Relative weight in the average of a client whose weight is zero: a round of such clients alone still has a mean."""


class Robust(LocalTraining):
    """Methods whose server weighs clients by their losses, which it learns in the exchange `LOSSES`."""

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        """Knobs of the client weights."""

        weighting: str = option(
            "uniform", "centre of the set of client weights: the same for all, or the shares of the samples",
            choices=("uniform", "samples"),
        )  # fmt: skip
        eta: float = option(0.5, "step size of the client weights: how fast they follow the losses", low=0)
        dro_apply: str = option(
            "aggregate", "where the client weights act: in the average, on the local losses (times N), or as in the "
            "released code (on the local losses as they are, which AdamW does not see)",
            choices=("aggregate", "loss", "loss_code"),
        )  # fmt: skip
        loss_split: str = option(
            "holdout", "what the clients' losses are taken on: samples that they never train on, or training samples",
            choices=("holdout", "train"),
        )  # fmt: skip
        loss_share: float = option(0.1, "share of a client's samples that its loss is taken on", above=0, high=0.5)
        loss_batch: int = option(
            32, "batch size of those losses, the same for all clients; smaller where one has fewer samples", low=2
        )

    @property
    def radius(self) -> float:
        """The radius rho of the set of client weights."""
        raise NotImplementedError

    # -- the exchanges: one to train, and that of the losses -------------------------------------------------------

    def send(self, server: Server, step: Step) -> Message | dict[ClientId, Message]:
        return self.ask(server) if step.exchange == LOSSES else self.assign(server)

    def client_update(self, client: Client, step: Step, message: Message) -> Message:
        if step.exchange == LOSSES:
            return self.own_loss(client, message)
        client.report["weight"] = message["weight"]
        return client.train(self, step, {**message, **self.held(client, message)}, rows=self.rows(client)[0])

    def expects(self, server: Server, step: Step, client: ClientId, message: Message) -> Declaration:
        return {"loss": Number()} if step.exchange == LOSSES else super().expects(server, step, client, message)

    def server_update(self, server: Server, step: Step, uploads: Iterable[Upload]) -> None:
        if step.exchange == LOSSES:
            self.learn(server, uploads)
        else:
            super().server_update(server, step, uploads)

    def statistics_at(self, entry: Round) -> int | None:
        return entry.exchanges.index(LOSSES) if LOSSES in entry.exchanges else None

    # -- the weights -----------------------------------------------------------------------------------------------

    def centre(self, server: Server) -> Weights:
        """The clients' weights before anything is known of their losses, float64 [N]."""
        samples = np.asarray(server.federation.samples, dtype=np.float64)
        even = np.full(len(samples), 1 / len(samples))
        return even if self.options.weighting == "uniform" else samples / samples.sum()

    def start(self, server: Server) -> None:
        super().start(server)
        server.state["weights"] = torch.from_numpy(self.centre(server))
        server.state["current"] = []  # clients that have the global model already

    def weights(self, server: Server) -> Weights:
        """The weights in force, float64 [N]."""
        vector: Tensor = server.state["weights"]
        return vector.numpy()

    def weight(self, server: Server, upload: Upload) -> float:
        own = self.weights(server) if self.options.dro_apply == "aggregate" else self.centre(server)
        if self.options.dro_apply == "loss_code":
            return 1.0
        return max(float(own[upload.client_id]) * len(own), LEAST)

    def scale(self, server: Server, client: int) -> float:
        """The factor on a client's local loss."""
        w = float(self.weights(server)[client])
        apply = self.options.dro_apply
        return w / float(self.centre(server)[client]) if apply == "loss" else w if apply == "loss_code" else 1.0

    def assign(self, server: Server) -> dict[ClientId, Message]:
        """What every client gets to train the global model: its weight, and the model unless it has it from before."""
        vectors = vectors_of(server.state)
        known: list[int] = server.state["current"]
        return {k: own if k in known else {**vectors, **own} for k, own in self.shares(server).items()}

    def shares(self, server: Server) -> dict[ClientId, Message]:
        """Every client's weight and, where the weights act on local losses, the factor on its own."""
        result: dict[ClientId, Message] = {}
        for k, weight in enumerate(self.weights(server).tolist()):
            result[k] = {"weight": weight}
            if self.options.dro_apply != "aggregate":
                result[k]["scale"] = self.scale(server, k)
        return result

    def ask(self, server: Server) -> Message:
        """The message of the exchange ``losses``: the model, and how many samples a loss is taken among."""
        least = min(self.judged(n) for n in server.federation.samples)
        vectors = vectors_of(server.state)
        if "asked" in server.round_cache:  # for the statistics that it has now, clients have got the rest of it
            vectors = {"buffers": vectors["buffers"]}
        return {**vectors, "batch": min(self.options.loss_batch, least)}

    def average(self, server: Server, uploads: Iterable[Upload]) -> Message:
        server.state["current"] = []
        return super().average(server, uploads)

    def learn(self, server: Server, uploads: Iterable[Upload]) -> None:
        """Takes the weights one step up the losses of ``uploads``, and reports both."""
        losses = np.full(server.federation.clients, np.nan)
        server.state["current"] = []
        for upload in uploads:
            server.state["current"] = [*server.state["current"], upload.client_id]
            losses[upload.client_id] = upload.message["loss"]
        known = losses[~np.isnan(losses)]
        if not len(known):
            return
        old, centre = self.weights(server), self.centre(server)
        uniform = self.options.weighting == "uniform"
        new = project(exponentiated_step(old, losses, self.options.eta), self.radius, None if uniform else centre)
        server.state["weights"] = torch.from_numpy(new)
        server.report.update(
            robust_mean_loss=float(known.mean()),
            robust_worst_loss=float(known.max()),
            largest_weight=float(new.max()),
            smallest_weight=float(new.min()),
            weights_distance=distance(new, None if uniform else centre),
        )

    # -- the clients -----------------------------------------------------------------------------------------------

    def judged(self, samples: int) -> int:
        """On how many of a client's samples its loss is taken, at least."""
        return max(2, round(self.options.loss_share * samples))

    def check(self, client: Client) -> None:
        trained = len(self.rows(client)[0])
        if trained < 2:
            named = "" if client.groups is None else f" of {int(client.groups.max()) + 1} images or patients"
            raise UserError(
                f"Client {client.id} has {client.samples} samples{named}, too few to keep some from the training for "
                "its loss: use fewer clients or more samples."
            )

    def divided(self, client: Client) -> tuple[np.ndarray, np.ndarray]:
        """int64 rows of the client's samples: those that its loss is not taken on, and those that it is taken on.

        All samples of a patient and all texts of an image are on one side; in the second, patients and images follow
        each other before their further samples do, so that a batch has few of them twice.
        """
        units, count = client.groups, self.judged(client.samples)
        if units is None:
            order = client.rng("held-out", OUTSIDE).permutation(client.samples)
            return order[count:], order[:count]
        parts = drawn_rows(client.rng("held-out", OUTSIDE), client.samples, units)
        held = int(np.searchsorted(np.cumsum([len(part) for part in parts]), count)) + 1
        most = max(len(part) for part in parts[:held])
        judged = [part[turn] for turn in range(most) for part in parts[:held] if turn < len(part)]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts[held:]]), np.array(judged, dtype=np.int64)

    def rows(self, client: Client) -> tuple[np.ndarray, np.ndarray]:
        """int64 rows of the client's samples: those that it trains on, and those that its loss is taken on.

        The same in every round.
        """
        kept, judged = self.divided(client)
        return np.arange(client.samples) if self.options.loss_split == "train" else np.sort(kept), judged

    def statistics_rows(self, client: Client) -> np.ndarray:
        return self.rows(client)[0]

    def untrained(self, client: Client) -> np.ndarray:
        kept, judged = self.rows(client)
        return np.setdiff1d(judged, kept)

    def held(self, client: Client, message: Message) -> Message:
        """The vectors of the global model: of the message, or of the last one that the client was asked about."""
        return vectors_of(message) or client.state["model"]

    def own_loss(self, client: Client, message: Message) -> Message:
        """The mean loss of the received model, in eval mode, over whole batches of the client's held-out samples."""
        model = {**vectors_of(client.round_cache.get("asked", {})), **vectors_of(message)}
        client.state["model"] = model
        network = client.frozen(model)
        batches = batches_of(self.rows(client)[1], int(message["batch"]))
        with torch.no_grad():
            losses = [float(self.judge(network, client.batch(rows))) for rows in batches]
        loss = sum(losses) / len(losses)
        client.report["own_loss"] = loss
        return {"loss": loss}

    def judge(self, model: Any, batch: Any) -> Tensor:
        """The loss that the weights are about, a scalar."""
        return supervised_loss(model, batch)

    def scaled(self, loss: Tensor, received: Received) -> Tensor:
        """The local loss times the client's factor, where the weights act on losses."""
        factor = float(received.message.get("scale", 1.0))
        return loss if factor == 1 else loss * factor


def vectors_of(message: Mapping[str, Any]) -> Message:
    """The vectors of a network in a message or state."""
    return {name: message[name] for name in VECTORS if name in message}
