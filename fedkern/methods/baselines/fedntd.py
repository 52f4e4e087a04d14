"""FedNTD: not-true distillation from the received model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.methods.base import LocalTraining
from fedkern.methods.common.frozen import cached_rows
from fedkern.methods.method_registry import register
from fedkern.methods.protocol import Batch, Received
from fedkern.methods.roles import Drawn
from fedkern.typed_option import option


@register("fedntd")
class FedNTD(LocalTraining):
    """Distillation of the global model's view of the classes that a sample does not have (arXiv 2106.03097).

        L = CE + beta temperature^2 KL(q_global || q_local)
        q(c) = exp(z_c / temperature) / sum_{c' != y} exp(z_c' / temperature)    for c != y

    The received network is the teacher, in eval mode.  The term keeps local training from forgetting classes that a
    client lacks, and leaves the sample's own class to the labels.  With a single class the loss is the cross-entropy.
    temperature^2 keeps the gradient's size for temperatures other than 1.  A round costs the bytes of FedAvg.

    Source: Lee et al., NeurIPS 2022, equations 3 to 5.
    """

    requires = frozenset({"criterion", "classes"})
    stateless = True
    asynchronous = True
    replayable = True

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        beta: float = option(1.0, "weight of the not-true distillation", low=0)
        temperature: float = option(1.0, "temperature of the not-true distillation", above=0, infinite=True)

    def loss(self, model: nn.Module, batch: Batch, received: Received) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch.inputs)
        em = batch.task.criterion(logits, batch)
        if not self.options.beta or logits.shape[1] == 1:  # a single class has no not-true class
            return em
        teacher = batch.drawn["teacher"]
        ntd = ops.kl_div(
            not_true(logits, batch.targets), not_true(teacher, batch.targets), float(self.options.temperature)
        )
        return em + self.options.beta * ntd, {"loss_em": em.detach(), "loss_ntd": ntd.detach()}

    def prepare(self, model: nn.Module, batch: Batch, received: Received) -> Drawn:
        """Return the received model's logits of the batch."""
        if not self.options.beta:
            return {}
        return {"teacher": cached_rows("logits", batch, received, lambda: received.model(batch.inputs))}


def not_true(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits [B, C] with every sample's own class masked: probability 0, no gradient."""
    mask = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return logits.masked_fill(mask, -math.inf)
