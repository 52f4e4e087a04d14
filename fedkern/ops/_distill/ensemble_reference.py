"""References of ensemble_kl, js_div and consensus in plain PyTorch: specification, test oracle and fallback."""

import math

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._distill import reference
from fedkern.ops._distill.reference import divergence_terms, half_variance, reduce_rows, scaled_divergence
from fedkern.ops._distill.rows import LOGITS, MEAN, PROBS

# Shapes below: teachers ``[K, B, C, *positions]``, weights ``[K, B, 1 or C, *positions]``, mask ``[K, C]``.


def normalised_weights(weights: Tensor | None, class_mask: Tensor | None, teachers: Tensor) -> Tensor:
    """Return each teacher's share, per sample and class, 1/K where no teacher is left."""
    count, compute = teachers.shape[0], compute_dtype(teachers.dtype)
    if weights is None:
        weights = torch.ones(count, *[1] * (teachers.dim() - 1), dtype=compute, device=teachers.device)
    # A weight of 0 gets no gradient, since its teacher is ignored.
    weights = torch.where(weights == 0, 0, weights.to(compute))
    if class_mask is not None:
        weights = torch.where(class_mask.reshape(count, 1, -1, *[1] * (teachers.dim() - 3)), weights, 0)
    total = weights.sum(0, keepdim=True)
    empty = total == 0
    return torch.where(empty, 1 / count, weights / torch.where(empty, 1, total))


def _skip_rows(teachers: Tensor, share: Tensor) -> Tensor:
    """Zero the rows of share 0, so that no value there reaches a gradient."""
    return torch.where((share == 0).all(2, keepdim=True), 0, teachers)


def _weighted_sum(share: Tensor, rows: Tensor) -> Tensor:
    """Compute Σ share · rows over the teachers, where rows may be infinite at share 0."""
    share = share.squeeze(2)
    return (share * torch.where(share == 0, 0, rows)).sum(0)


def log_mixture(log_p: Tensor, share: Tensor) -> Tensor:
    """Compute log Σ share · p over the teachers, ``-inf`` only if every p of positive share is 0."""
    counts = share > 0
    peak = torch.where(counts, log_p, -math.inf).amax(0).detach()
    peak = torch.where(peak == -math.inf, 0, peak)
    mixture = (share * torch.where(counts, log_p - peak, -math.inf).exp()).sum(0)
    empty = mixture == 0
    return torch.where(empty, -math.inf, torch.where(empty, 1, mixture).log() + peak)


def mixed_logits(logits: Tensor, share: Tensor) -> Tensor:
    """Compute Σ share · logits over the teachers, ``-inf`` if a teacher of positive share has it."""
    counts = share > 0
    masked = (counts & (logits == -math.inf)).any(0)
    finite = torch.where((logits == -math.inf) | ~counts, 0, logits)
    return torch.where(masked, -math.inf, (share * finite).sum(0))


def ensemble_reference(
    student: Tensor,
    teachers: Tensor,
    weights: Tensor | None,
    class_mask: Tensor | None,
    temperature: float,
    mix: int,
    log_probs: bool,
    reduction: int,
) -> Tensor:
    """Specify :func:`fedkern.ops.ensemble_kl`."""
    dtype = reference.result_dtype(student, None, teachers)
    compute = torch.float64 if reference.is_flat(temperature) else compute_dtype(dtype)
    student, teachers = student.to(compute), teachers.to(compute)
    share = normalised_weights(weights, class_mask, teachers)
    teachers = _skip_rows(teachers, share)
    rows = (_limit if math.isinf(temperature) else _finite)(student, teachers, share, temperature, mix, log_probs)
    return reduce_rows(rows, None, reduction).to(dtype)


