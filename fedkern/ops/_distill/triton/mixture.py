"""ensemble_kl, js_div and consensus in Triton: the kernels, launched by ensemble.py.

A program takes some rows of all K teachers, walks through the classes in tiles, and holds one tile of the mixture at a
time.
"""

import triton
import triton.language as tl

from fedkern.ops._core.triton.numbers import double_of, join, narrow
from fedkern.ops._distill.triton.losses import _by_p, log_ratio_of, pair_of
from fedkern.ops._distill.triton.rows import expm1_less, load_tile, log1p, ones_or, piece, rows_of, scan, store_total


@triton.jit(do_not_specialize=["temperature"])
def members_kernel(
    teachers, tops, logs, temperature, inner, classes, tiles, groups, all_rows,
    stride, outer_stride, row_stride, class_stride,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the maximum of each teacher's row and the log of its sum of exponentials, ``[K, rows]``."""
    program = tl.program_id(0)
    k, group = (program // groups).to(tl.int64), (program % groups).to(tl.int64)
    inside = group % tiles * ROWS + tl.arange(0, ROWS)
    valid = inside < inner
    offset = k * stride + group // tiles * outer_stride + inside * row_stride
    scale = 1.0 / double_of(temperature, COMPUTE)
    top, total = scan(teachers, offset, class_stride, valid, 0, classes, classes, scale, COMPUTE, ROWS, COLUMNS)
    place = k * all_rows + group // tiles * inner + inside
    tl.store(tops + place, top, mask=valid)
    tl.store(logs + place, tl.log(total), mask=valid)


@triton.jit
def _raw(weights, at_weight, weight_column, class_mask, mask_column, k, weight_stride, mask_stride, column, mask,
         COMPUTE: tl.constexpr):  # fmt: skip
    raw = tl.zeros(mask.shape, COMPUTE) + 1.0
    if weights is not None:
        place = k * weight_stride + at_weight[:, None] + (column * weight_column)[None, :]
        raw = tl.load(weights + place, mask=mask, other=0).to(COMPUTE)
    if class_mask is not None:
        class_known = tl.load(class_mask + k * mask_stride + column[None, :] * mask_column, mask=mask, other=0)
        raw = tl.where(class_known != 0, raw, 0.0)
    return raw


@triton.jit
def _sum_of_weights(weights, at_weight, weight_column, class_mask, mask_column, count, weight_stride, mask_stride,
                    column, mask, COMPUTE: tl.constexpr):  # fmt: skip
    total = tl.zeros(mask.shape, COMPUTE)
    for k in range(count):
        total += _raw(weights, at_weight, weight_column, class_mask, mask_column, tl.cast(k, tl.int64), weight_stride,
                      mask_stride, column, mask, COMPUTE)  # fmt: skip
    return total


@triton.jit
def share_of(raw, total, count):
    equal = (tl.zeros_like(total) + 1.0) / count  # not 1.0 / count, which is fp32
    return tl.where(total == 0, equal, raw / tl.where(total == 0, 1.0, total))


@triton.jit
def _statistics(tops, logs, row, valid, k, all_rows, LOG_PROBS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return results of :func:`members_kernel` for teacher k, or zeros if x is log p already."""
    top = tl.zeros(row.shape, COMPUTE)
    log_total = tl.zeros(row.shape, COMPUTE)
    if not LOG_PROBS:
        top += tl.load(tops + k * all_rows + row, mask=valid, other=0)
        log_total += tl.load(logs + k * all_rows + row, mask=valid, other=0)
    return top, log_total


@triton.jit
def _mix(
    teachers, weights, class_mask, tops, logs, y, y_top, y_log, at_teacher, at_weight, row, valid, column, mask,
    classes, count, all_rows, scale, teacher_stride, teacher_column, weight_stride, weight_column, mask_stride,
    mask_column, COMPUTE: tl.constexpr, TERMS: tl.constexpr, LOGITS: tl.constexpr, LOG_PROBS: tl.constexpr,
    RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return a tile of the mixture: log-probabilities, or (LOGITS) its logits over the temperature.

    Also returns the sum of the weights and (RELATIVE) three tiles that compare the mixture ``m`` with the softmax ``q``
    of the logits ``y``: the mask of elements ``near`` q, and for these ``log(m / q)`` and ``m / q - 1``. Both come from
    ``sum_k w_k (p_k / q - 1)`` and the logits' differences, which keep their digits. With LOGITS, ``m / q`` is known up
    to a factor for the row.
    """
    total = _sum_of_weights(weights, at_weight, weight_column, class_mask, mask_column, count, weight_stride,
                            mask_stride, column, mask, COMPUTE)  # fmt: skip
    peak = tl.full(mask.shape, float("-inf"), COMPUTE)
    sum_ = tl.zeros(mask.shape, COMPUTE)
    relative = tl.zeros(mask.shape, COMPUTE)
    far = tl.zeros(mask.shape, COMPUTE)
    if LOGITS:
        origin = tl.where(y == float("-inf"), 0.0, y)
    for k_ in range(count):
        k = tl.cast(k_, tl.int64)
        raw = _raw(weights, at_weight, weight_column, class_mask, mask_column, k, weight_stride, mask_stride, column,
                   mask, COMPUTE)  # fmt: skip
        share = share_of(raw, total, count)
        x = load_tile(teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, COMPUTE)
        if LOGITS:
            # here peak marks masked classes by 0
            gone = (share > 0) & (x == float("-inf"))
            peak = tl.where(gone, 0.0, peak)
            sum_ += tl.where((x == float("-inf")) | (share <= 0), 0.0, share * (x - origin))
        else:
            top, log_total = _statistics(tops, logs, row, valid, k, all_rows, LOG_PROBS, COMPUTE)
            log_p = (x - top[:, None]) * scale - log_total[:, None]
            log_p = tl.where(share > 0, log_p, float("-inf"))
            new = tl.maximum(peak, log_p)
            base = tl.where(new == float("-inf"), 0.0, new)
            sum_ = sum_ * tl.exp(peak - base) + tl.where(share > 0, share * tl.exp(log_p - base), 0.0)
            peak = new
            if RELATIVE:
                d = log_ratio_of(x, top, log_total, y, y_top, y_log, scale)
                near = tl.abs(d) < 0.5
                far = tl.where((share > 0) & ~near, 1.0, far)
                d = tl.where((share > 0) & near, d, 0.0)
                relative += share * (d + expm1_less(d, TERMS))
    # -inf where a teacher of positive share masks the class, or all probabilities are 0.
    if LOGITS:
        result = tl.where(peak == 0, float("-inf"), (origin + sum_) * scale)
        log_ratio = sum_ * scale
        near = (tl.abs(log_ratio) < 0.5) & (peak != 0) & (y != float("-inf"))
        relative = tl.where(near, log_ratio, 0.0)
        relative = relative + expm1_less(relative, TERMS)
    else:
        result = tl.where(sum_ == 0, float("-inf"), tl.log(tl.where(sum_ == 0, 1.0, sum_)) + peak)
        near = far == 0
        log_ratio = relative
        if RELATIVE:
            log_ratio = log1p(relative, TERMS)
    inside = (column < classes)[None, :]
    return tl.where(inside, result, float("-inf")), total, near & inside, log_ratio, relative


@triton.jit
def _divergence(mixed, near, log_ratio, p_top, p_log, gap, y, q_top, q_log, scale, TERMS: tl.constexpr):  # fmt: skip
    """Compute :func:`_pair` of the mixture and the student, where ``log_ratio`` minus ``gap`` is normalised."""
    log_p = (mixed - p_top[:, None]) - p_log[:, None]
    log_q = (y - q_top[:, None]) * scale - q_log[:, None]
    u = tl.where(near, gap[:, None] - log_ratio, log_q - log_p)
    return pair_of(log_p, log_q, u, TERMS)


@triton.jit(do_not_specialize=["temperature", "count_rows"])
def mixture_kernel(
    student, teachers, weights, class_mask, grad, tops, logs,
    to_student, to_teachers, to_weights, losses, total,
    temperature, count_rows, count, inner, classes, tiles, all_rows,
    student_outer, student_row, student_column, teacher_outer, teacher_row, teacher_column,
    weight_outer, weight_row, weight_column, grad_outer, grad_row, by_outer, by_row, by_column,
    teacher_stride, weight_stride, mask_stride, mask_column, by_stride,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, LOGITS: tl.constexpr, LOG_PROBS: tl.constexpr,
    BY_CLASS: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute KL(mixture || student), or its gradients."""
    program = tl.program_id(0)
    batch, inside, valid, row = rows_of(program, tiles, inner, ROWS)
    t = double_of(temperature, COMPUTE)
    scale = 1.0 / t
    at_student = batch * student_outer + inside * student_row
    at_teacher = batch * teacher_outer + inside * teacher_row
    at_weight = batch * weight_outer + inside * weight_row
    at_by = batch * by_outer + inside * by_row

    # normalisers of the student and of the mixture, whose sum is 1 + excess
    q_top, q_total = scan(
        student, at_student, student_column, valid, 0, classes, classes, scale, COMPUTE, ROWS, COLUMNS
    )
    q_log = tl.log(q_total)
    p_top = tl.full([ROWS], float("-inf"), COMPUTE)
    p_total = tl.zeros([ROWS], COMPUTE)
    excess = tl.zeros([ROWS], COMPUTE)
    for begin in range(0, classes, COLUMNS):
        column, mask = piece(begin, classes, valid, COLUMNS)
        y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
        mixed, _, near, _, relative = _mix(
            teachers, weights, class_mask, tops, logs, y, q_top, q_log, at_teacher, at_weight, row, valid, column,
            mask, classes, count, all_rows, scale, teacher_stride, teacher_column, weight_stride, weight_column,
            mask_stride, mask_column, COMPUTE, TERMS, LOGITS, LOG_PROBS, True,
        )  # fmt: skip
        new = tl.max(mixed, axis=1)
        base = tl.where(new == float("-inf"), 0.0, new)
        p_top, p_total = join(p_top, p_total, new, tl.sum(tl.exp(mixed - base[:, None]), axis=1), 1.0)
        q = tl.exp((y - q_top[:, None]) * scale - q_log[:, None])
        if LOGITS:
            mixed = (mixed - (q_top * scale)[:, None]) - q_log[:, None]
        excess += tl.sum(tl.where(near, q * relative, tl.exp(mixed) - q), axis=1)
    p_log = tl.log(p_total)
    # log(1 + excess), by log1p to keep the digits of a small excess
    small = tl.abs(excess) < 0.5
    gap = (p_top - q_top * scale) + (p_log - q_log) if LOGITS else p_top + p_log
    gap = tl.where(small, log1p(tl.where(small, excess, 0.0), TERMS), gap)

    value = tl.zeros([ROWS], COMPUTE)
    for begin in range(0, classes, COLUMNS):
        column, mask = piece(begin, classes, valid, COLUMNS)
        y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
        mixed, _, near, log_ratio, _ = _mix(
            teachers, weights, class_mask, tops, logs, y, q_top, q_log, at_teacher, at_weight, row, valid, column,
            mask, classes, count, all_rows, scale, teacher_stride, teacher_column, weight_stride, weight_column,
            mask_stride, mask_column, COMPUTE, TERMS, LOGITS, LOG_PROBS, True,
        )  # fmt: skip
        terms, _, _, _ = _divergence(mixed, near, log_ratio, p_top, p_log, gap, y, q_top, q_log, scale, TERMS)
        value += tl.sum(tl.where((column < classes)[None, :], terms, 0.0), axis=1)
    if losses is not None:
        tl.store(losses + row, narrow(t * t * value, losses), mask=valid)
    if total is not None:
        store_total(total, program, t * t * value, valid, count_rows, MEAN)

    # The mixture's tiles are computed again: memory holds one tile at a time.
    if to_student is not None or to_teachers is not None or to_weights is not None:
        factor = ones_or(grad, batch, inside, grad_outer, grad_row, valid, COMPUTE) / count_rows.to(COMPUTE)
        if to_student is not None:
            for begin in range(0, classes, COLUMNS):
                column, mask = piece(begin, classes, valid, COLUMNS)
                y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
                mixed, _, near, log_ratio, _ = _mix(
                    teachers, weights, class_mask, tops, logs, y, q_top, q_log, at_teacher, at_weight, row, valid,
                    column, mask, classes, count, all_rows, scale, teacher_stride, teacher_column, weight_stride,
                    weight_column, mask_stride, mask_column, COMPUTE, TERMS, LOGITS, LOG_PROBS, True,
                )  # fmt: skip
                _, by_y, _, _ = _divergence(mixed, near, log_ratio, p_top, p_log, gap, y, q_top, q_log, scale, TERMS)
                place = at_student[:, None] + (column * student_column)[None, :]
                by_y = (t * factor)[:, None] * by_y
                tl.store(to_student + place, narrow(by_y, to_student), mask=mask)
        if to_teachers is not None or to_weights is not None:
            for k_ in range(count):
                k = tl.cast(k_, tl.int64)
                # Stage 0 sums over the row: the softmax's correction and the weights' gradient. Stage 1 uses the sums.
                inner_sum = tl.zeros([ROWS], COMPUTE)
                by_weight = tl.zeros([ROWS], COMPUTE)
                used = tl.zeros([ROWS], COMPUTE)
                for stage in range(2):
                    for begin in range(0, classes, COLUMNS):
                        column, mask = piece(begin, classes, valid, COLUMNS)
                        y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
                        mixed, sum_of_weights, near, log_ratio, _ = _mix(
                            teachers, weights, class_mask, tops, logs, y, q_top, q_log, at_teacher, at_weight, row,
                            valid, column, mask, classes, count, all_rows, scale, teacher_stride, teacher_column,
                            weight_stride, weight_column, mask_stride, mask_column, COMPUTE, TERMS, LOGITS, LOG_PROBS,
                            True,
                        )  # fmt: skip
                        _, _, u, p = _divergence(
                            mixed, near, log_ratio, p_top, p_log, gap, y, q_top, q_log, scale, TERMS
                        )
                        by_mixed = (t * t * factor)[:, None] * tl.where(mask, _by_p(p, u, value), 0.0)
                        raw = _raw(weights, at_weight, weight_column, class_mask, mask_column, k, weight_stride,
                                   mask_stride, column, mask, COMPUTE)  # fmt: skip
                        share = share_of(raw, sum_of_weights, count)
                        x = load_tile(
                            teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, COMPUTE
                        )
                        counts = (share > 0) & mask & (x != float("-inf")) & (mixed != float("-inf"))
                        if LOGITS:
                            by_mixed = by_mixed * scale
                            by_share = tl.where(counts, x * by_mixed, 0.0)
                            by_x = tl.where(counts, share * by_mixed, 0.0)
                            back = tl.where(by_mixed == 0, 0.0, mixed * t * by_mixed)
                        else:
                            top, log_total = _statistics(tops, logs, row, valid, k, all_rows, LOG_PROBS, COMPUTE)
                            log_p = (x - top[:, None]) * scale - log_total[:, None]
                            ratio = tl.where(counts, tl.exp(log_p - mixed), 0.0)
                            by_share = ratio * by_mixed
                            by_x = share * by_share
                            back = by_mixed
                        present = (raw != 0) & (sum_of_weights != 0) & mask
                        if stage == 0:
                            inner_sum += tl.sum(by_x, axis=1)
                            used += tl.sum(tl.where((share > 0) & mask, 1.0, 0.0), axis=1)
                            by_weight += tl.sum(
                                tl.where(present, (by_share - back) / tl.where(present, sum_of_weights, 1.0), 0.0),
                                axis=1,
                            )
                        else:
                            if to_teachers is not None:
                                if not LOGITS and not LOG_PROBS:
                                    p_k = tl.exp(log_p)
                                    by_x = (by_x - p_k * inner_sum[:, None]) * scale
                                by_x = tl.where((used > 0)[:, None] & (x != float("-inf")), by_x, 0.0)
                                place = (at_teacher + k * teacher_stride)[:, None] + (column * teacher_column)[None, :]
                                tl.store(to_teachers + place, narrow(by_x, to_teachers), mask=mask)
                            if to_weights is not None and BY_CLASS:
                                place = (at_by + k * by_stride)[:, None] + (column * by_column)[None, :]
                                by_raw = (by_share - back) / tl.where(present, sum_of_weights, 1.0)
                                tl.store(to_weights + place, tl.where(present, by_raw, 0.0), mask=mask)
                if to_weights is not None and not BY_CLASS:
                    tl.store(to_weights + at_by + k * by_stride, by_weight, mask=valid)
