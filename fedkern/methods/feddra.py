"""FedDRA (arXiv 2404.03854, TMLR): federated vision-language pre-training with distributionally robust client weights.

A round has three exchanges (docs/methods/feddra.md, sections 4 and 5):

- ``alignment``: clients train the alignment layers and heads, with frozen encoders, and upload them if anchors or
  ``joint_start=average`` need their average.
- ``joint``: clients train everything. The anchor model has the round's first encoders and the averaged alignment
  modules.
- ``losses``: clients report the new model's contrastive loss, for the next round's weights
  (`fedkern.methods.common.dro`), and keep the model.

With ``--buffers average``, as published, the client weights follow losses that mostly reflect wrong statistics of batch
norm. ``--buffers pool`` estimates these before ``losses`` (`fedkern.methods.common.pooling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fedkern import ops
from fedkern.errors import UserError
from fedkern.methods.base import VECTORS
from fedkern.methods.common.dro import LOSSES, Robust, vectors_of
from fedkern.methods.common.frozen import cached_rows
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, ClientId, Federation, Message, Phase, Received, Round, Upload
from fedkern.methods.roles import Client, Server
from fedkern.methods.uploads import Declaration, make_once
from fedkern.models.state import freezing
from fedkern.models.towers import PARTS, PairNetwork, unit_rows
from fedkern.tasks.retrieval import TEMPERATURE
from fedkern.typed_option import option

ALIGNMENT = PARTS[2:]
"""Submodules that the first stage trains; they come last, so their vectors are the ends of the network's vectors."""


