"""FedDyn (Acar et al., ICLR 2021, arXiv 2111.04263): dynamic regularisation.

Every client's objective changes over the rounds so that its minimum agrees with the global minimum (algorithm 1):

    theta_k = argmin L_k(theta) - <g_k, theta> + alpha/2 ||theta - theta^{t-1}||^2
    g_k <- g_k - alpha (theta_k - theta^{t-1})                      the client's gradient at theta_k, kept by the client
    h <- h - alpha 1/m sum_{k in P} (theta_k - theta^{t-1}),   theta^t = 1/|P| sum_{k in P} theta_k - h / alpha

The server keeps s = -h / alpha, so that only the clients need alpha.  With ``weighting=samples`` the objective is
sum_k (n_k/n) L_k, which scales the clients' losses by m n_k / n.  This equals alpha_k = alpha n / (m n_k) for client k,
as in the released code.  ``weighting=uniform`` is the paper's objective.  The averages of models are uniform in both.

Clients receive theta^t, which differs by the correction -h / alpha from the average of the participants' models.  The
evaluated and saved model is that average, as in the released code, or theta^t with ``evaluate=server``.

A round costs the bytes of FedAvg, and the number alpha_k.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedkern.methods.base import vectors_of
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.protocol import ClientId, Message, Phase, Received, Upload
from fedkern.methods.registry import register
from fedkern.methods.roles import Client, Server
from fedkern.methods.terms import Terms
from fedkern.models.transfer import fetch
from fedkern.typed_option import option


@register("feddyn")
class FedDyn(FedAvg):
    """Regularises every client dynamically, so that local and global optima agree (arXiv 2111.04263)."""

    asks = frozenset({"loss"})
    asynchronous = False  # counts on whole rounds
    averages = True
    reduce = FedAvg.reduce  # server_update only counts the uploads
    follows_own_update = True
    memoryless = False

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        alpha: float = option(0.01, "weight of the dynamic regulariser", above=0)
        evaluate: str = option(
            "average",
            "evaluated model: the clients' average, or the server's model, which the clients receive",
            choices=("average", "server"),
        )

    def start(self, server: Server) -> None:
        super().start(server)
        server.state["average"] = server.state["parameters"]
        server.state["shift"] = torch.zeros_like(server.state["parameters"])

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        message = vectors_of(server.state)
        samples = server.federation.samples
        even = sum(samples) / len(samples)
        uniform = self.options.weighting == "uniform"
        return {
            k: {**message, "alpha": self.options.alpha * (1.0 if uniform else even / n)} for k, n in enumerate(samples)
        }

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        before = client.state.get("gradient", torch.zeros_like(message["parameters"]))
        result = client.train(self, phase, message, extras={"correction": -before.to(client.device)})
        change = fetch(result["parameters"]) - message["parameters"]
        client.state["gradient"] = before - message["alpha"] * change
        return result

    def terms(self, received: Received) -> Terms:
        return Terms(
            correction=received.extras["correction"], anchor=received.parameters, proximal=received.message["alpha"]
        )

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        before, present = server.state["parameters"], 0

        def count(upload: Upload) -> Upload:
            nonlocal present
            present += 1
            return upload

        super().server_update(server, phase, map(count, uploads))  # map keeps no upload while the next one arrives
        if present:
            average = server.state["parameters"]
            share = present / server.federation.clients
            server.state["average"] = average
            server.state["shift"] = server.state["shift"] + share * (average - before)
            server.state["parameters"] = average + server.state["shift"]

    @property
    def steps_once(self) -> bool:
        return False  # the clients' states follow from the average itself

    def weight(self, server: Server, upload: Upload) -> float:
        return 1.0  # the algorithm's average is uniform; ``weighting`` scales the clients' regularisers instead

    def vectors(self, server: Server) -> Message:
        vectors = super().vectors(server)
        return vectors if self.options.evaluate == "server" else {**vectors, "parameters": server.state["average"]}
