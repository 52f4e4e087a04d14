"""What a kernel of contrastive offers; :func:`fedkern.ops.backend.select` hands out instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Gradients(NamedTuple):
    """Of x, y and the temperature, for a grad_output of 1, in the computing dtype; None where nobody wants one."""

    x: Tensor | None
    y: Tensor | None
    temperature: Tensor | None


class ContrastKernel(Protocol):
    """One backend's contrastive.

    ``x`` and ``y`` are ``[B, D]`` with any strides, ``temperature`` is a float or a 0-d tensor; arguments were checked
    by the public function.  Sums are taken in float32 (float64 where an input is float64) and rounded once.  On CUDA no
    method looks at a value, which would wait for the device.
    """

    def loss(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
        """The loss, in the promoted dtype of x and y."""

    def loss_and_gradients(
        self, x: Tensor, y: Tensor, temperature: float | Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, Gradients]:
        """The loss and its gradients with respect to x, y and the temperature where ``needs`` says so."""

    def loss_and_sums(self, x: Tensor, y: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and what softmaxes are made of: tops and sums of rows, then of columns, ``[4, B]``.

        A softmax is ``exp((x yᵀ - top) / temperature) / sum``; tops and sums have the computing dtype.
        """

    def gradients(
        self, x: Tensor, y: Tensor, temperature: float | Tensor, sums: Tensor, needs: Sequence[bool]
    ) -> Gradients:
        """The gradients, from what :meth:`loss_and_sums` gave."""

    def scaled(
        self, gradients: Sequence[Tensor | None], grad: Tensor, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """``gradients`` times ``grad`` in the dtypes of ``inputs``, as many as those; what was given stays as it is."""