def _finite(student: Tensor, teachers: Tensor, share: Tensor, temperature: float, mix: int, log_probs: bool) -> Tensor:
    if mix == LOGITS:
        return scaled_divergence(mixed_logits(teachers, share), student, temperature)
    if reference.is_flat(temperature):
        if mix == MEAN:
            return _weighted_sum(share, torch.stack([scaled_divergence(x, student, temperature) for x in teachers]))
        mixture = _flat_log_mixture(teachers, share, temperature)
        return reference.flat_divergence(*reference.flat_log_softmax(mixture, temperature, 1), student, temperature)
    square = temperature**2
    log_q = (student / temperature).log_softmax(1)
    log_p = teachers if log_probs and temperature == 1 else (teachers / temperature).log_softmax(2)
    if mix == PROBS:
        return square * divergence_terms(log_mixture(log_p, share).log_softmax(1), log_q).sum(1)
    return square * _weighted_sum(share, divergence_terms(log_p, log_q.unsqueeze(0)).sum(2))


def _flat_log_mixture(teachers: Tensor, share: Tensor, temperature: float) -> Tensor:
    """Compute T log Σ share · p over the teachers, up to a constant of the row."""
    over, count = reference.flat_log_softmax(teachers, temperature, 2)
    over = over - temperature * (count / count.amax(0)).log()
    counts = (share > 0) & (over > -math.inf)
    peak = torch.where(counts, over, -math.inf).amax(0).detach()
    empty = peak == -math.inf
    below = torch.where(counts, over - torch.where(empty, 0, peak), 0) / temperature
    excess = (share * torch.where(counts, torch.expm1(below), -1)).sum(0)
    return torch.where(empty, -math.inf, peak + temperature * torch.log1p(torch.where(empty, 0, excess)))


def _limit(student: Tensor, teachers: Tensor, share: Tensor, temperature: float, mix: int, log_probs: bool) -> Tensor:
    if mix == MEAN:
        return _weighted_sum(share, torch.stack([half_variance(teacher, student) for teacher in teachers]))
    if mix == PROBS and share.shape[2] > 1:  # else the mean is one number for all classes of a row
        # To first order in 1/T a softmax is (1 + (x - mean x) / T) / C.
        masked = teachers == -math.inf
        finite = torch.where(masked, 0, teachers)
        teachers = torch.where(masked, -math.inf, finite - finite.sum(2, keepdim=True) / (~masked).sum(2, keepdim=True))
    return half_variance(mixed_logits(teachers, share), student)


def js_reference(logits: Tensor, weights: Tensor | None, reduction: int) -> Tensor:
    """Specify :func:`fedkern.ops.js_div`: Σ w KL(p ‖ mixture), whose terms are never negative."""
    log_p, mixture, share = _against_mixture(logits, weights)
    rows = _weighted_sum(share, divergence_terms(log_p, mixture.unsqueeze(0)).sum(2))
    # Rounding must not exceed log K; the clamp leaves the gradient unchanged.
    rows = rows + (rows.clamp_max(math.log(logits.shape[0])) - rows).detach()
    return reduce_rows(rows, None, reduction).to(logits.dtype)


def consensus_reference(logits: Tensor, weights: Tensor | None, reduction: int) -> tuple[Tensor, Tensor]:
    """Specify :func:`fedkern.ops.consensus`."""
    log_p, mixture, share = _against_mixture(logits, weights)
    mean = _weighted_sum(share, _entropy(log_p, 2))
    mixed, averaged = (reduce_rows(rows, None, reduction).to(logits.dtype) for rows in (_entropy(mixture, 1), mean))
    return mixed, averaged


def _against_mixture(logits: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.to(compute_dtype(logits.dtype))
    share = normalised_weights(None if weights is None else weights.unsqueeze(2), None, x)
    log_p = _skip_rows(x, share).log_softmax(2)
    return log_p, log_mixture(log_p, share), share


def _entropy(log_p: Tensor, axis: int) -> Tensor:
    return -(log_p.exp() * torch.where(log_p == -math.inf, 0, log_p)).sum(axis)
