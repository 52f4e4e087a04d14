"""FedDyn: a dynamic regulariser on every client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedkern.methods.base import vectors_of
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import ClientId, Message, Phase, Received, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.terms import Terms
from fedkern.process.device_copies import fetch
from fedkern.typed_option import option


@register("feddyn")
class FedDyn(FedAvg):
    """FedAvg with a regulariser that aligns local and global optima (arXiv 2111.04263).

    Client k keeps the vector g_k, and the server keeps s, which is -h / alpha in the paper.  N is the number of
    clients:

        theta_k = argmin L_k(theta) - <g_k, theta> + alpha_k/2 ||theta - theta_received||^2
        g_k    <- g_k - alpha_k (theta_k - theta_received)
        s      <- s + |S|/N (mean_S theta_k - theta_received)
        theta   = mean_S theta_k + s

    All means over S are uniform.  alpha_k is alpha n / (N n_k) with ``weighting=samples``, which weighs the clients'
    objectives by their samples as the released code does.  With ``weighting=uniform`` alpha_k is alpha, as in the
    paper.

    The evaluated and saved model is mean_S theta_k, as in the released code.  ``evaluate=server`` takes theta, which
    the clients receive.

    A round costs the bytes of FedAvg and the number alpha_k.  ``--clip-update-norm`` is refused: g_k follows a client's
    whole update, and the server's s must agree with g_k.

    Source: Acar et al., ICLR 2021, algorithm 1.
    """

    requires = frozenset({"loss"})
    asynchronous = False  # counts on whole rounds
    averages = True
    reduce = FedAvg.reduce  # server_update only counts the uploads
    follows_own_update = True
    stateless = False

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
        client.state["gradient"] = before - message["alpha"] * (fetch(result["parameters"]) - message["parameters"])
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
    def allows_server_rule(self) -> bool:
        return False  # the clients' states follow from the average itself

    def weight(self, server: Server, upload: Upload) -> float:
        return 1.0  # the algorithm's average is uniform; ``weighting`` scales the clients' regularisers instead

    def vectors(self, server: Server) -> Message:
        vectors = super().vectors(server)
        return vectors if self.options.evaluate == "server" else {**vectors, "parameters": server.state["average"]}
