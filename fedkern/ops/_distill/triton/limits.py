"""More row kernels in Triton: entropy, and the divergences at infinite temperature."""

from __future__ import annotations

import triton
import triton.language as tl

from fedkern.ops._core.triton.numbers import narrow
from fedkern.ops._distill.triton.rows import gather, load_tile, ones_or, piece, rows_of, scan, softmax_of, store_total


@triton.jit(do_not_specialize=["count"])
def entropy_kernel(
    logits, grad, to_logits, losses, total, tops, totals, values,
    count, inner, classes, tiles, splits, span,
    outer_stride, row_stride, class_stride, grad_outer, grad_row,
    COMPUTE: tl.constexpr, MEAN: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``-sum p log p`` of rows, or its gradient; arguments as in :func:`divergence_kernel`."""
    program = tl.program_id(0)
    split = program % splits
    batch, inside, valid, row = rows_of((program // splits).to(tl.int64), tiles, inner, ROWS)
    offset = batch * outer_stride + inside * row_stride
    first = split * span
    last = tl.minimum(first + span, classes)
    column, mask = piece(first, last, valid, COLUMNS)
    if WHOLE:
        x = load_tile(logits, offset, class_stride, column, mask, classes, COMPUTE)
        top, log_total = softmax_of(x, 1.0)
    elif tops is not None:
        top, log_total = gather(tops, totals, row, valid, splits, 1.0, SPLITS)
    else:
        top, sum_ = scan(logits, offset, class_stride, valid, 0, classes, classes, 1.0, COMPUTE, ROWS, COLUMNS)
        log_total = tl.log(sum_)
    value = tl.zeros([ROWS], COMPUTE)
    if values is not None:
        value = tl.load(values + row, mask=valid, other=0)
    else:
        for begin in range(first, last, COLUMNS):
            if not WHOLE:
                column, mask = piece(begin, last, valid, COLUMNS)
                x = load_tile(logits, offset, class_stride, column, mask, classes, COMPUTE)
            log_p = (x - top[:, None]) - log_total[:, None]
            term = tl.exp(log_p) * tl.where(log_p == float("-inf"), 0.0, log_p)
            value -= tl.sum(tl.where((column < last)[None, :], term, 0.0), axis=1)
        if losses is not None:
            tl.store(losses + row * splits + split, narrow(value, losses), mask=valid)
        if total is not None:
            store_total(total, program, value, valid, count, MEAN)
    if to_logits is not None:
        factor = ones_or(grad, batch, inside, grad_outer, grad_row, valid, COMPUTE) / count.to(COMPUTE)
        for begin in range(first, last, COLUMNS):
            if not WHOLE:
                column, mask = piece(begin, last, valid, COLUMNS)
                x = load_tile(logits, offset, class_stride, column, mask, classes, COMPUTE)
            log_p = (x - top[:, None]) - log_total[:, None]
            by_x = tl.where(log_p == float("-inf"), 0.0, -tl.exp(log_p) * (log_p + value[:, None]))
            place = offset[:, None] + (column * class_stride)[None, :]
            tl.store(to_logits + place, narrow(factor[:, None] * by_x, to_logits), mask=mask)


@triton.jit
def _difference(teacher, student, at_teacher, at_student, teacher_column, student_column, column, mask, classes,
                COMPUTE: tl.constexpr):  # fmt: skip
    """Teacher minus student where neither is masked, else 0; and the mask of these places."""
    x = load_tile(teacher, at_teacher, teacher_column, column, mask, classes, COMPUTE)
    y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
    real = (x != float("-inf")) & (y != float("-inf"))
    return tl.where(real, x, 0.0) - tl.where(real, y, 0.0), real


@triton.jit
def _mean(teacher, student, at_teacher, at_student, teacher_column, student_column, valid, classes,
          COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    total = tl.zeros([ROWS], COMPUTE)
    number = tl.zeros([ROWS], COMPUTE)
    for begin in range(0, classes, COLUMNS):
        column, mask = piece(begin, classes, valid, COLUMNS)
        d, real = _difference(
            teacher, student, at_teacher, at_student, teacher_column, student_column, column, mask, classes, COMPUTE
        )
        total += tl.sum(d, axis=1)
        number += tl.sum(real.to(COMPUTE), axis=1)
    return total / number, number


@triton.jit
def _half_variance(teacher, student, at_teacher, at_student, teacher_column, student_column, valid, classes, mean,
                   number, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    squares = tl.zeros([ROWS], COMPUTE)
    for begin in range(0, classes, COLUMNS):
        column, mask = piece(begin, classes, valid, COLUMNS)
        d, real = _difference(
            teacher, student, at_teacher, at_student, teacher_column, student_column, column, mask, classes, COMPUTE
        )
        deviation = tl.where(real, d - mean[:, None], 0.0)
        squares += tl.sum(deviation * deviation, axis=1)
    return 0.5 * (squares / number)


@triton.jit(do_not_specialize=["count"])
def limit_kernel(
    teacher, student, other, weight, grad,
    to_teacher, to_student, to_other, losses, raw, total,
    count, inner, classes, tiles,
    teacher_outer, teacher_row, teacher_column, student_outer, student_row, student_column,
    other_outer, other_row, other_column, weight_outer, weight_row, grad_outer, grad_row,
    COMPUTE: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Half the variance over classes of teacher minus student; arguments as in :func:`divergence_kernel`."""
    program = tl.program_id(0)
    batch, inside, valid, row = rows_of(program, tiles, inner, ROWS)
    at_teacher = batch * teacher_outer + inside * teacher_row
    at_student = batch * student_outer + inside * student_row
    at_other = batch * other_outer + inside * other_row
    by_row = ones_or(weight, batch, inside, weight_outer, weight_row, valid, COMPUTE)
    kept = valid & (by_row != 0)
    one, one_number = _mean(
        teacher, student, at_teacher, at_student, teacher_column, student_column, valid, classes, COMPUTE, ROWS, COLUMNS
    )
    if other is not None:
        two, two_number = _mean(
            teacher, other, at_teacher, at_other, teacher_column, other_column, valid, classes, COMPUTE, ROWS, COLUMNS
        )
    if losses is not None or raw is not None or total is not None:
        loss = _half_variance(
            teacher, student, at_teacher, at_student, teacher_column, student_column, valid, classes, one, one_number,
            COMPUTE, ROWS, COLUMNS,
        )  # fmt: skip
        if other is not None:
            loss += _half_variance(
                teacher, other, at_teacher, at_other, teacher_column, other_column, valid, classes, two, two_number,
                COMPUTE, ROWS, COLUMNS,
            )  # fmt: skip
        if raw is not None:
            tl.store(raw + row, tl.where(kept, loss, 0.0), mask=valid)
        loss = tl.where(kept, loss * by_row, 0.0)
        if losses is not None:
            tl.store(losses + row, narrow(loss, losses), mask=valid)
        if total is not None:
            store_total(total, program, loss, valid, count, MEAN)
    if to_teacher is not None or to_student is not None or to_other is not None:
        factor = by_row / count.to(COMPUTE)
        if grad is not None:
            factor = factor * tl.load(grad + batch * grad_outer + inside * grad_row, mask=valid, other=0).to(COMPUTE)
        factor = factor[:, None]
        kept_ = kept[:, None]
        for begin in range(0, classes, COLUMNS):
            column, mask = piece(begin, classes, valid, COLUMNS)
            d, real = _difference(
                teacher, student, at_teacher, at_student, teacher_column, student_column, column, mask, classes, COMPUTE
            )
            by_teacher = tl.where(real & kept_, factor * ((d - one[:, None]) / one_number[:, None]), 0.0)
            if to_student is not None:
                place = at_student[:, None] + (column * student_column)[None, :]
                tl.store(to_student + place, narrow(-by_teacher, to_student), mask=mask)
            if other is not None:
                d, real = _difference(
                    teacher, other, at_teacher, at_other, teacher_column, other_column, column, mask, classes, COMPUTE
                )
                more = tl.where(real & kept_, factor * ((d - two[:, None]) / two_number[:, None]), 0.0)
                by_teacher += more
                if to_other is not None:
                    place = at_other[:, None] + (column * other_column)[None, :]
                    tl.store(to_other + place, narrow(-more, to_other), mask=mask)
            if to_teacher is not None:
                place = at_teacher[:, None] + (column * teacher_column)[None, :]
                tl.store(to_teacher + place, narrow(by_teacher, to_teacher), mask=mask)
