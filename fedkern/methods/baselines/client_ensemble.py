"""Ensemble of the clients' networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkern import models
from fedkern.errors import UserError
from fedkern.methods.base import vectors_of
from fedkern.methods.common.figures import with_accuracies
from fedkern.methods.common.oneshot import MemberNetworks, exhaust
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import ClientId, Message, Phase, Upload
from fedkern.methods.roles import Client, Server, TestSet
from fedkern.models.cost import memory_ratio
from fedkern.typed_option import option


@register("ensemble")
class Ensemble(MemberNetworks):
    """Mean logits of all clients' networks, each trained once: the figure that one-shot methods aim at.

    Every client trains its whole local budget once and uploads its network.  The server keeps all networks.

    Figures beside the task's own, for classification:

    - ``vote_accuracy``: the class of the majority.  The mean probability breaks ties.
    - ``probability_accuracy``: the mean of the softmaxes.
    - ``memory_ratio``: the memory of all members over that of one network.

    All members count alike in vote and mean probability.

    With ``models`` the clients' networks differ: nothing travels down before training, and each client starts from
    weights of its own architecture.  ``class_weights=counts`` replaces the mean by FedIOD's ensemble (`MemberNetworks`,
    in fedkern/methods/common/oneshot.py), and is refused with ``weighting=samples`` and with ``calibrate``.

    With ``calibrate`` every client receives the networks of the others.  One classifier on the features of all members
    then replaces the mean of their logits.  ``pool=concat`` puts the features side by side, and the classifier starts
    as the one that gives the mean of the logits.  ``pool=mean`` averages the features, and the classifier starts as the
    mean of the heads.
    """

    requires = frozenset({"classes"})

    @dataclass(frozen=True)
    class Options(MemberNetworks.Options):
        """Options of the ensemble."""

        weighting: str = option(
            "uniform",
            "weight of a member in the mean: its number of samples, or equal weights",
            choices=("samples", "uniform"),
        )
        pool: str = option(
            "concat",
            "calibrated features: the members' features side by side, or their mean",
            choices=("concat", "mean"),
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.class_weights == "counts" and (self.weighting == "samples" or self.calibrate):
                raise UserError(
                    'Method option "class_weights" = counts weighs the mean of the logits, which "weighting" = samples '
                    'weighs too and "calibrate" replaces: leave one of them out.'
                )

    # -- training: nothing is averaged -----------------------------------------------------------------------------

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        answer = super().client_update(client, phase, message)
        if phase.exchange == "update" and self.options.calibrate:
            client.state["own"] = vectors_of(answer)
        return answer

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        if phase.exchange != "update":
            super().server_update(server, phase, uploads)
            return
        exhaust(self.collect_members(server, phase, uploads))
        ensemble = self.model(server)
        server.report["members"] = float(len(ensemble.members))
        server.report["memory_ratio"] = memory_ratio(ensemble, server.build())

    def model(self, server: Server) -> models.Ensemble:
        if "members" not in server.state:  # no client has trained yet
            return models.Ensemble([server.build()])
        ensemble = self.ensemble(server, self.options.pool)
        if "head" in server.state:
            ensemble.replace_head(**server.state["head"])
        return ensemble

    def member_weights(self, server: Server) -> Tensor | None:
        if self.options.weighting == "uniform":
            return super().member_weights(server)
        members = server.state["members"]
        return torch.tensor([float(members[k]["samples"]) for k in sorted(members)])

    # -- calibration: one classifier on the features of all members ------------------------------------------------

    def publish(self, server: Server) -> dict[ClientId, Message]:
        """Return the other clients' networks for every client, with ``left_out`` if its own was refused."""
        members = {k: vectors_of(member) for k, member in sorted(server.state["members"].items())}
        messages: dict[ClientId, Message] = {}
        for k in range(server.federation.clients):
            messages[k] = {"members": {j: member for j, member in members.items() if j != k}}
            if k not in members:
                messages[k]["left_out"] = True
        return messages

    def statistics_network(self, client: Client, message: Message) -> models.Ensemble:
        members = dict(message["members"])
        if "left_out" not in message:
            members[client.id] = client.state["own"]
        return models.Ensemble(self.build_members(client.network, members), pool=self.options.pool)

    def head(self, server: Server) -> nn.Linear:
        return self.model(server).joint_head()

    def replace_head(self, server: Server, head: nn.Linear) -> None:
        server.state["head"] = {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}

    # -- figures ---------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        if not isinstance(model, models.Ensemble) or data.task.network != "classes":
            return super().evaluate(model, data)

        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            features, logits = model.parts(images)
            votes = torch.stack([vote(logits), F.softmax(logits.double(), 2).mean(0).argmax(1)])
            return model.answer(features, logits), votes

        return with_accuracies(("vote_accuracy", "probability_accuracy"), answer, data)


def vote(logits: Tensor) -> Tensor:
    """Return the majority vote, int64 [B], of logits [M, B, C], ties broken by the mean probability."""
    p = F.softmax(logits.double(), 2)
    counts = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    return (counts + p.mean(0) / 2).argmax(1)
