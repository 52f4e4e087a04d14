"""SCAFFOLD: local steps corrected by control variates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkern.errors import UserError
from fedkern.methods.base import VECTORS
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.common.personal import with_vectors
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import ClientId, Message, Phase, Received, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.terms import GradientSum, Terms
from fedkern.methods.uploads import Declaration
from fedkern.models.state.freezing import freeze_bn_after
from fedkern.typed_option import option

GRADIENT_BATCH = 64
"""Most samples per backward pass at the received model."""


@register("scaffold")
class Scaffold(FedAvg):
    """FedAvg whose control variates correct client drift, for twice the bytes (arXiv 1910.06378).

    Client i keeps a control variate c_i.  The server keeps c and sends c with the model x:

        y_i <- y_i - eta (g_i(y_i) - c_i + c)
        c_i+ = gradient of the mean loss at x                 control=I, one more pass over the client's samples
        c_i+ = mean of the raw gradients g_i along the way    control=II
        x   <- x + --server-lr (mean_S y_i - x)
        c   <- c + sum_{i in S} p_i (c_i+ - c_i)

    The mean over S is FedAvg's.  p_i is n_i / n over all N clients, or 1/N with ``weighting=uniform`` as in the paper.
    So c is the sum of all p_i c_i in every round.

    Differences from the paper:

    - ``control=II`` takes the mean gradient, where the paper takes c_i - c + (x - y_i) / (K eta).  The two agree for
      plain SGD.  With momentum m the paper's quotient is too large by 1 / (1 - m).
    - Raw gradients hold neither the correction, nor clipping, nor weight decay.
    - ``control=I`` makes its pass in train mode, without augmentation, in batches of at most 64 images (16 for
      segmentation).  Every sample or known pixel counts alike.  Image-text pairs are refused, because their loss is
      that of a batch.

    A control variate travels with the model in both directions.  Batch norm's buffers travel once, as in FedAvg.

    Source: Karimireddy et al., ICML 2020, algorithm 1.
    """

    requires = frozenset({"loss"})
    asynchronous = False  # counts on whole rounds
    averages = True
    reduce = (*FedAvg.reduce, "control")
    stateless = False

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        control: str = option(
            "II", "new control variate: gradient at the received model (I), or mean gradient along the way (II)",
            choices=("I", "II"),
        )  # fmt: skip

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
        """Return the gradient of the client's mean loss over all its samples at the received model, fp32 [P]."""
        network = client.network()
        flat = with_vectors(network, message, client)
        if client.statistics_fixed(phase):
            freeze_bn_after(network)
        total = flat.gradients()
        for batch in client.in_order(min(client.task.outside, GRADIENT_BATCH)):
            (float(batch.known / client.known) * batch.task.loss(network, batch)).backward()
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

        # map keeps no upload while the next one arrives
        super().server_update(server, phase, map(add_control, uploads))
        if present:
            server.state["control"] = server.state["control"] + present * change.mean()
