"""Co-Boosting (Dai et al., 2024, arXiv 2402.15070): synthetic images and ensemble weights improve each other.

Co-Boosting alternates like DENSE, with three changes:

- Hard samples: the generator's cross-entropy weighs an image by (1 - p_y)^s.  The divergence from the student counts on
  all images (temperature 3 in the released code).
- Output diversified sampling: before the student sees an image, the image moves by eta in the direction in which a
  random combination of the ensemble's outputs grows fastest.  So the members' logits are computed anew every time.
- Learned member weights: w <- w - mu decay^epoch sign(dCE(sum_k w_k t_k, y) / dw) on every batch of the pool, within
  [0, 1].  The released code does not normalise the weights, which also changes the scale of the logits; here their sum
  stays 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedkern.methods.base import Server, Step, option, register
from fedkern.methods.baselines.dense import DENSE
from fedkern.methods.common.oneshot_distill import Pool
from fedkern.methods.common.oneshot_synthesis import Synthesis
from fedkern.models.ensemble import Ensemble
from fedkern.transfer import send

ADVERSARIAL_TEMPERATURE = 3.0
DIVERSITY_TEMPERATURE = 4.0


@register("coboosting")
class CoBoosting(DENSE):
    """DENSE with hard samples and learned ensemble weights (Co-Boosting, arXiv 2402.15070)."""

    @dataclass(frozen=True)
    class Options(DENSE.Options):
        """Options of Co-Boosting; defaults of the released code: 200 epochs, SGD 0.01 with cosine, batch 128, T 4."""

        distill_lr: float = option(0.01, "learning rate of the student's SGD (cosine to 0)", above=0)
        distill_decay: float = option(1e-4, "weight decay of the student's SGD", low=0)
        temperature: float = option(4.0, "temperature of the distillation", above=0, infinite=True)
        distill_batch: int = option(128, "images per step of the distillation", low=2)
        bn_weight: float = option(0.0, "weight of the distance to the members' batch norm statistics", low=0)
        hardness: float = option(1.0, "exponent of (1 - p_y) in the weight of an image's cross-entropy", low=0)
        perturbation: float = option(
            8.0,
            "size of the perturbation of the student's images, in 255ths of the full range",
            low=0,
        )
        weight_step: float = option(0.01, "step size of the members' weights; 0 keeps them equal", low=0, high=1)
        weight_step_decay: float = option(0.99, "factor on weight_step after every epoch", above=0, high=1)

    _scale: Tensor  # [1, C, 1, 1]: distance of black and white in normalised images

    def how(self) -> Synthesis:
        o = self.options
        return self.synthesis(
            adversarial=o.adv_weight, boundary=False, temperature=ADVERSARIAL_TEMPERATURE, hardness=o.hardness,
            restart=o.restart,
        )  # fmt: skip

    def optimiser(self, student: nn.Module) -> tuple[Optimizer, LRScheduler]:
        o = self.options
        made = torch.optim.SGD(student.parameters(), o.distill_lr, o.distill_momentum, weight_decay=o.distill_decay)
        return made, torch.optim.lr_scheduler.CosineAnnealingLR(made, o.distill_epochs)

    def reweigh(self, teachers: Ensemble, pool: Pool, epoch: int, draw: torch.Generator) -> None:
        o = self.options
        if o.weight_step == 0:
            return
        w = teachers.weights.clone()
        for index in pool.batches(o.distill_batch, draw):
            said, labels = pool.answers(index)
            w = move_weights(w, said, labels, o.weight_step * o.weight_step_decay**epoch)
        teachers.weights.copy_(w)

    def example(self, teachers: Ensemble, pool: Pool, index: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        images, said = pool.take(index)
        if self.options.perturbation == 0:
            return images, said
        coefficients = send(torch.rand(len(images), said.shape[2], generator=draw).mul_(2).sub_(1), images.device)
        x = images.requires_grad_()
        outputs = softmax(teachers.mix(teachers.logits(x)) / DIVERSITY_TEMPERATURE, 1)
        (gradient,) = torch.autograd.grad((coefficients * outputs).sum(), x)
        with torch.no_grad():
            moved = images.detach() + gradient.sign() * (self.options.perturbation / 255 * self._scale)
            return moved, teachers.logits(moved)

    def distil(self, server: Server, step: Step, teachers: Ensemble, student: nn.Module) -> None:
        self._scale = 1 / torch.tensor(server.std, device=server.device).view(1, -1, 1, 1)
        super().distil(server, step, teachers, student)
        for client, weight in zip(self.members(server).clients(), teachers.weights.tolist(), strict=True):
            server.report[f"weight_{client}"] = weight


def move_weights(weights: Tensor, said: Tensor, labels: Tensor, step: float) -> Tensor:
    """One signed gradient step of the members' weights on the cross-entropy of their mixed logits.

    Args:
        weights: [K], of sum 1.
        said: the members' logits [K, B, C].
        labels: int64 [B].
        step: change of every weight before normalisation.

    Returns:
        [K], at least 0, of sum 1; ``weights`` unchanged if every weight would be 0.
    """
    with torch.enable_grad():
        w = weights.detach().requires_grad_()
        # Normalised, so that the scale of the logits alone does not move all weights in one direction.
        loss = cross_entropy(torch.einsum("k,kbc->bc", w / w.sum(), said), labels)
        (gradient,) = torch.autograd.grad(loss, w)
    moved = (weights - step * gradient.sign()).clamp(0, 1)
    total = moved.sum()
    return torch.where(total > 0, moved / total.clamp_min(1e-12), weights)
