"""FedIOD's weights and losses as functions of logits (docs/methods/fediod.md, 5 and 6; arXiv 2312.14478).

K clients, B images, C classes; logits are ``[K, B, C]`` or, for segmentation, ``[K, B, C, *positions]``: every term is
then the mean over images and positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import ops

CLAMP = (0.01, 0.99)  # of the probabilities, and of their mean, in the released code's diversity


def reached(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradients with respect to ``outputs`` are ``gradients``, to the last bit.

    Given to ``torch.autograd.grad`` as ``grad_outputs``, the first of them imports sympy, a third of a second.
    """
    with torch.enable_grad():
        return torch.stack([(x * gradient).sum() for x, gradient in zip(outputs, gradients, strict=True)]).sum()


def teacher_log_probs(logits: Tensor, mix: str) -> Tensor:
    """What a teacher says of images, logits ``[..., C, *positions]`` with the classes on axis 2.

    A softmax does not see what is added to all of its logits, nor how sure a network is of classes that it has never
    seen; a mean that takes every class from other teachers does.  So with ``mix="log_probs"`` teachers say
    log-probabilities: the ensemble is then the logarithmic opinion pool, class by class.
    """
    return logits.log_softmax(2) if mix == "log_probs" else logits


# -- weights (2.3) -------------------------------------------------------------------------------------------------


def importance(by_class: Tensor, scores: Tensor | None) -> Tensor:
    """Weights of the teachers for :func:`fedkern.ops.ensemble_kl`, which normalises them over the clients.

    Args:
        by_class: ``[K, C]``.
        scores: the discriminators' mean confidence in every image ``[K, B]``, or None.

    Returns:
        ``w_kc r_k(x)`` ``[K, B, C]``, or ``w_kc`` ``[K, 1, C]``.
    """
    if scores is None:
        return by_class[:, None]
    # Where all are so sure that an image is made up that nothing is left of their scores, the classes still count.
    least = torch.finfo(scores.dtype).tiny ** 0.5
    return by_class[:, None] * scores.detach().clamp_min(least)[:, :, None]


