"""FML, federated mutual learning: private models and a shared proxy teach each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from fedkern import ops
from fedkern.errors import UserError
from fedkern.methods.base import LocalTraining
from fedkern.methods.common.oneshot import copy_vectors
from fedkern.methods.common.personal import keep_network, own_network
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, Message, Phase, Received
from fedkern.methods.roles import Client, Server
from fedkern.models.state import freezing
from fedkern.typed_option import option


class Pair(nn.Module):
    def __init__(self, private: nn.Module, proxy: nn.Module) -> None:
        super().__init__()
        self.private, self.proxy = private, proxy


@register("fml")
class FML(LocalTraining):
    """Private models and a shared proxy that teach each other (federated mutual learning, arXiv 2006.16765).

    A client's private network h never leaves the client.  h and the proxy z train on the same batches:

        L_h = alpha CE(h, y) + (1 - alpha) T^2 KL(softmax(z/T) || softmax(h/T))
        L_z = beta  CE(z, y) + (1 - beta)  T^2 KL(softmax(h/T) || softmax(z/T))

    T is ``temperature``, 1 in the paper.  Each divergence takes the other network's logits for constants.  The client
    minimises L_h + L_z.  Only the proxy travels, for the bytes of FedAvg, and the server evaluates the proxy.

    h starts from weights of the client's own: equal networks on equal batches have nothing to teach each other.  The
    client keeps h and its running statistics between rounds.  ``--clip-norm`` bounds one gradient over both networks.
    With ``--buffers local`` or ``drop`` the proxy has fresh running statistics in every round.

    On ``digits`` the defaults are ``--partition classes:2``, 40 rounds of one local epoch, and no momentum.

    Source: Shen et al., 2020, equations 3 and 4.
    """

    requires = frozenset({"criterion", "classes"})
    replayable = True

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        alpha: float = option(0.5, "weight of the labels in the private model's loss", low=0, high=1)
        beta: float = option(0.5, "weight of the labels in the proxy's loss", low=0, high=1)
        temperature: float = option(1.0, "temperature of both distillation losses", above=0, infinite=True)
        private: str = option("", "the private model, MODEL or MODEL/WIDTH; empty for the proxy's own architecture")

    @property
    def takes_personal(self) -> bool:
        return False  # the private model is all that a client keeps to itself

    def loss(self, model: Pair, batch: Batch, received: Received) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.options
        h, z = model.private(batch.inputs), model.proxy(batch.inputs)
        private_loss, shared_loss = batch.task.criterion(h, batch), batch.task.criterion(z, batch)
        temperature = float(o.temperature)
        loss_h = o.alpha * private_loss + (1 - o.alpha) * ops.kl_div(h, z.detach(), temperature)
        loss_z = o.beta * shared_loss + (1 - o.beta) * ops.kl_div(z, h.detach(), temperature)
        return loss_h + loss_z, {"loss_private": loss_h.detach(), "loss_proxy": loss_z.detach()}

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        pair = Pair(self._private(client), client.network())
        proxy = freezing.flatten(pair.proxy)
        # Running statistics that do not travel (--buffers) keep initial values: train mode does not read them.
        proxy.load_vectors(message)
        client.fit(self, phase, pair)
        keep_network(client, "private", pair.private)
        proxy.flatten()  # the training loop has moved the parameters
        return {name: vector for name, vector in copy_vectors(proxy).items() if name in message}

    def start(self, server: Server) -> None:
        super().start(server)
        self._build_private(server.build)  # raises on an unknown private model before the run starts

    def _private(self, client: Client) -> nn.Module:
        # Its own initial weights: equal networks that train on the same batches could not teach each other.
        return own_network(client, "private", self._build_private(partial(client.network, stream="private")))

    def _build_private(self, build: Callable[..., nn.Module]) -> nn.Module:
        name, _, width = self.options.private.partition("/")
        if width and not width.isdigit():
            raise UserError(f'Method option "private" must be MODEL or MODEL/WIDTH, not "{self.options.private}".')
        return build(model=name or None, width=int(width) if width else None)
