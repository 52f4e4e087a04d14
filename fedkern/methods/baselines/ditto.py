"""Ditto: personal networks regularised towards the global one."""

from dataclasses import dataclass, replace

from fedkern.methods.base import vectors_of
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Message, Phase, Received
from fedkern.methods.roles import Client
from fedkern.methods.terms import Terms
from fedkern.process.device_copies import fetch
from fedkern.typed_option import option


@register("ditto")
class Ditto(FedAvg):
    """A personal network beside FedAvg at every client, pulled to the global one (Ditto, arXiv 2012.04221).

    Beside FedAvg's own training, client k trains a network v_k, with the received network theta:

        v_k <- v_k - lr (grad L_k(v_k) + lambda (v_k - theta))

    The global network and all messages are FedAvg's, bit for bit.  ``model.safetensors``, ``predict`` and ``export``
    take the global network.  All figures are means over the clients' own networks, and
    ``fedkern.load(DIR).model(client=3)`` returns one of them.

    v_k begins as the first theta that client k receives.  A client that has not taken part is evaluated by theta.  Both
    trainings take the run's local epochs and optimiser, each with its own order of batches and its own momentum.
    ``loss`` in the records is FedAvg's, ``loss_own`` that of v_k.  ``--buffers local`` and ``drop`` are refused,
    because v_k has running statistics of its own.

    Source: Li et al., ICML 2021, algorithm 1.
    """

    requires = frozenset({"loss"})
    stateless = False

    @dataclass(frozen=True)
    class Options(FedAvg.Options):
        lam: float = option(1.0, "weight of the personal networks' proximal term", low=0, name="lambda")

    @property
    def takes_buffers(self) -> bool:
        return False  # the personal networks have their own running statistics

    @property
    def takes_personal(self) -> bool:
        return False

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        received = message["parameters"].to(client.device)
        vectors = self.own_vectors(client, vectors_of(message))
        trained = client.train(self, replace(phase, exchange="own"), vectors, extras={"global": received})
        client.state["own"] = {name: fetch(value) for name, value in trained.items()}
        client.report["loss_own"] = client.report.pop("loss")
        return super().client_update(client, phase, message)

    def terms(self, received: Received) -> Terms | None:
        if not self.options.lam or "global" not in received.extras:
            return None
        return Terms(anchor=received.extras["global"], proximal=self.options.lam)

    def own_vectors(self, client: Client, message: Message) -> Message:
        return {**message, **client.state.get("own", {})}  # pooled statistics are the global network's
