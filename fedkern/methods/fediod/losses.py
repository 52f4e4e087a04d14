"""FedIOD's weights and losses as functions of logits (docs/methods/fediod.md, sections 5 and 6; arXiv 2312.14478).

K clients, B images, C classes.  Logits are ``[K, B, C]`` or, for segmentation, ``[K, B, C, *positions]``.  For
segmentation every term is the mean over images and positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import ops

CLAMP = (0.01, 0.99)  # bounds of the probabilities and of their mean in the released code's diversity


def reached(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradients with respect to ``outputs`` are ``gradients``, to the last bit.

    The alternative, ``grad_outputs`` of ``torch.autograd.grad``, imports sympy at its first call: a third of a second.
    """
    with torch.enable_grad():
        return torch.stack([(x * gradient).sum() for x, gradient in zip(outputs, gradients, strict=True)]).sum()


def teacher_log_probs(logits: Tensor, mix: str) -> Tensor:
    """The teachers' answers that the ensemble averages, of logits ``[..., C, *positions]`` with the classes on axis 2.

    With ``mix="log_probs"`` these are log-probabilities: the ensemble is then the logarithmic opinion pool, class by
    class.  A softmax ignores a constant that is added to all of its logits, and how sure a network is of classes that
    it has never seen.  A mean that weighs the teachers differently for every class does depend on both.
    """
    return logits.log_softmax(2) if mix == "log_probs" else logits


# -- weights (section 5) -------------------------------------------------------------------------------------------


def importance(by_class: Tensor, scores: Tensor | None) -> Tensor:
    """Weights of the teachers for :func:`fedkern.ops.ensemble_kl`, which normalises them over the clients.

    Args:
        by_class: class weights ``v_kc``, ``[K, C]``.
        scores: the discriminators' mean confidence in every image ``r_k(x)``, ``[K, B]``, or None.

    Returns:
        ``v_kc r_k(x)`` ``[K, B, C]``, or ``v_kc`` ``[K, 1, C]`` without scores.
    """
    if scores is None:
        return by_class[:, None]
    # Scores vanish where every discriminator is sure that an image is generated; class weights then still count.
    least = torch.finfo(scores.dtype).tiny ** 0.5
    return by_class[:, None] * scores.detach().clamp_min(least)[:, :, None]


def normalised(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights ``[K, B or 1, C]`` over their sum over the clients.

    1/K where ``mask`` [K, C] leaves a sum of 0.
    """
    if mask is not None:
        weights = weights * mask[:, None]
    total = weights.sum(0, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / len(weights))


def mixture(logits: Tensor, weights: Tensor, mask: Tensor | None, mix: str = "logits") -> Tensor:
    """The ensemble's logits ``[B, C, *positions]``: the weighted mean of logits, or the log of that of softmaxes."""
    share = normalised(weights, mask)
    share = share.reshape(*share.shape, *[1] * (logits.dim() - 3))
    if mix != "probs":
        return (share * logits).sum(0)
    # In log space, so that a class which all teachers rule out has a finite logit and a gradient.
    tiny = torch.finfo(share.dtype).tiny
    terms = logits.log_softmax(2) + share.clamp_min(tiny).log().masked_fill(share == 0, -math.inf)
    return terms.logsumexp(0).log_softmax(1)


# -- discriminators (section 6) ------------------------------------------------------------------------------------


def against(patches: Tensor, real: bool, reduction: str) -> Tensor:
    """Binary cross-entropy ``[K, B]`` of patch logits ``[K, B, h, w]`` for one label: mean or sum over patches."""
    terms = F.softplus(-patches if real else patches)
    return terms.mean((2, 3)) if reduction == "mean" else terms.sum((2, 3))


def confidence(patches: Tensor) -> Tensor:
    """``r_k(x)``, the mean over patches of the probability of being real, ``[K, B]``."""
    return patches.sigmoid().mean((2, 3))


# -- the student's loss and the generator's ------------------------------------------------------------------------


def distillation(student: Tensor, logits: Tensor, weights: Tensor, mask: Tensor | None, s: Any) -> Tensor:
    """``KD(student(x), m(x))`` of student logits ``[B, C, *positions]`` against the weighted ensemble, a scalar."""
    if s.kd == "l1":
        return (student - mixture(logits, weights, mask, s.mix)).abs().mean()
    temperature = math.inf if s.kd == "logit_var" else s.temperature
    mix = "probs" if s.mix == "probs" else "logits"
    return ops.ensemble_kl(student, logits, weights, temperature, mix=mix, class_mask=mask)


def diversity(logits: Tensor, pi: Tensor, kind: str) -> Tensor:
    """Diversity of the teachers' answers, in nats.

    ``pi`` ``[K]`` are the clients' weights.

    ``reverse_kl`` is the released code's: ``mean_k sum_c m_c log(m_c / p_kc)`` with probabilities p and their
    unweighted mean m, both clamped after the mean is taken.  Clamped rows do not sum to one, so the value can be
    negative.
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
    """Mutual information of image and class under the mixture p: ``H(mean_b p) - mean_b H(p)``."""
    spread = pi.reshape(-1, *[1] * (logits.dim() - 1)) / pi.sum()
    log_p = (spread * logits.softmax(2)).sum(0).clamp_min(torch.finfo(logits.dtype).tiny).log()
    log_p = log_p.movedim(1, -1).flatten(0, -2)
    return ops.js_div(log_p[:, None])


def balance(logits: Tensor, pi: Tensor) -> Tensor:
    """``sum_k pi_k sum_c q_kc log2 q_kc``: minus the entropy in bits of a teacher's batch mean prediction q_k."""
    p = logits.softmax(2).movedim(2, -1).flatten(1, -2).mean(1)
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # the slope is infinite at 0, a class that a teacher rules out
    return (pi * torch.special.entr(p).sum(1)).sum() / (-math.log(2) * pi.sum())


def teacher_terms(
    logits: Tensor, pi: Tensor, s: Any, student: Tensor | None, weights: Tensor, mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of the generator's loss ``L_G`` that use the teachers' logits: their weighted sum, and each by name.

    Args:
        logits: the teachers' logits ``[K, B, C, *positions]``; gradients reach them.
        pi: client weights ``[K]``.
        student: the student's logits ``[B, C, *positions]``, needed for the adversarial term.
        weights: the teachers' weights in the ensemble, see :func:`importance`.
        mask: classes that each client knows, or None.
    """
    terms: dict[str, Tensor] = {}
    total = logits.new_zeros(())
    if s.w_clear and s.diversity == "jsd" and s.w_diverse:  # one pass computes both
        mixed, terms["clarity"] = ops.consensus(logits, pi)
        terms["diversity"] = mixed - terms["clarity"]
        # The same sum written as factors of H(mixture) and the mean entropy needs one backward pass.
        weight = s.js_sign * s.w_diverse
        total = weight * mixed + (s.w_clear - weight) * terms["clarity"]
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
