"""ensemble_kl at infinite temperature in Triton: the kernels; their launcher is in ensemble_limits.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fedkern.ops._core.triton.numbers import narrow
from fedkern.ops._distill.triton.limits import _difference, _half_variance, _mean
from fedkern.ops._distill.triton.members import _row_weight
from fedkern.ops._distill.triton.mixture import _mix, _raw, share_of
from fedkern.ops._distill.triton.rows import load_tile, ones_or, piece, rows_of, store_total


@triton.jit
def _mixed_difference(
    student, teachers, weights, class_mask, at_student, student_column, at_teacher, at_weight, row, valid, column, mask,
    classes, count, teacher_stride, teacher_column, weight_stride, weight_column, mask_stride, mask_column,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles: mixed logits minus the student's (0 where masked), the mask, the student's logits, sums of the weights."""
    y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
    none = tl.zeros([ROWS], COMPUTE)
    mixed, total, _, d, _ = _mix(
        teachers, weights, class_mask, None, None, y, none, none, at_teacher, at_weight, row, valid, column, mask,
        classes, count, 0, 1.0, teacher_stride, teacher_column, weight_stride, weight_column, mask_stride, mask_column,
        COMPUTE, 2, True, True, False,
    )  # fmt: skip
    real = mask & (mixed != float("-inf")) & (y != float("-inf"))
    return tl.where(real, d, 0.0), real, y, total


@triton.jit
def _over_sum(g, sum_of_weights):
    """The gradient ``g`` over the sum of the weights; 0 where the weights sum to 0."""
    none = sum_of_weights == 0
    return tl.where(none, 0.0, g / tl.where(none, 1.0, sum_of_weights))


