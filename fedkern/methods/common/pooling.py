"""Batch norm's statistics of the averaged network, pooled over the clients' samples (``--buffers pool``).

The average of the clients' running statistics matches no data: they belong to the clients' own networks, and lack the
variance between clients. So clients return sums of the inputs, and of their squares, at the first batch norm of both
heads (exchange ``statistics``), then at the second one, whose inputs depend on the first (``normalised``).

The result is exactly the mean and variance of the mixture of the clients' samples, with the weights of the average. It
costs a download of the network before an evaluation, unless clients evaluate the network anyway
(`Method.statistics_at`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.common.oneshot import flatten, load
from fedkern.methods.protocol import ClientId, Message, Phase, Round, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.uploads import Declaration, Number, Values, make_once
from fedkern.models.state.freezing import constant_buffers
from fedkern.models.towers import PairNetwork

EXCHANGES = ("statistics", "normalised")
HEADS = ("image_head", "text_head")
SAMPLES = 256
"""Most samples of a client in its sums; a new random subset in every round."""
CHUNK = 128


class Pooling:
    """Pooling exchanges for the network that ``method`` evaluates, if ``on``."""

    def __init__(self, method: Method, on: bool = True) -> None:
        self.method, self.on = method, on and method.pools_statistics

    def check(self, network: nn.Module) -> None:
        """Raise UserError for batch norms outside the heads of a pair, or only frozen ones."""
        norms = {name for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
        if self.on and norms and norms <= {name.rpartition(".")[0] for name in constant_buffers(network)}:
            raise UserError(
                "--buffers pool computes the statistics of batch norms, all of which --freeze leaves as they are: use "
                "--buffers average."
            )
        for name, layer in network.named_modules():
            if self.on and isinstance(layer, _BatchNorm) and name.partition(".")[0] not in HEADS:
                raise UserError(
                    f"--buffers pool is for encoders without batch norm, and this pair has one at {name}: use "
                    "--buffers average."
                )

    def exchanges(self, entry: Round, evaluated: bool) -> list[tuple[str, str]]:
        """Return the exchanges of a round, each with its owner, ``"method"`` or ``"pooling"``."""
        exchanges = [(name, "method") for name in entry.exchanges]
        if not self.on or entry.one_off:
            return exchanges
        at = self.method.statistics_at(entry)
        if at is None and not evaluated:
            return exchanges
        at = len(exchanges) if at is None else at
        return [*exchanges[:at], *((name, "pooling") for name in EXCHANGES), *exchanges[at:]]

    def send(self, server: Server, phase: Phase) -> Message:
        """Return the network in the first exchange, the statistics in the second."""
        if phase.exchange == EXCHANGES[0]:
            server.round_cache["asked"] = True
            return self.method.vectors(server)
        return {"buffers": server.state["buffers"]}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        """Return ``samples``, and fp64 [2, features] by batch norm: sums of its inputs and of their squares."""
        if phase.exchange == EXCHANGES[0]:
            client.round_cache["asked"] = message
            client.round_cache["heads"] = self._heads(client, client.frozen(message), phase)
        network = client.frozen({**client.round_cache["asked"], **message})
        answer: Message = {}
        with torch.no_grad():
            for head, x in client.round_cache["heads"].items():
                layers = getattr(network, head)
                name = _batch_norms(layers)[EXCHANGES.index(phase.exchange)]
                reached = layers[: int(name)](x).double()
                answer[f"{head}.{name}"] = torch.stack([reached.sum(0), reached.square().sum(0)]).cpu()
                answer["samples"] = len(x)
        return answer

    def _heads(self, client: Client, network: PairNetwork, phase: Phase) -> dict[str, Tensor]:
        """Return both heads' inputs, fp32 [n, d], of the round's samples."""
        rows = self.method.statistics_rows(client)
        if len(rows) > SAMPLES:
            rows = np.sort(client.rng("statistics", phase).choice(rows, SAMPLES, replace=False))
        images, texts = [], []
        with torch.no_grad():
            for start in range(0, len(rows), CHUNK):
                batch = client.batch(rows[start : start + CHUNK])
                images.append(network.image_token(batch.inputs))
                texts.append(network.text_token(batch.targets))
        client.round_cache["rows"] = torch.from_numpy(rows)
        return {"image_head": torch.cat(images), "text_head": torch.cat(texts)}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        def declare() -> Declaration:
            network: Any = server.build()
            due: dict[str, Any] = {"samples": Number(low=1, integer=True)}
            for head in HEADS:
                layers = getattr(network, head)
                name = _batch_norms(layers)[EXCHANGES.index(phase.exchange)]
                due[f"{head}.{name}"] = Values((2, layers.get_submodule(name).num_features), torch.float64)
            return due

        return make_once(server.round_cache, phase.exchange, declare)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        """Write the mixture's mean and variance into ``server.state["buffers"]``."""
        total = 0.0
        pooled: dict[str, Tensor] = {}
        for upload in uploads:
            count = upload.message["samples"]
            weight = self.method.weight(server, upload)
            total += weight
            for name, sums in upload.message.items():
                if name != "samples":
                    pooled.setdefault(name, torch.zeros_like(sums)).add_(sums, alpha=weight / count)
        if not total:
            return
        flat = flatten(server.build())
        network = load(flat, server.state)
        for name, sums in pooled.items():
            layer: Any = network.get_submodule(name)
            mean, square = sums / total
            layer.running_mean.copy_(mean)
            layer.running_var.copy_((square - mean.square()).clamp_min(0))
        server.state["buffers"] = flat.buffers.detach().cpu().clone()


def _batch_norms(head: nn.Sequential) -> list[str]:
    return [name for name, layer in head.named_children() if isinstance(layer, _BatchNorm)]
