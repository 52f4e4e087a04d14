"""Distributionally robust client weights: min over models, max over mixtures of clients (FedDRA, agnostic FL).

    min_theta max_{w in Q} sum_k w_k L_k(theta)

After a round every client reports the loss l_k of the new model on held-out samples, and keeps the model for the next
round. The server projects ``v_k = w_k exp(eta l_k)`` onto the set Q (`fedkern.methods.common.robust_weights`). The step
moves weight among the round's participants, the projection among all.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.data.sharing.groups import drawn_rows
from fedkern.errors import UserError
from fedkern.methods.base import LocalTraining, vectors_of
from fedkern.methods.common.robust_weights import Weights, distance, exponentiated_step, project
from fedkern.methods.protocol import OUTSIDE, Batch, ClientId, Message, Phase, Received, Round, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.uploads import Declaration, Number
from fedkern.typed_option import option

LOSSES = "losses"
"""Name of the exchange in which clients report their losses."""
LEAST = 1e-12
"""Least relative weight of a client in the average, so that a round of zero-weight clients alone has a mean."""


class Robust(LocalTraining):
    """Base of methods whose server weighs clients by their losses, reported in the exchange `LOSSES`.

    Losses are in full batches of one size for all clients. ``dro_apply`` decides where the weights w act, with the
    centre c of the set (`centre`):

    - ``aggregate``: in the average, where client k weighs w_k, at least 1e-12 / N.
    - ``loss``: on the local loss, times w_k / c_k, with c_k in the average.
    - ``loss_code``: on the local loss, times w_k, with equal weights in the average, as in the released code.
    """

    averages = True

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        """Options of the client weights."""

        weighting: str = option(
            "uniform",
            "centre of the set of client weights: equal weights, or the shares of the samples",
            choices=("uniform", "samples"),
        )
        eta: float = option(
            0.5, "step size of the client weights; the larger, the faster they follow the losses", low=0
        )
        dro_apply: str = option(
            "aggregate",
            "where the client weights act: aggregate (in the average), loss (on the local losses, times N), "
            "loss_code (on the local losses as in the released code; AdamW does not see them)",
            choices=("aggregate", "loss", "loss_code"),
        )
        loss_split: str = option(
            "holdout",
            "samples for the clients' losses: holdout (never trained on), or train (training samples)",
            choices=("holdout", "train"),
        )
        loss_share: float = option(0.1, "share of a client's samples for its loss", above=0, high=0.5)
        loss_batch: int = option(
            32,
            "batch size for the clients' losses, the same for all clients; smaller for a client with fewer samples",
            low=2,
        )
        loss_samples: int = option(
            0,
            "least samples behind a client's loss, averaged over its latest rounds until reached; 0: this round only",
            low=0,
        )

    @property
    def radius(self) -> float:
        """The radius rho of the set of client weights."""
        raise NotImplementedError

    # -- the exchanges: one for training, one for the losses -------------------------------------------------------

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        return self.ask(server) if phase.exchange == LOSSES else self.assign(server)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if phase.exchange == LOSSES:
            return self.own_loss(client, message)
        client.report["weight"] = message["weight"]
        return client.train(self, phase, {**message, **self.held(client, message)}, rows=self.rows(client)[0])

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {"loss": Number()} if phase.exchange == LOSSES else super().expects(server, phase, client, message)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange == LOSSES:
            self.learn(server, uploads)
        else:
            super().server_update(server, phase, uploads)

    def statistics_at(self, entry: Round) -> int | None:
        return entry.exchanges.index(LOSSES) if LOSSES in entry.exchanges else None

    # -- the weights -----------------------------------------------------------------------------------------------

    def centre(self, server: Server) -> Weights:
        """Return the centre of the set of client weights, float64 [N], their initial value."""
        samples = np.asarray(server.federation.samples, dtype=np.float64)
        even = np.full(len(samples), 1 / len(samples))
        return even if self.options.weighting == "uniform" else samples / samples.sum()

    def start(self, server: Server) -> None:
        super().start(server)
        server.state["weights"] = torch.from_numpy(self.centre(server))
        server.state["current"] = []  # clients that already hold the global model

    def weights(self, server: Server) -> Weights:
        vector: Tensor = server.state["weights"]
        return vector.numpy()

    def weight(self, server: Server, upload: Upload) -> float:
        vector = self.weights(server) if self.options.dro_apply == "aggregate" else self.centre(server)
        if self.options.dro_apply == "loss_code":
            return 1.0
        return max(float(vector[upload.client_id]) * len(vector), LEAST)

    def assign(self, server: Server) -> dict[ClientId, Message]:
        """Return every client's weight, and the model unless the client holds it."""
        vectors = vectors_of(server.state)
        holders = set(server.state["current"])
        return {k: share if k in holders else {**vectors, **share} for k, share in self.shares(server).items()}

    def shares(self, server: Server) -> dict[ClientId, Message]:
        """Return every client's weight and, unless ``aggregate``, the factor on its loss."""
        result: dict[ClientId, Message] = {k: {"weight": w} for k, w in enumerate(self.weights(server).tolist())}
        if self.options.dro_apply != "aggregate":
            is_relative, centre = self.options.dro_apply == "loss", self.centre(server)
            for k, share in result.items():
                share["scale"] = share["weight"] / float(centre[k]) if is_relative else share["weight"]
        return result

    def ask(self, server: Server) -> Message:
        """Return the model and the batch size of the losses, the same for all clients."""
        fewest = min(self.judged(n) for n in server.federation.samples)
        vectors = vectors_of(server.state)
        if "asked" in server.round_cache:  # pooling has sent the model already; only its statistics are new
            vectors = {"buffers": vectors["buffers"]}
        return {**vectors, "batch": min(self.options.loss_batch, fewest)}

    def average(self, server: Server, uploads: Iterable[Upload]) -> Message:
        server.state["current"] = []
        return super().average(server, uploads)

    def learn(self, server: Server, uploads: Iterable[Upload]) -> None:
        """Update the weights by one ascent step on the reported losses."""
        losses = np.full(server.federation.clients, np.nan)
        current = server.state["current"] = []
        for upload in uploads:
            current.append(upload.client_id)
            losses[upload.client_id] = upload.message["loss"]
        reported = losses[~np.isnan(losses)]
        if not len(reported):
            return
        centre = None if self.options.weighting == "uniform" else self.centre(server)
        new = project(exponentiated_step(self.weights(server), losses, self.options.eta), self.radius, centre)
        server.state["weights"] = torch.from_numpy(new)
        server.report.update(
            robust_mean_loss=float(reported.mean()),
            robust_worst_loss=float(reported.max()),
            largest_weight=float(new.max()),
            smallest_weight=float(new.min()),
            weights_distance=distance(new, centre),
        )

    # -- the clients -----------------------------------------------------------------------------------------------

    def judged(self, samples: int) -> int:
        """Return the least number of samples for a client's loss."""
        return max(2, round(float(self.options.loss_share) * samples))

    def check(self, client: Client) -> None:
        if len(self.rows(client)[0]) < 2:
            named = "" if client.groups is None else f" of {int(client.groups.max()) + 1} images or patients"
            raise UserError(
                f"Client {client.label} has {client.samples} samples{named}, too few to keep some from the training "
                "for its loss: use fewer clients or more samples."
            )

    def rows(self, client: Client) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 rows of the client's training samples and of its loss samples, fixed for the run.

        With ``loss_split=holdout`` samples of a patient or image stay together, and the second array takes turns among
        them, so that a batch seldom holds two of one.
        """
        units, count = client.groups, self.judged(client.samples)
        if units is None:
            order = client.rng("held-out", OUTSIDE).permutation(client.samples)
            trained, judged = order[count:], order[:count]
        else:
            parts = drawn_rows(client.rng("held-out", OUTSIDE), client.samples, units)
            end = int(np.searchsorted(np.cumsum([len(part) for part in parts]), count)) + 1
            longest = max(len(part) for part in parts[:end])
            turns = [part[turn] for turn in range(longest) for part in parts[:end] if turn < len(part)]
            trained = np.concatenate([np.empty(0, dtype=np.int64), *parts[end:]])
            judged = np.array(turns, dtype=np.int64)
        return np.arange(client.samples) if self.options.loss_split == "train" else np.sort(trained), judged

    def statistics_rows(self, client: Client) -> np.ndarray:
        return self.rows(client)[0]

    def untrained(self, client: Client) -> np.ndarray:
        trained, judged = self.rows(client)
        return np.setdiff1d(judged, trained)

    def held(self, client: Client, message: Message) -> Message:
        """Return the global model's vectors, from the message or the client's last evaluation."""
        return vectors_of(message) or client.state["model"]

    def own_loss(self, client: Client, message: Message) -> Message:
        """Return the received model's mean loss, in eval mode, over full batches of the loss samples."""
        model = {**vectors_of(client.round_cache.get("asked", {})), **vectors_of(message)}
        client.state["model"] = model
        network = client.frozen(model)
        rows, size = self.rows(client)[1], int(message["batch"])
        batches = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        with torch.no_grad():
            losses = [float(self.judge(network, client.batch(part))) for part in batches]
        loss = client.report["own_loss"] = self.running(client, sum(losses) / len(losses), sum(map(len, batches)))
        return {"loss": loss}

    def running(self, client: Client, loss: float, samples: int) -> float:
        """Return the mean of the latest rounds' losses that cover `loss_samples` samples.

        The rounds use the same few samples, so the mean smooths the models' last steps.
        """
        wanted = self.options.loss_samples
        if samples >= wanted:
            return loss
        past = client.state.get("losses", torch.empty(0, 2, dtype=torch.float64))
        latest = torch.cat([torch.tensor([[loss, samples]], dtype=torch.float64), past])  # [rounds, 2], latest first
        before = latest[:, 1].cumsum(0) - latest[:, 1]
        client.state["losses"] = latest = latest[before < wanted]
        return float((latest[:, 0] * latest[:, 1]).sum() / latest[:, 1].sum())

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch that determines the client weights."""
        return batch.task.loss(model, batch)

    def scaled(self, loss: Tensor, received: Received) -> Tensor:
        factor = float(received.message.get("scale", 1.0))
        return loss if factor == 1 else loss * factor
