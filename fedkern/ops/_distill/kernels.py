"""Kernel interface of the distill family, and the settings that its kernels take.

The CPU class is in launch.py; :func:`fedkern.ops._core.backend.select` returns instances. The public functions have
checked the arguments. Kernels allocate what they return. Sums and losses are computed in float32 (float64 where an
input is float64) and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# --- settings: one object per call instead of several arguments. The cached constructors cost eager calls nothing.


@dataclass(frozen=True, slots=True)
class Divergence:
    """Settings of kl_div and dual_kl. ``reverse``: KL(student ‖ teacher); ``reduction``: a number of ``REDUCTIONS``."""

    temperature: float
    reverse: bool
    reduction: int


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Settings of ensemble_kl. ``mix``: ``PROBS``, ``LOGITS`` or ``MEAN``.

    ``log_probs``: teachers hold log-probabilities.
    """

    temperature: float
    mix: int
    log_probs: bool
    reduction: int


divergence_settings = functools.lru_cache(maxsize=256)(Divergence)
ensemble_settings = functools.lru_cache(maxsize=256)(Ensemble)


class DistillKernel(Protocol):
    """One backend's distill operators.

    Shapes: logits are ``[B, C, *positions]``, those of K teachers ``[K, B, C, *positions]``, and rows are
    ``[B, *positions]``. Any strides are valid. A gradient has the memory format of its tensor.

    ``reduction`` is a number of ``REDUCTIONS``. "none" gives a value per row, the others a scalar. "batchmean" divides
    loss and gradients by the number of rows; an empty batch gives 0.

    Gradients for a grad_output of 1 can be computed in the forward pass, into the ``to_...`` tensors. Autograd asks for
    this where :attr:`fused` is true and the result is a scalar, and then calls :meth:`scaled` in the backward pass.
    Otherwise it calls ``..._backward``, which recomputes from the logits and takes ``grad`` as a tensor of the result's
    shape, any strides. On CUDA the kernel reads ``grad`` through its device pointer: no method there may read a
    tensor's values on the host.

    Weights of ensemble_kl may also be ``[K]`` where :attr:`short_weights` is true, unless they want a gradient.
    """

    fused: bool
    short_weights: bool

    def scaled(self, gradients: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...] | None:
        """Returns ``gradients`` (for a grad_output of 1) times the scalar ``grad``; called only where ``fused``.

        Where ``grad`` is 1 these are the same tensors, otherwise new ones, since the graph may be retained. None makes
        the caller use ``..._backward`` instead. That is so for 16-bit gradients, which would be rounded twice and would
        underflow before a loss scale lifts them.
        """

    def empty_gradient(self, x: Tensor) -> Tensor:
        """An uninitialised gradient of ``x`` in its memory format, for ``to_...``."""

    def divergence_forward(
        self,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        to_student: Tensor | None = None,
        to_other: Tensor | None = None,
        to_teacher: Tensor | None = None,
        raw_loss: Tensor | None = None,
    ) -> Tensor:
        """kl_div, or dual_kl with ``other`` (a second student); the result has the promoted dtype of the logits.

        ``weight`` has one value per row. A row of weight 0 contributes exactly 0, whatever it holds. ``raw_loss``
        receives the rows' unweighted losses, 0 where the weight is 0.
        """

    def divergence_backward(
        self,
        grad: Tensor,
        student: Tensor,
        other: Tensor | None,
        teacher: Tensor,
        weight: Tensor | None,
        settings: Divergence,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of student, other, teacher, weight, each in its own dtype; None where ``needs`` is false."""

    def entropy_forward(self, logits: Tensor, reduction: int, to_logits: Tensor | None = None) -> Tensor:
        """entropy, in the logits' dtype."""

    def entropy_backward(self, grad: Tensor, logits: Tensor, reduction: int) -> Tensor: ...

    def ensemble_forward(
        self,
        student: Tensor,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        to_student: Tensor | None = None,
        to_teachers: Tensor | None = None,
    ) -> Tensor:
        """ensemble_kl, in the promoted dtype of student and teachers.

        ``weights``: ``[K, B, 1, *positions]`` (one per teacher and row) or ``[K, B, C, *positions]``, any strides (0
        where they were broadcast), not normalised, any floating dtype; None for equal weights. ``class_mask``: bool
        ``[K, C]`` or None.
        """

    def ensemble_backward(
        self,
        grad: Tensor,
        student: Tensor,
        teachers: Tensor,
        weights: Tensor | None,
        class_mask: Tensor | None,
        settings: Ensemble,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of student, teachers, weights (in the shape given); None where ``needs`` is false."""

    def js_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, to_logits: Tensor | None = None
    ) -> Tensor:
        """js_div, in the logits' dtype. ``weights``: ``[K, B, *positions]`` or None, as in ensemble_forward."""

    def js_backward(
        self, grad: Tensor, logits: Tensor, weights: Tensor | None, reduction: int, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of logits and weights; None where ``needs`` is false."""

    def consensus_kept(self, logits: Tensor) -> Tensor | None:
        """Uninitialised memory for results that consensus_forward keeps for consensus_backward; None: keeps nothing."""

    def consensus_forward(
        self, logits: Tensor, weights: Tensor | None, reduction: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """consensus: (entropy of the mixture, weighted mean of the entropies)."""

    def consensus_backward(
        self,
        grad_mixture: Tensor,
        grad_mean: Tensor,
        logits: Tensor,
        weights: Tensor | None,
        reduction: int,
        needs: Sequence[bool],
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of logits and weights; None where ``needs`` is false."""


class Recomputes:
    """Base of a :class:`DistillKernel` on a GPU: gradients are recomputed from the logits in the backward pass.

    Reading grad_output on the host would wait for the device. A gradient from the forward pass would have to be read,
    scaled and written again. That is as much traffic as computing it from the logits, which rounds it only once.
    """

    fused = False
    short_weights = False

    def scaled(self, gradients: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...] | None:
        return None

    def empty_gradient(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def consensus_kept(self, logits: Tensor) -> Tensor | None:
        return None
