"""Local training without federation."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fedkern.methods.base import Method
from fedkern.methods.common.personal import Personal
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import ClientId, Federation, Message, Phase, Round, Upload
from fedkern.methods.roles import Client, Objective, Server, TestSet
from fedkern.methods.uploads import Declaration, like, make_once
from fedkern.models import Ensemble


@register("local")
class Local(Objective, Method):
    """Not federated: every client trains its own network alone.

    A client trains as in FedAvg, with the same initial network, rounds, local epochs and batches, but keeps its own
    network from round to round. With one client this equals FedAvg. All clients take part in every round, whatever
    ``--sample-fraction`` is.

    The figures are means over the clients' networks. ``lowest_accuracy`` and ``highest_accuracy`` are those of the
    worst and the best client. Nothing travels, so no bytes are booked. The server holds the networks only to evaluate
    and save them, as the members of an ensemble. ``--buffers local`` and ``drop`` are refused, because a client keeps
    its whole network.
    """

    requires = frozenset({"loss"})
    replayable = True

    @property
    def needs(self) -> str:
        return "features"

    @property
    def takes_buffers(self) -> bool:
        return False

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for _ in range(federation.rounds):
            yield Round(participants="all", counted=False)

    def send(self, server: Server, phase: Phase) -> Message | dict[ClientId, Message]:
        return {k: {"network": server.state.get(str(k))} for k in range(server.federation.clients)}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network = client.network()
        if message["network"] is not None:
            network.load_state_dict(message["network"])
        client.fit(self, phase, network)
        return {"network": network.state_dict()}

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {"network": make_once(server.round_cache, "network", lambda: like(server.build().state_dict()))}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        for upload in uploads:
            server.state[str(upload.client_id)] = upload.message["network"]

    def model(self, server: Server) -> Ensemble | Personal:
        members = [server.build() for _ in range(server.federation.clients)]
        for k, member in enumerate(members):
            if str(k) in server.state:  # a client that diverged in its first round keeps the initial network
                member.load_state_dict(server.state[str(k)])
        if hasattr(members[0], "head"):
            return Ensemble(members)
        return Personal(dict(enumerate(members))).requires_grad_(False)  # pairs have no joint prediction

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        """Return the task's figures of every client's own network on the whole test set, averaged over clients.

        ``lowest_accuracy`` and ``highest_accuracy`` (``lowest_i2t_r1`` and so on) are the figures of the worst and the
        best client.
        """
        members: Any = model
        judged: Any = data
        return data.task.member_figures(members, judged)

    def evaluate_own(self, model: nn.Module, data: TestSet, client: Client) -> dict[str, float]:
        assert isinstance(model, (Ensemble, Personal))
        return super().evaluate(model.members[client.id], data)
