"""Weights and losses of FedIOD as functions of logits (arXiv 2312.14478, docs/methods/fediod.md, sections 5 and 6).

K clients, B images, C classes: logits are ``[K, B, C]``, for segmentation ``[K, B, C, *positions]`` with means over
positions too.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import ops


def scalar_of(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return a scalar whose gradients with respect to ``outputs`` are exactly ``gradients``.

    ``grad_outputs`` of ``torch.autograd.grad`` would import sympy, a third of a second.
    """
    with torch.enable_grad():
        return torch.stack([(x * gradient).sum() for x, gradient in zip(outputs, gradients, strict=True)]).sum()


def teacher_log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the teachers' log-probabilities of logits, or of log-probabilities at temperature 1.

    A softmax ignores a constant added to all its logits, and how sure a network is of classes that it has never seen. A
    mean with different weights for every class depends on both, so the ensemble averages log-probabilities, as the
    logarithmic opinion pool.
    """
    return (logits / temperature).log_softmax(2)


# -- weights (section 5) -------------------------------------------------------------------------------------------


def importance(by_class: Tensor, scores: Tensor | None) -> Tensor:
    """Return the ensemble's weights ``v_kc r_k(x)`` ``[K, B, C]``, or ``v_kc`` ``[K, 1, C]`` without scores.

    ``by_class`` is ``v_kc`` ``[K, C]``, ``scores`` is ``r_k(x)`` ``[K, B]``.
    """
    if scores is None:
        return by_class[:, None]
    # Scores vanish where every discriminator is sure that an image is generated; class weights then still count.
    return by_class[:, None] * scores.detach().clamp_min(torch.finfo(scores.dtype).tiny ** 0.5)[:, :, None]


def normalise_weights(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Divide weights ``[K, B or 1, C]`` by their sum over clients, 1/K if ``mask`` [K, C] leaves a sum of 0."""
    if mask is not None:
        weights = weights * mask[:, None]
    total = weights.sum(0, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / len(weights))


def mixture(logits: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """Return the ensemble's logits ``[B, C, *positions]``, the teachers' weighted mean."""
    share = normalise_weights(weights, mask)
    share = share.reshape(*share.shape, *[1] * (logits.dim() - 3))
    return (share * logits).sum(0)


# -- discriminators (section 6) ------------------------------------------------------------------------------------


def patch_entropy(patches: Tensor, real: bool) -> Tensor:
    """Return the mean over patches of the binary cross-entropy ``[K, B]`` of patch logits ``[K, B, h, w]``."""
    return F.softplus(-patches if real else patches).mean((2, 3))


def confidence(patches: Tensor) -> Tensor:
    """Return ``r_k(x)``, the mean over patches of the probability of being real, ``[K, B]``."""
    return patches.sigmoid().mean((2, 3))


# -- the student's loss and the generator's ------------------------------------------------------------------------


def distillation(student: Tensor, logits: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``KD(student(x), m(x))`` of student logits ``[B, C, *positions]`` against the weighted ensemble.

    Half the variance of the logit difference: the limit of the divergence at high temperature.
    """
    return ops.ensemble_kl(student, logits, weights, math.inf, mix="logits", class_mask=mask)


def balance(logits: Tensor, pi: Tensor) -> Tensor:
    """Return ``sum_k pi_k sum_c q_kc log2 q_kc``: minus the entropy in bits of the batch mean predictions q_k."""
    p = logits.softmax(2).movedim(2, -1).flatten(1, -2).mean(1)
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # the slope is infinite at 0, a class that a teacher rules out
    loss: Tensor = (pi * torch.special.entr(p).sum(1)).sum() / (-math.log(2) * pi.sum())
    return loss


def teacher_terms(logits: Tensor, pi: Tensor, w_balance: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the terms of ``L_G`` on the teachers' logits, and each term by name.

    ``pi`` are the client weights ``[K]``.
    """
    mixed, clarity = ops.consensus(logits, pi)
    terms = {"clarity": clarity, "diversity": mixed - clarity}
    # clarity - diversity, written as factors of H(mixture) and the mean entropy: one backward pass.
    total = 2 * clarity - mixed
    if w_balance:
        terms["balance"] = balance(logits, pi)
        total = total + w_balance * terms["balance"]
    return total, terms
