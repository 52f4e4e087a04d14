"""js_div, consensus and ensemble_kl's mean of divergences in Triton: each teacher against one row, summed up."""

import triton
import triton.language as tl

from fedkern.ops._core.triton.numbers import double_of, narrow
from fedkern.ops._distill.triton.losses import _by_p, _pair, log_ratio_of, pair_of
from fedkern.ops._distill.triton.mixture import _mix, _statistics, share_of
from fedkern.ops._distill.triton.rows import load_tile, ones_or, piece, rows_of, scan, store_total


@triton.jit
def _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE: tl.constexpr, ROWS: tl.constexpr):
    raw = tl.zeros([ROWS], COMPUTE) + 1.0
    if weights is not None:
        raw = tl.load(weights + k * weight_stride + at_weight, mask=valid, other=0).to(COMPUTE)
    return raw


@triton.jit
def _target_tile(
    student, teachers, weights, tops, logs, anchor, a_top, a_log, at_student, student_column, at_teacher, at_weight,
    row, valid, column, mask, classes, count, all_rows, scale, teacher_stride, teacher_column, weight_stride,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, LOG_PROBS: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return the tile that the teachers are compared with: the student's logits, or the mixture's log-probabilities.

    RELATIVE: also the logits of each row's anchor (a teacher), and the mixture relative to the anchor (:func:`_mix`).
    """
    if student is not None:
        target = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
        a, near, log_ratio = target, mask, target
    else:
        a = tl.zeros(mask.shape, COMPUTE)
        if RELATIVE:
            a = load_tile(
                teachers, at_teacher + anchor * teacher_stride, teacher_column, column, mask, classes, COMPUTE
            )
        target, _, near, log_ratio, _ = _mix(
            teachers, weights, None, tops, logs, a, a_top, a_log, at_teacher, at_weight, row, valid, column, mask,
            classes, count, all_rows, scale, teacher_stride, teacher_column, weight_stride, 0, 0, 0,
            COMPUTE, TERMS, False, LOG_PROBS, RELATIVE,
        )  # fmt: skip
    return target, a, near, log_ratio


@triton.jit
def _against(
    x, tops, logs, row, valid, k, all_rows, scale, target, target_top, target_log, a, a_top, a_log, near, log_ratio,
    COMPUTE: tl.constexpr, LOG_PROBS: tl.constexpr, TERMS: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return :func:`_pair` of teacher k and the tile of :func:`_target_tile`, and the teacher's log-probabilities."""
    top, log_total = _statistics(tops, logs, row, valid, k, all_rows, LOG_PROBS, COMPUTE)
    log_p = (x - top[:, None]) * scale - log_total[:, None]
    if RELATIVE:
        u = tl.where(near, log_ratio - log_ratio_of(x, top, log_total, a, a_top, a_log, scale), target - log_p)
        terms, by_target, u, p = pair_of(log_p, target, u, TERMS)
    else:
        terms, by_target, u, p = _pair(x, top, log_total, target, target_top, target_log, scale, TERMS)
    return terms, by_target, u, p, log_p


@triton.jit(do_not_specialize=["temperature", "count_rows", "bound"])
def stack_kernel(
    student, teachers, weights, grad, more_grad, tops, logs,
    to_student, to_teachers, to_weights, losses, more_losses, total, more_total,
    temperature, count_rows, bound, count, inner, classes, tiles, all_rows,
    student_outer, student_row, student_column, teacher_outer, teacher_row, teacher_column,
    weight_outer, weight_row, grad_outer, grad_row, more_outer, more_row, by_outer, by_row,
    teacher_stride, weight_stride, by_stride,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, CONSENSUS: tl.constexpr, LOG_PROBS: tl.constexpr,
    MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute ``sum_k w_k KL(p_k || q)``, q the student's softmax or, without a student (js_div), the p_k's mixture.

    CONSENSUS: instead the entropy of the mixture, and the weighted mean of the entropies (``more_...``).
    """
    program = tl.program_id(0)
    batch, inside, valid, row = rows_of(program, tiles, inner, ROWS)
    t = double_of(temperature, COMPUTE)
    scale = 1.0 / t
    at_student = batch * student_outer + inside * student_row
    at_teacher = batch * teacher_outer + inside * teacher_row
    at_weight = batch * weight_outer + inside * weight_row
    at_by = batch * by_outer + inside * by_row

    # Normalisers of the weights and of the student.
    weight_sum = tl.zeros([ROWS], COMPUTE)
    for k_ in range(count):
        weight_sum += _row_weight(weights, at_weight, tl.cast(k_, tl.int64), weight_stride, valid, COMPUTE, ROWS)
    q_top = tl.zeros([ROWS], COMPUTE)
    q_log = tl.zeros([ROWS], COMPUTE)
    if student is not None:
        q_top, q_total = scan(
            student, at_student, student_column, valid, 0, classes, classes, scale, COMPUTE, ROWS, COLUMNS
        )
        q_log = tl.log(q_total)
    # The mixture is computed relative to the anchor: the first teacher whose weight is not 0.
    anchor = tl.zeros([ROWS], tl.int64)
    for k_ in range(count):
        k = tl.cast(count - 1 - k_, tl.int64)
        raw = _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS)
        anchor = tl.where(raw != 0, k, anchor)
    is_relative: tl.constexpr = student is None and not CONSENSUS
    a_top, a_log = _statistics(tops, logs, row, valid, anchor, all_rows, LOG_PROBS, COMPUTE)

    # the rows' losses, which the weights' gradients need too
    value = tl.zeros([ROWS], COMPUTE)
    mixed_value = tl.zeros([ROWS], COMPUTE)
    if losses is not None or total is not None or to_weights is not None:
        for begin in range(0, classes, COLUMNS):
            column, mask = piece(begin, classes, valid, COLUMNS)
            target, a, near, log_ratio = _target_tile(
                student, teachers, weights, tops, logs, anchor, a_top, a_log, at_student, student_column, at_teacher,
                at_weight, row, valid, column, mask, classes, count, all_rows, scale, teacher_stride, teacher_column,
                weight_stride, COMPUTE, TERMS, LOG_PROBS, is_relative,
            )  # fmt: skip
            if CONSENSUS:
                part = tl.where(target == float("-inf"), 0.0, -tl.exp(target) * target)
                mixed_value += tl.sum(part, axis=1)
            for k_ in range(count):
                k = tl.cast(k_, tl.int64)
                raw = _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS)
                share = share_of(raw, weight_sum, count)
                x = load_tile(teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, COMPUTE)
                terms, _, _, p, log_p = _against(
                    x, tops, logs, row, valid, k, all_rows, scale, target, q_top, q_log, a, a_top, a_log, near,
                    log_ratio, COMPUTE, LOG_PROBS, TERMS, is_relative,
                )  # fmt: skip
                if CONSENSUS:
                    terms = -p * tl.where(log_p == float("-inf"), 0.0, log_p)
                terms = tl.where((column < classes)[None, :], terms, 0.0)
                value += tl.where(share == 0, 0.0, share * tl.sum(terms, axis=1))
    factor = ones_or(grad, batch, inside, grad_outer, grad_row, valid, COMPUTE) / count_rows.to(COMPUTE)
    more_factor = tl.zeros([ROWS], COMPUTE)
    if CONSENSUS:
        first_value, second_value = mixed_value, value
        if more_grad is not None:
            at_more = batch * more_outer + inside * more_row
            more_factor += tl.load(more_grad + at_more, mask=valid, other=0).to(COMPUTE) / count_rows.to(COMPUTE)
    else:
        first_value, second_value = t * t * value, value
        limit = double_of(bound, COMPUTE)
        first_value = tl.where(first_value > limit, limit, first_value)
    if losses is not None:
        tl.store(losses + row, narrow(first_value, losses), mask=valid)
    if more_losses is not None:
        tl.store(more_losses + row, narrow(second_value, more_losses), mask=valid)
    if total is not None:
        store_total(total, program, first_value, valid, count_rows, MEAN)
    if more_total is not None:
        store_total(more_total, program, second_value, valid, count_rows, MEAN)

    if to_student is not None:
        # Given log-probabilities are not normalised: the probabilities need not sum to 1.
        excess = tl.zeros([ROWS], COMPUTE)
        if LOG_PROBS:
            for k_ in range(count):
                k = tl.cast(k_, tl.int64)
                raw = _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS)
                share = share_of(raw, weight_sum, count)
                mass = tl.zeros([ROWS], COMPUTE) - 1.0
                for begin in range(0, classes, COLUMNS):
                    column, mask = piece(begin, classes, valid, COLUMNS)
                    x = load_tile(
                        teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, COMPUTE
                    )
                    mass += tl.sum(tl.exp(x), axis=1)
                excess += tl.where(share == 0, 0.0, share * mass)
        for begin in range(0, classes, COLUMNS):
            column, mask = piece(begin, classes, valid, COLUMNS)
            target, a, near, log_ratio = _target_tile(
                student, teachers, weights, tops, logs, anchor, a_top, a_log, at_student, student_column, at_teacher,
                at_weight, row, valid, column, mask, classes, count, all_rows, scale, teacher_stride, teacher_column,
                weight_stride, COMPUTE, TERMS, LOG_PROBS, is_relative,
            )  # fmt: skip
            sum_ = tl.zeros([ROWS, COLUMNS], COMPUTE)
            if LOG_PROBS:
                sum_ += excess[:, None] * tl.exp((target - q_top[:, None]) * scale - q_log[:, None])
            for k_ in range(count):
                k = tl.cast(k_, tl.int64)
                raw = _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS)
                share = share_of(raw, weight_sum, count)[:, None]
                x = load_tile(teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, COMPUTE)
                _, by_target, _, _, _ = _against(
                    x, tops, logs, row, valid, k, all_rows, scale, target, q_top, q_log, a, a_top, a_log, near,
                    log_ratio, COMPUTE, LOG_PROBS, TERMS, is_relative,
                )  # fmt: skip
                sum_ += tl.where(share == 0, 0.0, share * by_target)
            place = at_student[:, None] + (column * student_column)[None, :]
            tl.store(to_student + place, narrow((t * factor)[:, None] * sum_, to_student), mask=mask)

    # Stage 0 sums over the row, for the softmax's correction and the weights; stage 1 uses the sums.
    if to_teachers is not None or to_weights is not None:
        for k_ in range(count):
            k = tl.cast(k_, tl.int64)
            raw = _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS)
            share = share_of(raw, weight_sum, count)
            teacher_value = tl.zeros([ROWS], COMPUTE)  # this teacher's divergence or entropy
            cross = tl.zeros([ROWS], COMPUTE)  # this teacher's mean of -log mixture
            for stage in range(2):
                for begin in range(0, classes, COLUMNS):
                    column, mask = piece(begin, classes, valid, COLUMNS)
                    target, a, near, log_ratio = _target_tile(
                        student, teachers, weights, tops, logs, anchor, a_top, a_log, at_student, student_column,
                        at_teacher, at_weight, row, valid, column, mask, classes, count, all_rows, scale,
                        teacher_stride, teacher_column, weight_stride, COMPUTE, TERMS, LOG_PROBS, is_relative,
                    )  # fmt: skip
                    x = load_tile(
                        teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, COMPUTE
                    )
                    terms, _, u, p, log_p = _against(
                        x, tops, logs, row, valid, k, all_rows, scale, target, q_top, q_log, a, a_top, a_log, near,
                        log_ratio, COMPUTE, LOG_PROBS, TERMS, is_relative,
                    )  # fmt: skip
                    surprise = tl.where(p == 0, 0.0, -log_p)
                    mixed_surprise = tl.where((p == 0) | (target == float("-inf")), 0.0, -target)
                    if stage == 0:
                        if CONSENSUS:
                            teacher_value += tl.sum(tl.where(mask, p * surprise, 0.0), axis=1)
                            cross += tl.sum(tl.where(mask, p * mixed_surprise, 0.0), axis=1)
                        else:
                            teacher_value += tl.sum(tl.where(mask, terms, 0.0), axis=1)
                    elif to_teachers is not None:
                        by_share = (share * t)[:, None]
                        if CONSENSUS:
                            by_x = factor[:, None] * p * (mixed_surprise - cross[:, None])
                            by_x += more_factor[:, None] * p * (surprise - teacher_value[:, None])
                        elif LOG_PROBS:
                            by_x = factor[:, None] * _by_p(p, u, tl.zeros_like(teacher_value))
                        else:
                            by_x = factor[:, None] * _by_p(p, u, teacher_value)
                        by_x = tl.where((share == 0)[:, None], 0.0, by_share * by_x)
                        place = (at_teacher + k * teacher_stride)[:, None] + (column * teacher_column)[None, :]
                        tl.store(to_teachers + place, narrow(by_x, to_teachers), mask=mask)
            if to_weights is not None:
                if CONSENSUS:
                    by_weight = factor * (cross - mixed_value) + more_factor * (teacher_value - value)
                else:
                    by_weight = factor * t * t * (teacher_value - value)
                present = (raw != 0) & (weight_sum != 0)
                by_weight = tl.where(present, by_weight / tl.where(present, weight_sum, 1.0), 0.0)
                tl.store(to_weights + at_by + k * by_stride, by_weight, mask=valid)
