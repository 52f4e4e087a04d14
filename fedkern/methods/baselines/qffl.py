"""q-FFL: federated learning in which clients with high losses weigh more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import ClientId, Message, Phase, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.uploads import Declaration, Number
from fedkern.process.device_copies import fetch
from fedkern.typed_option import option

LEAST = 1e-10
"""Least loss of a client, as in the released code, so that its powers stay finite."""


@register("qffl")
class QFFL(FedAvg):
    """FedAvg in which clients with high losses weigh more: fair federated learning (q-FedAvg, arXiv 1905.10497).

        min_theta sum_k a_k / (q + 1) L_k(theta)^(q + 1)

    L_k is the mean loss of the received network theta over all training samples of client k, in eval mode.  The client
    trains as in FedAvg, with the learning rate eta:

        d_k   = (theta - theta_k) / eta
        h_k   = q L_k^(q - 1) ||d_k||^2 + L_k^q / eta
        theta <- theta - sum_{k in S} a_k L_k^q d_k / sum_{k in S} a_k h_k

    a_k is n_k with ``weighting=samples``, and 1 with ``weighting=uniform``.  ``q=0`` is FedAvg.  Running statistics are
    averaged with the weights a_k L_k^q.  A round costs the bytes of FedAvg and two numbers.

    Differences from the paper:

    - Clients are drawn uniformly and weigh a_k.  The paper draws them in proportion to their samples, and they weigh
      the same.
    - eta is the rate of the round's first epoch.  The paper has plain SGD at a constant rate.

    Source: Li et al., ICLR 2020, algorithm 2.
    """

    requires = frozenset({"loss"})
    averages = True
    asynchronous = False  # counts on whole rounds

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        q: float = option(1.0, "weight of fairness: the larger, the more equal are the clients' losses", low=0)

    @property
    def allows_server_rule(self) -> bool:
        return False  # the step has a length of its own

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        q, network = self.options.q, client.frozen(message)
        with torch.no_grad():
            parts = [
                float(batch.known / client.known) * float(batch.task.loss(network, batch))
                for batch in client.in_order(client.task.outside)
            ]
        loss = max(sum(parts), LEAST)
        result = client.train(self, phase, message)
        change = fetch(result["parameters"]) - message["parameters"].cpu()
        slope = q * loss ** (q - 1) * float(change.double().square().sum()) / client.lr
        client.report["start_loss"] = loss
        return {**result, "power": loss**q, "slope": slope}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {**super().expects(server, phase, client, message), "power": Number(low=0), "slope": Number(low=0)}

    def weight(self, server: Server, upload: Upload) -> float:
        return super().weight(server, upload) * upload.message["power"]

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        before, weights, slopes = server.state["parameters"], 0.0, 0.0

        def add(upload: Upload) -> Upload:
            nonlocal weights, slopes
            weights += self.weight(server, upload)
            slopes += super(QFFL, self).weight(server, upload) * upload.message["slope"]
            return upload

        super().server_update(server, phase, map(add, uploads))  # map keeps no upload while the next one arrives
        if slopes:
            share = weights / (weights + slopes)
            server.state["parameters"] = torch.lerp(before, server.state["parameters"], share)
