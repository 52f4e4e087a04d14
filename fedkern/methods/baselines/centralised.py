"""Centralised training on the pooled data of all clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedkern.methods.base import LocalTraining, Method
from fedkern.methods.protocol import Federation, Phase, Round, Upload
from fedkern.methods.registry import register
from fedkern.methods.roles import Server


@register("centralised")
class Centralised(LocalTraining):
    """Not federated: one network, trained on the data of all clients together.

    Training is that of a single FedAvg client that holds all data: rounds of local epochs, with fresh momentum in every
    round.  The booked bytes are those of pooling the data: every client uploads its raw images (uint8), labels (int64)
    and texts once, before training.  Nothing travels after that.
    """

    pooled = True
    averages = False
    reduce = ()
    replayable = True
    requires = frozenset({"loss"})

    @dataclass(frozen=True)
    class Options(Method.Options):
        """No options: there is nothing to weigh."""

    def rounds(self, federation: Federation) -> Iterator[Round]:
        for _ in range(federation.rounds):
            yield Round(participants="all", counted=False)

    def server_update(self, server: Server, phase: Phase, uploads: Iterable[Upload]) -> None:
        for upload in uploads:
            server.state.update(upload.message)
