"""q-FFL: federated learning in which clients with high losses weigh more."""

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
"""Added to a client's loss, as in the released code, so that its powers stay finite."""


@register("qffl")
class QFFL(FedAvg):
    """FedAvg in which clients with high losses weigh more: fair federated learning (q-FedAvg, arXiv 1905.10497).

        min_theta sum_k a_k / (q + 1) L_k(theta)^(q + 1)

    L_k is the mean loss of the received network theta over all training samples of client k, in eval mode.  The client
    trains as in FedAvg, with the learning rate eta:

        d_k   = (theta - theta_k) / eta
        h_k   = q L_k^(q - 1) ||d_k||^2 + L_k^q / eta
        theta <- theta - sum_{k in S} a_k L_k^q d_k / sum_{k in S} a_k h_k

    a_k is n_k with ``weighting=samples``, and 1 with ``weighting=uniform``.  ``q=0`` is FedAvg.  A client uploads
    theta - L_k^q d_k / h_k and the number eta h_k, so the server's average with the weights a_k eta h_k is the step.
    Running statistics have the same weights.

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

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network = client.frozen(message)
        loss = LEAST
        with torch.no_grad():
            for batch in client.in_order(client.task.outside):
                loss += float(batch.known / client.known) * float(batch.task.loss(network, batch))
        result = client.train(self, phase, message)
        received, trained = message["parameters"].cpu(), fetch(result["parameters"])
        factor = 1 + self.options.q * float((trained - received).double().square().sum()) / (loss * client.lr)
        client.report["start_loss"] = loss
        result["parameters"] = torch.lerp(received, trained, 1 / factor)
        return {**result, "curvature": factor * loss**self.options.q}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {**super().expects(server, phase, client, message), "curvature": Number(low=0)}

    def weight(self, server: Server, upload: Upload) -> float:
        return super().weight(server, upload) * float(upload.message["curvature"])
