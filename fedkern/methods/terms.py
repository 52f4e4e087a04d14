"""Terms that a method adds to the gradient of every local step, in the form of the optimiser kernels."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class GradientSum:
    """Running sum of the raw gradients of the local steps.

    Attributes:
        total: fp32 [P], zeros at the start.
        steps: number of gradients in ``total``.
    """

    total: Tensor
    steps: int = 0

    def mean(self) -> Tensor:
        """Return the mean gradient, fp32 [P]."""
        return self.total / self.steps


@dataclass(frozen=True)
class Terms:
    """Terms of a method's local objective that act on parameters.

    A step of SGD with the gradient g (:func:`fedkern.ops.sgd_step`) does, in this order:

        gradient_sum += g
        g += correction
        g += proximal (parameters - anchor)
        g *= min(1, clip_norm / |g|)                 with ``--clip-norm``
        g += weight_decay parameters                 AdamW decouples the decay
        v  = momentum v + g
        parameters -= lr v

    The recorded loss is the batch's, without these terms.

    Attributes:
        correction: fp32 [P], added to the gradient.
        anchor, proximal: ``proximal (parameters - anchor)`` is added to the gradient.
        gradient_sum: every raw gradient, before the other terms, is added to this sum.
    """

    correction: Tensor | None = None
    anchor: Tensor | None = None
    proximal: float = 0.0
    gradient_sum: GradientSum | None = None

    def add_to(self, gradients: Tensor, parameters: Tensor) -> None:
        """Add the terms to ``gradients`` in place, as the fused optimiser step does."""
        if self.gradient_sum is not None:
            self.gradient_sum.total.add_(gradients)
            self.gradient_sum.steps += 1
        if self.correction is not None:
            gradients.add_(self.correction)
        if self.proximal and self.anchor is not None:
            gradients.add_(parameters - self.anchor, alpha=self.proximal)

    def arguments(self) -> dict[str, Any]:
        """Return the terms as arguments of :func:`fedkern.ops.sgd_step` and :func:`fedkern.ops.adamw_step`.

        The kernels do not count steps: the caller increments ``gradient_sum.steps``.
        """
        total = None if self.gradient_sum is None else self.gradient_sum.total
        return {
            "correction": self.correction, "anchor": self.anchor, "proximal": self.proximal, "gradient_sum": total,
        }  # fmt: skip
