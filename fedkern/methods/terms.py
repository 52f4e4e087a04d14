"""What a method adds to the gradient of every local step, in the form that the optimiser's kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class GradientSum:
    """The raw gradients along the way, added up.

    Attributes:
        total: fp32 [P], zeros at the start.
        steps: how many gradients that is.
    """

    total: Tensor
    steps: int = 0

    def mean(self) -> Tensor:
        return self.total / self.steps


@dataclass(frozen=True)
class Terms:
    """Terms of a method's local objective that act on parameters; see :func:`fedkern.ops.sgd_step`.

    Attributes:
        correction: fp32 [P], added to the gradient.
        anchor, proximal: ``proximal (parameters - anchor)`` is added to the gradient.
        gradient_sum: raw gradients are added to it.
    """

    correction: Tensor | None = None
    anchor: Tensor | None = None
    proximal: float = 0.0
    gradient_sum: GradientSum | None = None

    def add_to(self, gradients: Tensor, parameters: Tensor) -> None:
        """Changes ``gradients`` in place, as a step does on the way."""
        if self.gradient_sum is not None:
            self.gradient_sum.total.add_(gradients)
            self.gradient_sum.steps += 1
        if self.correction is not None:
            gradients.add_(self.correction)
        if self.proximal and self.anchor is not None:
            gradients.add_(parameters - self.anchor, alpha=self.proximal)

    def arguments(self) -> dict[str, Any]:
        """The terms as :func:`fedkern.ops.sgd_step` and :func:`fedkern.ops.adamw_step` take them.

        Whoever takes the steps counts them in ``gradient_sum.steps``.
        """
        total = None if self.gradient_sum is None else self.gradient_sum.total
        return {
            "correction": self.correction, "anchor": self.anchor, "proximal": self.proximal, "gradient_sum": total,
        }  # fmt: skip