@triton.jit
def _toward_weight(
    teachers, at_teacher, teacher_column, column, mask, classes, g, y, d, raw, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient by a teacher's weight per class; ``g``: the mixed logits' gradient over the sum of the weights."""
    x = load_tile(teachers, at_teacher, teacher_column, column, mask, classes, COMPUTE)
    return tl.where((raw != 0) & (g != 0), g * ((x - y) - d), 0.0)


@triton.jit(do_not_specialize=["count_rows"])
def mixture_limit_kernel(
    student, teachers, weights, class_mask, grad, to_student, to_teachers, to_weights, losses, total,
    count_rows, count, inner, classes, tiles,
    student_outer, student_row, student_column, teacher_outer, teacher_row, teacher_column,
    weight_outer, weight_row, weight_column, grad_outer, grad_row, by_outer, by_row, by_column,
    teacher_stride, weight_stride, mask_stride, mask_column, by_stride,
    COMPUTE: tl.constexpr, BY_CLASS: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Half the variance over classes of mixed logits minus the student's; arguments as in :func:`mixture_kernel`."""
    program = tl.program_id(0)
    batch, inside, valid, row = rows_of(program, tiles, inner, ROWS)
    at_student = batch * student_outer + inside * student_row
    at_teacher = batch * teacher_outer + inside * teacher_row
    at_weight = batch * weight_outer + inside * weight_row
    at_by = batch * by_outer + inside * by_row

    mean = tl.zeros([ROWS], COMPUTE)
    number = tl.zeros([ROWS], COMPUTE)
    for begin in range(0, classes, COLUMNS):
        column, mask = piece(begin, classes, valid, COLUMNS)
        d, real, _, _ = _mixed_difference(
            student, teachers, weights, class_mask, at_student, student_column, at_teacher, at_weight, row, valid,
            column, mask, classes, count, teacher_stride, teacher_column, weight_stride, weight_column, mask_stride,
            mask_column, COMPUTE, ROWS,
        )  # fmt: skip
        mean += tl.sum(d, axis=1)
        number += tl.sum(real.to(COMPUTE), axis=1)
    mean = mean / number
    if losses is not None or total is not None:
        squares = tl.zeros([ROWS], COMPUTE)
        for begin in range(0, classes, COLUMNS):
            column, mask = piece(begin, classes, valid, COLUMNS)
            d, real, _, _ = _mixed_difference(
                student, teachers, weights, class_mask, at_student, student_column, at_teacher, at_weight, row, valid,
                column, mask, classes, count, teacher_stride, teacher_column, weight_stride, weight_column, mask_stride,
                mask_column, COMPUTE, ROWS,
            )  # fmt: skip
            rest = tl.where(real, d - mean[:, None], 0.0)
            squares += tl.sum(rest * rest, axis=1)
        value = 0.5 * (squares / number)
        if losses is not None:
            tl.store(losses + row, narrow(value, losses), mask=valid)
        if total is not None:
            store_total(total, program, value, valid, count_rows, MEAN)

    if to_student is not None or to_teachers is not None or to_weights is not None:
        factor = ones_or(grad, batch, inside, grad_outer, grad_row, valid, COMPUTE) / (count_rows.to(COMPUTE) * number)
        BY_ROW: tl.constexpr = to_weights is not None and not BY_CLASS
        if to_student is not None or to_teachers is not None or BY_CLASS:
            for begin in range(0, classes, COLUMNS):
                column, mask = piece(begin, classes, valid, COLUMNS)
                d, real, y, sum_of_weights = _mixed_difference(
                    student, teachers, weights, class_mask, at_student, student_column, at_teacher, at_weight, row,
                    valid, column, mask, classes, count, teacher_stride, teacher_column, weight_stride, weight_column,
                    mask_stride, mask_column, COMPUTE, ROWS,
                )  # fmt: skip
                g = tl.where(real, factor[:, None] * (d - mean[:, None]), 0.0)
                if to_student is not None:
                    place = at_student[:, None] + (column * student_column)[None, :]
                    tl.store(to_student + place, narrow(-g, to_student), mask=mask)
                for k_ in range(count):
                    k = tl.cast(k_, tl.int64)
                    raw = _raw(weights, at_weight, weight_column, class_mask, mask_column, k, weight_stride,
                               mask_stride, column, mask, COMPUTE)  # fmt: skip
                    if to_teachers is not None:
                        place = (at_teacher + k * teacher_stride)[:, None] + (column * teacher_column)[None, :]
                        tl.store(
                            to_teachers + place,
                            narrow(share_of(raw, sum_of_weights, count) * g, to_teachers),
                            mask=mask,
                        )
                    if BY_CLASS:
                        each = _toward_weight(
                            teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes,
                            _over_sum(g, sum_of_weights), y, d, raw, COMPUTE,
                        )  # fmt: skip
                        place = (at_by + k * by_stride)[:, None] + (column * by_column)[None, :]
                        tl.store(to_weights + place, each, mask=mask)
        if BY_ROW:
            for k_ in range(count):
                k = tl.cast(k_, tl.int64)
                by_weight = tl.zeros([ROWS], COMPUTE)
                for begin in range(0, classes, COLUMNS):
                    column, mask = piece(begin, classes, valid, COLUMNS)
                    d, real, y, sum_of_weights = _mixed_difference(
                        student, teachers, weights, class_mask, at_student, student_column, at_teacher, at_weight, row,
                        valid, column, mask, classes, count, teacher_stride, teacher_column, weight_stride,
                        weight_column, mask_stride, mask_column, COMPUTE, ROWS,
                    )  # fmt: skip
                    g = _over_sum(tl.where(real, factor[:, None] * (d - mean[:, None]), 0.0), sum_of_weights)
                    raw = _raw(weights, at_weight, weight_column, class_mask, mask_column, k, weight_stride,
                               mask_stride, column, mask, COMPUTE)  # fmt: skip
                    each = _toward_weight(
                        teachers, at_teacher + k * teacher_stride, teacher_column, column, mask, classes, g, y, d,
                        raw, COMPUTE,
                    )  # fmt: skip
                    by_weight += tl.sum(each, axis=1)
                tl.store(to_weights + at_by + k * by_stride, by_weight, mask=valid)


@triton.jit
def members_limit_kernel(
    student, teachers, means, numbers, halves, inner, classes, tiles, groups, all_rows,
    student_outer, student_row, student_column, stride, outer_stride, row_stride, class_stride,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each teacher minus the student over classes unmasked in both: mean, number, half the variance; ``[K, rows]``."""
    program = tl.program_id(0)
    k, group = (program // groups).to(tl.int64), (program % groups).to(tl.int64)
    batch, inside, valid, _ = rows_of(group, tiles, inner, ROWS)
    at_teacher = k * stride + batch * outer_stride + inside * row_stride
    at_student = batch * student_outer + inside * student_row
    mean, number = _mean(
        teachers, student, at_teacher, at_student, class_stride, student_column, valid, classes, COMPUTE, ROWS, COLUMNS
    )
    half = _half_variance(
        teachers, student, at_teacher, at_student, class_stride, student_column, valid, classes, mean, number, COMPUTE,
        ROWS, COLUMNS,
    )  # fmt: skip
    place = k * all_rows + batch * inner + inside
    tl.store(means + place, mean, mask=valid)
    tl.store(numbers + place, number, mask=valid)
    tl.store(halves + place, half, mask=valid)


@triton.jit(do_not_specialize=["count_rows"])
def mean_limit_kernel(
    student, teachers, weights, grad, means, numbers, halves, to_student, to_teachers, to_weights, losses, total,
    count_rows, count, inner, classes, tiles, all_rows,
    student_outer, student_row, student_column, teacher_outer, teacher_row, teacher_column,
    weight_outer, weight_row, grad_outer, grad_row, by_outer, by_row, teacher_stride, weight_stride, by_stride,
    COMPUTE: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weighted mean of the half variances from :func:`members_limit_kernel`, and its gradients."""
    program = tl.program_id(0)
    batch, inside, valid, row = rows_of(program, tiles, inner, ROWS)
    at_student = batch * student_outer + inside * student_row
    at_teacher = batch * teacher_outer + inside * teacher_row
    at_weight = batch * weight_outer + inside * weight_row

    whole = tl.zeros([ROWS], COMPUTE)
    for k_ in range(count):
        whole += _row_weight(weights, at_weight, tl.cast(k_, tl.int64), weight_stride, valid, COMPUTE, ROWS)
    value = tl.zeros([ROWS], COMPUTE)
    for k_ in range(count):
        k = tl.cast(k_, tl.int64)
        share = share_of(_row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS), whole, count)
        half = tl.load(halves + k * all_rows + row, mask=valid, other=0)
        value += tl.where(share == 0, 0.0, share * half)
    if losses is not None:
        tl.store(losses + row, narrow(value, losses), mask=valid)
    if total is not None:
        store_total(total, program, value, valid, count_rows, MEAN)

    factor = ones_or(grad, batch, inside, grad_outer, grad_row, valid, COMPUTE) / count_rows.to(COMPUTE)
    if to_student is not None or to_teachers is not None:
        for begin in range(0, classes, COLUMNS):
            column, mask = piece(begin, classes, valid, COLUMNS)
            by_student = tl.zeros([ROWS, COLUMNS], COMPUTE)
            for k_ in range(count):
                k = tl.cast(k_, tl.int64)
                share = share_of(_row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS), whole, count)
                mean = tl.load(means + k * all_rows + row, mask=valid, other=0)
                number = tl.load(numbers + k * all_rows + row, mask=valid, other=1)
                at = at_teacher + k * teacher_stride
                d, real = _difference(
                    teachers, student, at, at_student, teacher_column, student_column, column, mask, classes, COMPUTE
                )
                by_x = (share * factor)[:, None] * ((d - mean[:, None]) / number[:, None])
                by_x = tl.where(real & (share != 0)[:, None], by_x, 0.0)
                by_student -= by_x
                if to_teachers is not None:
                    place = at[:, None] + (column * teacher_column)[None, :]
                    tl.store(to_teachers + place, narrow(by_x, to_teachers), mask=mask)
            if to_student is not None:
                place = at_student[:, None] + (column * student_column)[None, :]
                tl.store(to_student + place, narrow(by_student, to_student), mask=mask)
    if to_weights is not None:
        at_by = batch * by_outer + inside * by_row
        for k_ in range(count):
            k = tl.cast(k_, tl.int64)
            raw = _row_weight(weights, at_weight, k, weight_stride, valid, COMPUTE, ROWS)
            half = tl.load(halves + k * all_rows + row, mask=valid, other=0)
            present = (raw != 0) & (whole != 0)
            by_weight = tl.where(present, factor * (half - value) / tl.where(present, whole, 1.0), 0.0)
            tl.store(to_weights + at_by + k * by_stride, by_weight, mask=valid)
