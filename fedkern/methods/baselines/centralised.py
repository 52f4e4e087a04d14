"""Centralised training on the pooled data of all clients."""

from collections.abc import Iterable, Iterator

from torch import nn

from fedkern.methods.base import Method
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import ClientId, Federation, Message, Phase, Round, Upload
from fedkern.methods.roles import Client, Objective, Server
from fedkern.methods.uploads import Declaration


@register("centralised")
class Centralised(Objective, Method):
    """Not federated: one network, trained on the data of all clients together.

    Training is that of a single FedAvg client that holds all data: rounds of local epochs, with fresh momentum in every
    round.  The booked bytes are those of pooling the data: every client uploads its raw images (uint8), labels (int64)
    and texts once, before training.  Nothing travels after that.
    """

    pooled = True
    pools_statistics = True
    replayable = True
    requires = frozenset({"loss"})

    def start(self, server: Server) -> None:
        server.state.update(server.initial())

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for _ in range(federation.rounds):
            yield Round(participants="all", counted=False)

    def send(self, server: Server, phase: Phase) -> Message:
        return self.vectors(server)

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        return client.train(self, phase, message)

    def expects(self, server: Server, phase: Phase, client: ClientId, message: Message) -> Declaration:
        return {name: server.state[name] for name in server.trained_vectors if name in server.state}

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        for upload in uploads:
            server.state.update(upload.message)

    def model(self, server: Server) -> nn.Module:
        return server.network(self.vectors(server))
