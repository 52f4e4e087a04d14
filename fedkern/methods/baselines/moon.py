"""MOON: a model-contrastive loss on every client."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from fedkern.methods.base import LocalTraining
from fedkern.methods.common.frozen import cached_rows, frozen_copy
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, Message, Phase, Received
from fedkern.methods.roles import Client, Drawn
from fedkern.models.networks.staged import Classifier
from fedkern.process.device_copies import fetch
from fedkern.typed_option import option


@register("moon")
class Moon(LocalTraining):
    """Features pulled to the global model's and pushed from the client's last model's (MOON, arXiv 2103.16257).

        L = CE + mu mean_b log(1 + exp((sim(z, z_prev) - sim(z, z_glob)) / temperature))

    z, z_glob and z_prev are the pooled features of the training, the received and the client's previous network.  sim
    is the cosine similarity.  The term equals equation 3 of the paper.  Both frozen networks are in eval mode.

    Differences from the paper:

    - z are the pooled features, so that all methods train the same network.  The paper adds a projection head of two
      layers before the classifier.
    - A client without a previous network trains on the cross-entropy alone.  With the received network in its place the
      term would be the constant log 2.

    The previous network stays with the client, so a round costs the bytes of FedAvg.  Features of images that do not
    change are computed once per exchange, unless batch norm has no running statistics (``--buffers drop``).

    Source: Li, He and Song, CVPR 2021, equations 3 and 4.
    """

    requires = frozenset({"criterion", "classes", "features"})
    replayable = True
    asynchronous = True

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        mu: float = option(1.0, "weight of the model-contrastive loss", low=0)
        temperature: float = option(0.5, "temperature of the model-contrastive loss", above=0, infinite=True)

    @property
    def needs(self) -> str:
        return "features"

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        if not self.options.mu:
            return super().client_update(client, phase, message)
        extras = {"previous": client.state["previous"]} if "previous" in client.state else {}
        result = client.train(self, phase, message, extras=extras)
        client.state["previous"] = {name: fetch(result[name]) for name in ("parameters", "buffers") if name in result}
        return result

    def loss(self, model: Classifier, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if "previous" not in batch.drawn:
            return batch.task.criterion(model(batch.inputs), batch)
        z, z_glob, z_prev = model.features(batch.inputs), batch.drawn["global"], batch.drawn["previous"]
        towards, away = cosine_similarity(z, z_glob), cosine_similarity(z, z_prev)
        contrast = softplus((away - towards) / self.options.temperature).mean()  # -log of the quotient above
        em = batch.task.criterion(model.head(z), batch)
        return em + self.options.mu * contrast, {"loss_em": em.detach(), "loss_con": contrast.detach()}

    def prepare(self, model: Classifier, batch: Batch, received: Received) -> Drawn:
        """Return the features of the batch by the global model and by the client's last local model."""
        if not self.options.mu or "previous" not in received.extras:
            return {}
        glob = cached_rows("global", batch, received, lambda: received.model.features(batch.inputs))
        prev = cached_rows("previous", batch, received, lambda: self._previous(received).features(batch.inputs))
        return {"global": glob, "previous": prev}

    def _previous(self, received: Received) -> Classifier:
        if "network" not in received.round_cache:
            received.round_cache["network"] = frozen_copy(received.model, received.extras["previous"])
        network: Classifier = received.round_cache["network"]
        return network
