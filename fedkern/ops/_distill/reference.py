"""References of the distill operators in plain PyTorch: specification, test oracle and fallback."""

import math

import torch
from torch import Tensor

from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._distill.checks import check_weight
from fedkern.ops._distill.rows import NONE, REDUCTIONS, SUM


def kl_div_reference(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    peer: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Specify :func:`kl_div`, and with ``peer`` (a second student) :func:`dual_kl`.

    ``reverse`` exchanges the roles: KL(student ‖ teacher).
    """
    if weight is not None:
        weight = check_weight(weight, student, torch.float32)
    return divergence_reference(student, peer, teacher, weight, temperature, reverse, REDUCTIONS[reduction])


def divergence_reference(
    student: Tensor,
    peer: Tensor | None,
    teacher: Tensor,
    weight: Tensor | None,
    temperature: float,
    reverse: bool,
    reduction: int,
) -> Tensor:
    dtype = result_dtype(student, peer, teacher)
    compute = torch.float64 if is_flat(temperature) else compute_dtype(dtype)
    teacher = mask_rows(teacher, weight).to(compute)
    losses = []
    for logits in (student,) if peer is None else (student, peer):
        logits = mask_rows(logits, weight).to(compute)
        if math.isinf(temperature):
            losses.append(half_variance(teacher, logits))
        else:
            p, q = (logits, teacher) if reverse else (teacher, logits)
            losses.append(scaled_divergence(p, q, temperature))
    rows = losses[0] if peer is None else losses[0] + losses[1]
    return reduce_rows(rows, weight if weight is None else weight.to(compute), reduction).to(dtype)


def scaled_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    """Compute T² KL(softmax(p_logits / T) ‖ softmax(q_logits / T)) over axis 1, for a finite T."""
    if is_flat(temperature):
        return flat_divergence(*flat_log_softmax(p_logits, temperature, 1), q_logits, temperature)
    log_p, log_q = ((x / temperature).log_softmax(1) for x in (p_logits, q_logits))
    return temperature**2 * divergence_terms(log_p, log_q).sum(1)


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute the terms P (eᵘ − 1 − u) of every class, with u = log Q − log P.

    Their sum equals Σ P (log P − log Q). None is negative, so that nearly equal rows do not cancel.
    """
    p, q = log_p.exp(), log_q.exp()
    u = torch.where(p == 0, 1, log_q - log_p)  # without P, Q alone counts: the far form gives it
    low = u.clamp_max(1)
    near = p * (torch.expm1(low) - low).clamp_min(0)
    return torch.where(u < 1, near, q - p - p * u)


# Above this temperature every distribution is nearly flat: log Q - log P falls as 1/T, below what the logarithms of
# float32 sums resolve. All backends then take the reference, in float64 and in numbers that do not fall with T.
FLAT = 64.0


def is_flat(temperature: float) -> bool:
    return FLAT < temperature < math.inf


def flat_log_softmax(x: Tensor, temperature: float, axis: int) -> tuple[Tensor, Tensor]:
    """Return T (log softmax(x / T) + log n) over the n classes that are not masked, of the order of x, and n."""
    masked = x == -math.inf
    count = (~masked).sum(axis, keepdim=True, dtype=x.dtype)
    below = torch.where(masked, 0, x - x.amax(axis, keepdim=True).detach())
    mean = torch.expm1(below / temperature).sum(axis, keepdim=True) / count
    return torch.where(masked, -math.inf, below - temperature * torch.log1p(mean)), count


def flat_divergence(over_p: Tensor, count_p: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    """Compute T² KL(P ‖ softmax(q_logits / T)) over axis 1, for P from :func:`flat_log_softmax`.

    The terms are those of :func:`divergence_terms`.
    """
    over_q, count_q = flat_log_softmax(q_logits, temperature, 1)
    p, q = (over_p / temperature).exp() / count_p, (over_q / temperature).exp() / count_q
    masked = p == 0
    scaled = over_q - torch.where(masked, 0, over_p) + temperature * (count_p / count_q).log()
    scaled = torch.where(masked, 0, scaled)  # T u
    u = scaled / temperature
    small = u.abs() < 1
    near = p * torch.where(small, scaled, 0).square() * _exp_remainder(torch.where(small, u, 0))
    far = temperature * (temperature * (q - p) - torch.where(masked | small, 0, p * scaled))
    return torch.where(small & ~masked, near, far).sum(1)


def _exp_remainder(u: Tensor) -> Tensor:
    """Compute (eᵘ − 1 − u) / u² for float64."""
    tiny = u.abs() < 1e-2
    v, w = torch.where(tiny, u, 0), torch.where(tiny, 1, u)
    series = 1 / 2 + v * (1 / 6 + v * (1 / 24 + v * (1 / 120 + v * (1 / 720 + v / 5040))))
    return torch.where(tiny, series, (torch.expm1(w) - w) / w.square())


def half_variance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the limit of T² KL for T → ∞: half the variance of teacher − student over classes unmasked in both."""
    masked = (teacher == -math.inf) | (student == -math.inf)
    difference = torch.where(masked, 0, teacher) - torch.where(masked, 0, student)
    count = (~masked).sum(1, keepdim=True)
    deviation = torch.where(masked, 0, difference - difference.sum(1, keepdim=True) / count)
    return 0.5 * (deviation.square().sum(1, keepdim=True) / count).squeeze(1)


def entropy_reference(logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Specify :func:`fedkern.ops.entropy`."""
    return entropy_rows_reference(logits, REDUCTIONS[reduction])


def entropy_rows_reference(logits: Tensor, reduction: int) -> Tensor:
    log_p = logits.to(compute_dtype(logits.dtype)).log_softmax(1)
    rows = -(log_p.exp() * torch.where(log_p == -math.inf, 0, log_p)).sum(1)
    return reduce_rows(rows, None, reduction).to(logits.dtype)


def result_dtype(student: Tensor | None, peer: Tensor | None, teacher: Tensor) -> torch.dtype:
    dtype = teacher.dtype
    if student is not None and student.dtype is not dtype:
        dtype = torch.promote_types(dtype, student.dtype)
    if peer is not None and peer.dtype is not dtype:
        dtype = torch.promote_types(dtype, peer.dtype)
    return dtype


def reduce_rows(rows: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    """Weight and reduce row losses, with exactly 0 for a row of weight 0, whatever it holds."""
    if weight is not None:
        rows = torch.where(weight == 0, 0, rows * weight)
    if reduction == NONE:
        return rows
    total = rows.sum()
    return total if reduction == SUM else total / max(rows.numel(), 1)


def mask_rows(logits: Tensor, weight: Tensor | None) -> Tensor:
    """Zero the rows of weight 0, so that no value there reaches a gradient."""
    return logits if weight is None else torch.where((weight == 0).unsqueeze(1), 0, logits)