def normalised(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights ``[K, B or 1, C]`` over their sum over the clients; 1/K where weights and ``mask`` [K, C] leave none."""
    if mask is not None:
        weights = weights * mask[:, None]
    total = weights.sum(0, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / len(weights))


def mixture(logits: Tensor, weights: Tensor, mask: Tensor | None, mix: str = "logits") -> Tensor:
    """The ensemble's logits ``[B, C, *positions]``: the mean of the logits, or the log of that of the softmaxes."""
    share = normalised(weights, mask)
    share = share.reshape(*share.shape, *[1] * (logits.dim() - 3))
    if mix != "probs":
        return (share * logits).sum(0)
    # Within logarithms, so that a class which all are sure against has a finite one, and a gradient.
    tiny = torch.finfo(share.dtype).tiny
    terms = logits.log_softmax(2) + share.clamp_min(tiny).log().masked_fill(share == 0, -math.inf)
    return terms.logsumexp(0).log_softmax(1)


# -- discriminators (2.5 b, c) -------------------------------------------------------------------------------------


def against(patches: Tensor, real: bool, reduction: str) -> Tensor:
    """Binary cross-entropy ``[K, B]`` of patch logits ``[K, B, h, w]`` to one label: mean or sum over the patches."""
    terms = F.softplus(-patches if real else patches)
    return terms.mean((2, 3)) if reduction == "mean" else terms.sum((2, 3))


def confidence(patches: Tensor) -> Tensor:
    """``r_k(x)``, the mean over patches of the probability of being real, ``[K, B]``."""
    return patches.sigmoid().mean((2, 3))


# -- the student's loss and the generator's ------------------------------------------------------------------------


def distillation(student: Tensor, logits: Tensor, weights: Tensor, mask: Tensor | None, s: Any) -> Tensor:
    """``KD(S(x), tbar(x))`` of student logits ``[B, C, *positions]`` against the weighted ensemble, a scalar."""
    if s.kd == "l1":
        return (student - mixture(logits, weights, mask, s.mix)).abs().mean()
    temperature = math.inf if s.kd == "logit_var" else s.temperature
    mix = "probs" if s.mix == "probs" else "logits"
    return ops.ensemble_kl(student, logits, weights, temperature, mix=mix, class_mask=mask)


def diversity(logits: Tensor, pi: Tensor, kind: str) -> Tensor:
    """How much the teachers tell apart, in nats; ``pi`` ``[K]`` are the clients' weights.

    ``reverse_kl`` is the released code's: ``mean_k sum_c m_c log(m_c / p_kc)`` with probabilities p and their
    unweighted mean m, each clamped after the mean was taken.  Clamped rows do not sum to one, so it can be below 0.
    """
    if kind == "jsd":
        return ops.js_div(logits, pi)
    if kind == "mutual_information":
        return information(logits, pi)
    p = logits.softmax(2)
    mean = p.mean(0, keepdim=True).clamp(*CLAMP)
    p = p.clamp(*CLAMP)
    return (mean * (mean / p).log()).sum(2).mean()


def information(logits: Tensor, pi: Tensor) -> Tensor:
    """Mutual information of image and class under the mixture: ``H(mean_x pbar) - mean_x H(pbar)``."""
    spread = pi.reshape(-1, *[1] * (logits.dim() - 1)) / pi.sum()
    log_p = (spread * logits.softmax(2)).sum(0).clamp_min(torch.finfo(logits.dtype).tiny).log()
    log_p = log_p.movedim(1, -1).flatten(0, -2)
    return ops.js_div(log_p[:, None])


def balance(logits: Tensor, pi: Tensor) -> Tensor:
    """``sum_k pi_k sum_c pbar_kc log2 pbar_kc``, minus the entropy in bits of a batch's mean prediction."""
    p = logits.softmax(2).movedim(2, -1).flatten(1, -2).mean(1)
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # at 0, a class that a sure teacher rules out, the slope is infinite
    return (pi * torch.special.entr(p).sum(1)).sum() / (-math.log(2) * pi.sum())


def teacher_terms(
    logits: Tensor, pi: Tensor, s: Any, student: Tensor | None, weights: Tensor, mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of ``L_G`` that goes through the teachers' logits (2.5 c), and its terms by name.

    Args:
        logits: the teachers', ``[K, B, C, *positions]``; gradients reach them.
        pi: client weights ``[K]``.
        student: the student's logits ``[B, C, *positions]``, wanted where the adversarial term counts.
        weights, mask: of the teachers in the ensemble, see :func:`importance`.
    """
    terms: dict[str, Tensor] = {}
    total = logits.new_zeros(())
    if s.w_clear and s.diversity == "jsd" and s.w_diverse:  # both from one pass
        mixed, terms["clarity"] = ops.consensus(logits, pi)
        terms["diversity"] = mixed - terms["clarity"]
        # H(mixture) and the mean entropy with their two factors: one backward pass for both.
        own = s.js_sign * s.w_diverse
        total = own * mixed + (s.w_clear - own) * terms["clarity"]
    else:
        if s.w_clear:
            terms["clarity"] = ops.consensus(logits, pi)[1]
            total = total + s.w_clear * terms["clarity"]
        if s.w_diverse and s.diversity != "none":
            terms["diversity"] = diversity(logits, pi, s.diversity)
            total = total + s.js_sign * s.w_diverse * terms["diversity"]
    if s.w_adv and student is not None:
        terms["adversarial"] = distillation(student, logits, weights, mask, s)
        total = total - s.w_adv * terms["adversarial"]
    if s.w_balance:
        terms["balance"] = balance(logits, pi)
        total = total + s.w_balance * terms["balance"]
    return total, terms


def asks_teachers(s: Any) -> bool:
    """Whether the generator's loss uses the teachers at all (the "GAN only" ablation does not)."""
    return bool(s.w_clear or (s.w_diverse and s.diversity != "none") or s.w_adv or s.w_balance)
