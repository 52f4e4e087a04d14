"""Interface of contrastive's kernels; :func:`fedkern.ops._core.backend.select` returns an instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Gradients(NamedTuple):
    """Gradients with respect to x, y and the temperature, for a grad_output of 1, in the computing dtype.

    None where a gradient is not needed.
    """

    x: Tensor | None
    y: Tensor | None
    temperature: Tensor | None


class ContrastKernel(Protocol):
    """A backend's implementation of contrastive.

    ``x`` and ``y`` are ``[B, D]`` with any strides, ``temperature`` is a float or a 0-d tensor; the public function has
    checked them.  Sums are taken in float32 (float64 where an input is float64) and rounded once.  On CUDA no method
    reads a tensor's value, because that would synchronise.
    """

    def loss(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
        """The loss, in the promoted dtype of x and y."""

    def loss_and_gradients(
        self, x: Tensor, y: Tensor, temperature: float | Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, Gradients]:
        """The loss, and the gradients that ``needs`` (x, y, temperature) asks for."""

    def loss_and_sums(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the softmax statistics ``[4, B]``: maxima and sums of the rows, then of the columns.

        A softmax is ``exp((x yᵀ - maximum) / temperature) / sum``.  The statistics have the computing dtype.
        """

    def gradients(
        self, x: Tensor, y: Tensor, temperature: float | Tensor, sums: Tensor, needs: Sequence[bool]
    ) -> Gradients:
        """The gradients, from the statistics ``sums`` of :meth:`loss_and_sums`."""

    def scaled(
        self, gradients: Sequence[Tensor | None], grad: Tensor, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """``gradients`` times ``grad``, one for each of ``inputs`` and in its dtype; ``gradients`` stay unchanged."""
