"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378): stochastic controlled averaging.

Control variates c_i of the clients and c of the server correct the drift of local steps (algorithm 1):

    y_i <- y_i - eta (g_i(y_i) - c_i + c)
    c_i+ = g_i(x)                                   option I: the gradient at the received model, one more pass
    c_i+ = c_i - c + (x - y_i) / (K eta)            option II
    x <- x + eta_g sum_i p_i (y_i - x),   c <- c + sum_i p_i (c_i+ - c_i)

Under plain SGD, option II is the mean of the K gradients g_i of the local steps.  This implementation computes that
mean, because with momentum the quotient would be too large by 1 / (1 - momentum).  p_i is the client's share of all
samples; for x the shares of the participants are renormalised.  ``weighting=uniform`` is the paper's 1 / |S| and 1 / N.
So c = sum_i p_i c_i always.

A control variate travels with the model in both directions: the bytes of a round double, except for batch norm's
buffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkern.errors import UserError
from fedkern.methods.base import VECTORS
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.common.personal import with_vectors
from fedkern.methods.protocol import ClientId, Message, Phase, Received, Upload
from fedkern.methods.registry import register
from fedkern.methods.roles import Client, Server
from fedkern.methods.terms import GradientSum, Terms
from fedkern.methods.uploads import Declaration
from fedkern.models.norms import freeze_bn_after
from fedkern.typed_option import option

GRADIENT_BATCH = 64
"""Most samples per backward pass at the received model."""


@register("scaffold")
class Scaffold(FedAvg):
    """Corrects local steps by control variates against client drift; twice FedAvg's bytes (arXiv 1910.06378)."""

    asks = frozenset({"loss"})
    asynchronous = False  # counts on whole rounds
    averages = True
    reduce = (*FedAvg.reduce, "control")
    memoryless = False

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        control: str = option(
            "II", "new control variate: gradient at the received model (I), or mean gradient along the way (II)",
            choices=("I", "II"),
        )  # fmt: skip
        server_lr: float = option(1.0, "step size of the server", above=0)

    def check(self, client: Client) -> None:
        if self.options.control == "I" and "pairs" in client.task.offers:
            raise UserError(
                "The method option control=I is not for image-text data, whose loss is one of batches and not of "
                "samples: use control=II."
            )

    def start(self, server: Server) -> None:
        super().start(server)
        server.state["control"] = torch.zeros_like(server.state["parameters"])

    def send(self, server: Server, phase: Phase) -> Message:
        return {name: server.state[name] for name in (*VECTORS, "control") if name in server.state}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        control = client.state.get("control", torch.zeros_like(message["control"]))
        path = GradientSum(torch.zeros_like(control, device=client.device))
        correction = (message["control"] - control).to(client.device)
        result = client.train(self, phase, message, extras={"correction": correction, "path": path})
        new = self.gradient(client, phase, message) if self.options.control == "I" else path.mean()
        client.state["control"] = new.cpu()
        return {**result, "control": new.cpu() - control}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {**super().expects(server, phase, client, message), "control": server.state["control"]}

    def terms(self, received: Received) -> Terms:
        return Terms(correction=received.extras["correction"], gradient_sum=received.extras["path"])

    def gradient(self, client: Client, phase: Phase, message: Message) -> Tensor:
        """Gradient of the client's mean loss over all its samples at the received model, fp32 [P]."""
        network = client.network()
        flat = with_vectors(network, message, client)
        if client.statistics_fixed(phase):
            freeze_bn_after(network)
        total = flat.gradients()
        for batch in client.in_order(min(client.task.outside, GRADIENT_BATCH)):
            share = float(batch.known / client.known)
            (share * batch.task.loss(network, batch)).backward()
        return total

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        samples = server.federation.samples
        uniform = self.options.weighting == "uniform"
        total = sum(samples)
        change, present = server.accumulator(server.state["control"].numel()), 0.0

        def add_control(upload: Upload) -> Upload:
            nonlocal present
            share = 1 / len(samples) if uniform else samples[upload.client_id] / total
            weight = share if upload.share is None else upload.share
            change.add(upload.message["control"], weight)
            present += weight
            return upload

        before = server.state["parameters"]
        # map keeps no upload while the next one arrives
        super().server_update(server, phase, map(add_control, uploads))
        if present:
            server.state["control"] = server.state["control"] + present * change.mean()
            if self.options.server_lr != 1:
                server.state["parameters"] = torch.lerp(before, server.state["parameters"], self.options.server_lr)