@register("feddra")
class FedDRA(Robust):
    """Image and text encoders trained in two stages, with anchors and robust client weights (arXiv 2404.03854)."""

    requires = frozenset({"loss", "pairs", "images"})
    averages = True
    replayable = False

    @dataclass(frozen=True)
    class Options(Robust.Options):
        """Options of FedDRA.

        Learning rate, batch size and the steps of the second stage are settings of the run.
        """

        rho: float = option(
            1.0, "radius of the set of client weights: 0 is its centre, (N - 1) / 2 the simplex", low=0, infinite=True
        )
        mu: float = option(1.0, "weight of the alignment to the anchors", low=0)
        lambda1: float = option(1.0, "weight of the contrastive loss", low=0)
        dro: bool = option(True, "weigh clients by their losses; off leaves the weights at their centre")
        anchors: bool = option(True, "align embeddings with those of the frozen global model")
        stages: str = option(
            "two", "alignment modules first and then everything, or everything at once", choices=("two", "one")
        )
        stage_schedule: str = option(
            "per_round", "both stages in every round, or a quarter of the rounds for the first and then the second",
            choices=("per_round", "sequential"),
        )  # fmt: skip
        joint_start: str = option(
            "own", "where stage two starts: from the client's own stage-one result, or the clients' average",
            choices=("own", "average"),
        )  # fmt: skip
        alignment_steps: int = option(20, "optimiser steps of the first stage", low=1)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.joint_start == "average" and (self.stages, self.stage_schedule) != ("two", "per_round"):
                raise UserError(
                    'Method option "joint_start" = average is for both stages in every round: give stages=two and '
                    "stage_schedule=per_round too."
                )
            if self.loss_samples and not self.dro:
                raise UserError('Method option "loss_samples" has no effect with dro=off: leave one out.')

    @property
    def radius(self) -> float:
        return float(self.options.rho)

    @property
    def paired(self) -> bool:
        """True if a round has both stages."""
        return bool(self.options.stages == "two" and self.options.stage_schedule == "per_round")

    @property
    def allows_server_rule(self) -> bool:
        return bool(self.options.stages == "one")  # the first of two stages averages a part of the network

    @property
    def takes_personal(self) -> bool:
        return False  # the stages are parts of the vectors

    @property
    def averaged(self) -> bool:
        """True unless the second stage overwrites the first stage's average unread."""
        return bool(not self.paired or self.options.anchors or self.options.joint_start == "average")

    def rounds(self, federation: Federation) -> Iterator[Round]:
        o, count = self.options, federation.rounds
        losses = (LOSSES,) if o.dro else ()
        first_rounds = min(max(1, count // 4), count - 1) if o.stages == "two" and not self.paired else 0
        for _ in range(first_rounds):
            yield Round("alignment", ("alignment", *losses), trains="alignment modules")
        stages = ("alignment", "joint") if self.paired else ("joint",)
        for _ in range(count - first_rounds):
            name, trains = ("joint", "whole networks") if first_rounds else ("train", "")
            yield Round(name, (*stages, *losses), trains=trains)

    def statistics_at(self, entry: Round) -> int | None:
        at = super().statistics_at(entry)
        return len(entry.exchanges) if at is None and self.options.anchors else at

    # -- the server ------------------------------------------------------------------------------------------------

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        if self.paired and phase.exchange == "joint":
            sizes = server.state["part"] if self.averaged else {}
            part = {name: server.state[name][-size:] for name, size in sizes.items()}
            return {k: {**part, **share} for k, share in self.shares(server).items()}
        return super().send(server, phase)

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        if phase.exchange != "alignment":
            return super().expects(server, phase, client, message)
        if not self.averaged:
            return {}
        declaration = super().expects(server, phase, client, message)
        sizes = make_once(server.round_cache, "alignment", lambda: part_sizes(server.build()))
        return {name: vector[-sizes[name] :] for name, vector in declaration.items() if sizes[name]}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange == LOSSES:
            super().server_update(server, phase, uploads)
            return
        mean = self.average(server, uploads)
        if phase.exchange == "alignment" and mean:
            server.state["part"] = {name: vector.numel() for name, vector in mean.items()}
            mean = splice_ends(server.state, mean)
        server.state.update(mean)

    # -- a client --------------------------------------------------------------------------------------------------

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if phase.exchange == LOSSES:
            answer = super().client_update(client, phase, message)
            # What the exchange of statistics computed with the model that the client keeps, for the next anchors.
            used = self.options.anchors and not self.paired and client.device.type == "cpu"
            kept = used and "heads" in client.round_cache
            client.state["heads"] = {"rows": client.round_cache["rows"], **client.round_cache["heads"]} if kept else {}
            return answer
        client.report["weight"] = message["weight"]
        rows = self.rows(client)[0]
        if phase.exchange == "alignment":
            client.round_cache["model"] = model = self.held(client, message)
            steps = self.options.alignment_steps
            result = client.train(self, phase, {**message, **model}, parts=ALIGNMENT, steps=steps, rows=rows)
            client.round_cache["alignment"] = result
            return result if self.averaged else {}
        extras: Mapping[str, Tensor] = {}
        if self.paired:
            model, part = client.round_cache.get("model") or client.state["model"], vectors_of(message)
            alignment = client.round_cache.get("alignment", part) if self.options.joint_start == "own" else part
            start, anchor = splice_ends(model, alignment), splice_ends(model, part)
        else:
            model = start = anchor = self.held(client, message)
            extras = client.state["heads"] if model is client.state.get("model") else {}
        result = client.train(self, phase, {**message, **start}, rows=rows, anchor=anchor, extras=extras)
        client.report["drift"] = float(torch.linalg.vector_norm(result["parameters"] - model["parameters"]))
        return result

    def loss(self, model: PairNetwork, batch: Batch, received: Received) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        frozen = batch.phase.exchange == "alignment"
        with torch.set_grad_enabled(not frozen):
            image, text = model.encode_image(batch.inputs), model.encode_text(batch.targets)
        mask = batch.targets.mask
        x, y = model.project_image(image), model.project_text(text, mask)
        contrastive = ops.contrastive(x, y, TEMPERATURE)
        loss, seen = o.lambda1 * contrastive, {"contrastive": contrastive.detach()}
        if o.anchors:

            def anchor(side: str) -> Tensor:
                # In the first stage the local encoders equal the global ones, so both branches share their outputs.
                glob: PairNetwork = received.model
                if frozen:
                    return glob.project_image(image) if side == "image" else glob.project_text(text, mask)
                return unit_rows(getattr(glob, f"{side}_head")(head_inputs(side, glob, batch, received.extras)))

            distance = mse_loss(x, cached_rows("image", batch, received, lambda: anchor("image"))) + mse_loss(
                y, cached_rows("text", batch, received, lambda: anchor("text"))
            )
            loss, seen["anchor"] = loss + o.mu * distance, distance.detach()
        return self.scaled(loss, received), seen

    def judge(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = model(batch.inputs, batch.targets)
        return float(self.options.lambda1) * ops.contrastive(x, y, TEMPERATURE)


def head_inputs(side: str, network: PairNetwork, batch: Batch, known: Mapping[str, Tensor]) -> Tensor:
    """Return the inputs fp32 ``[B, d]`` of the ``"image"`` or ``"text"`` head, computed for unknown rows alone."""
    compute = network.image_token if side == "image" else network.text_token
    samples = batch.inputs if side == "image" else batch.targets
    if batch.fresh or not known:
        return compute(samples)
    rows, indices = known["rows"], torch.from_numpy(batch.indices)
    at = torch.searchsorted(rows, indices).clamp(max=len(rows) - 1)
    unknown = (rows[at] != indices).nonzero().flatten()
    inputs = known[f"{side}_head"][at]
    if len(unknown):
        inputs[unknown] = compute(samples[unknown] if side == "image" else samples.take(unknown))
    return inputs


def part_sizes(network: nn.Module) -> dict[str, int]:
    """Return the sizes of the first stage's submodules (`ALIGNMENT`), by vector."""
    sizes = {}
    for vector, places in freezing.flatten(network).places().items():
        slices = [place for name, place in places.items() if name.partition(".")[0] in ALIGNMENT]
        sizes[vector] = slices[-1].stop - slices[0].start if slices else 0
    return sizes


def splice_ends(model: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> Message:
    """Return a network's vectors with their ends replaced by ``part``."""
    return {
        name: torch.cat([model[name][: -len(part[name])], part[name]]) if name in part else model[name]
        for name in VECTORS
        if name in model
    }
