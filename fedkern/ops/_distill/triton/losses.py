"""kl_div, dual_kl and entropy in Triton: the kernels, launched by distill.py."""

import triton
import triton.language as tl

from fedkern.ops._core.triton.numbers import double_of, narrow
from fedkern.ops._distill.triton.rows import (
    expm1_less,
    gather,
    load_tile,
    ones_or,
    piece,
    rows_of,
    scan,
    softmax_of,
    store_total,
)


@triton.jit
def _pair(x, x_top, x_log, y, y_top, y_log, scale, TERMS: tl.constexpr):
    """Compute KL(p || q) for the logits x of p and y of q, class by class: ``p (e^u - 1 - u)``, ``u = log q - log p``.

    No term is negative, and nothing cancels between nearly equal rows. An error e in the sums of exponentials changes
    the divergence only by e^2, since ``sum p (e^u - 1)`` vanishes.

    Returns the terms, ``q - p`` (the derivative by y), and u and p for :func:`_by_p` (the derivative by x).
    """
    log_p = (x - x_top[:, None]) * scale - x_log[:, None]
    log_q = (y - y_top[:, None]) * scale - y_log[:, None]
    return pair_of(log_p, log_q, log_ratio_of(y, y_top, y_log, x, x_top, x_log, scale), TERMS)


@triton.jit
def log_ratio_of(y, y_top, y_log, x, x_top, x_log, scale):
    """Compute ``log q - log p`` from the logits' difference, which keeps its digits between nearly equal rows.

    Of distant rows, the row with the larger maximum is first moved by a multiple of 8, which is exact.
    """
    distance = y_top - x_top
    move = tl.where(tl.abs(distance) < 1e30, tl.floor(distance * 0.125 + 0.5) * 8, 0.0)
    moves_y = tl.abs(x_top) < tl.abs(y_top)
    from_y, from_x = tl.where(moves_y, move, 0.0), tl.where(moves_y, 0.0, -move)
    delta = (y - from_y[:, None]) - (x - from_x[:, None])
    return (delta - ((y_top - from_y) - (x_top - from_x))[:, None]) * scale - (y_log - x_log)[:, None]


@triton.jit
def pair_of(log_p, log_q, u, TERMS: tl.constexpr):
    """Compute :func:`_pair` from log-probabilities and their difference ``u``."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    masked = p == 0  # q alone counts, whatever u is
    u = tl.where(masked, 0.0, u)
    near = tl.abs(u) < 0.5
    v = tl.where(near, u, 0.0)
    remainder = expm1_less(v, TERMS)
    far = q - p - tl.where(near, 0.0, p * u)
    terms = tl.where(masked, q, tl.where(near, p * remainder, far))
    by_y = tl.where(near & ~masked, p * (remainder + v), q - p)
    return terms, by_y, u, p


@triton.jit
def _by_p(p, u, value):
    """Return the derivative by the logits of p."""
    return tl.where(p == 0, 0.0, -p * (u + value[:, None]))


@triton.jit(do_not_specialize=["temperature", "count"])
def divergence_kernel(
    teacher, student, peer, weight, grad,
    to_teacher, to_student, to_peer, losses, raw, total,
    tops, totals, values,
    temperature, count, inner, classes, tiles, splits, span, all_rows,
    teacher_outer, teacher_row, teacher_column, student_outer, student_row, student_column,
    peer_outer, peer_row, peer_column, weight_outer, weight_row, grad_outer, grad_row,
    COMPUTE: tl.constexpr, TERMS: tl.constexpr, REVERSE: tl.constexpr, MEAN: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Compute the losses of rows and the gradients that are not None.

    ``losses`` and ``raw`` take the weighted and unweighted losses of each row's part, ``total`` the fp64 sum of the
    program's weighted losses, over ``count`` if MEAN. For rows in several parts (``splits``), ``tops`` and ``totals``
    come from :func:`statistics_kernel`, for teacher, student and peer, and ``values`` are the rows' divergences.
    """
    program = tl.program_id(0)
    split = program % splits
    batch, inside, valid, row = rows_of((program // splits).to(tl.int64), tiles, inner, ROWS)
    t = double_of(temperature, COMPUTE)
    scale = 1.0 / t
    at_teacher = batch * teacher_outer + inside * teacher_row
    at_student = batch * student_outer + inside * student_row
    at_peer = batch * peer_outer + inside * peer_row
    start = split * span
    last = tl.minimum(start + span, classes)

    # Normalisers of all softmaxes: of rows held whole, of parts, or by a scan.
    column, mask = piece(start, last, valid, COLUMNS)
    if WHOLE:
        x = load_tile(teacher, at_teacher, teacher_column, column, mask, classes, COMPUTE)
        y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
        x_top, x_log = softmax_of(x, scale)
        y_top, y_log = softmax_of(y, scale)
        if peer is not None:
            z = load_tile(peer, at_peer, peer_column, column, mask, classes, COMPUTE)
            z_top, z_log = softmax_of(z, scale)
    elif tops is not None:
        x_top, x_log = gather(tops, totals, row, valid, splits, scale, SPLITS)
        part = tl.cast(all_rows, tl.int64) * splits
        y_top, y_log = gather(tops + part, totals + part, row, valid, splits, scale, SPLITS)
        if peer is not None:
            z_top, z_log = gather(tops + 2 * part, totals + 2 * part, row, valid, splits, scale, SPLITS)
    else:
        x_top, x_total = scan(
            teacher, at_teacher, teacher_column, valid, 0, classes, classes, scale, COMPUTE, ROWS, COLUMNS
        )
        y_top, y_total = scan(
            student, at_student, student_column, valid, 0, classes, classes, scale, COMPUTE, ROWS, COLUMNS
        )
        x_log, y_log = tl.log(x_total), tl.log(y_total)
        if peer is not None:
            z_top, z_total = scan(peer, at_peer, peer_column, valid, 0, classes, classes, scale, COMPUTE, ROWS, COLUMNS)
            z_log = tl.log(z_total)

    by_row = ones_or(weight, batch, inside, weight_outer, weight_row, valid, COMPUTE)
    row_mask = valid & (by_row != 0)

    # the divergence of each row: to the student and, in two-student calls, to the peer
    student_value = tl.zeros([ROWS], COMPUTE)
    peer_value = tl.zeros([ROWS], COMPUTE)
    if values is not None:
        student_value = tl.load(values + row, mask=valid, other=0)
        peer_value = tl.load(values + all_rows + row, mask=valid & (peer is not None), other=0)
    elif (
        losses is not None
        or raw is not None
        or total is not None
        or (to_teacher is not None and not REVERSE)
        or ((to_student is not None or to_peer is not None) and REVERSE)
    ):
        for begin in range(start, last, COLUMNS):
            if not WHOLE:
                column, mask = piece(begin, last, valid, COLUMNS)
                x = load_tile(teacher, at_teacher, teacher_column, column, mask, classes, COMPUTE)
                y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
            if REVERSE:
                terms, _, _, _ = _pair(y, y_top, y_log, x, x_top, x_log, scale, TERMS)
            else:
                terms, _, _, _ = _pair(x, x_top, x_log, y, y_top, y_log, scale, TERMS)
            student_value += tl.sum(tl.where((column < last)[None, :], terms, 0.0), axis=1)
            if peer is not None:
                if not WHOLE:
                    z = load_tile(peer, at_peer, peer_column, column, mask, classes, COMPUTE)
                if REVERSE:
                    terms, _, _, _ = _pair(z, z_top, z_log, x, x_top, x_log, scale, TERMS)
                else:
                    terms, _, _, _ = _pair(x, x_top, x_log, z, z_top, z_log, scale, TERMS)
                peer_value += tl.sum(tl.where((column < last)[None, :], terms, 0.0), axis=1)
        loss = t * t * (student_value + peer_value)
        if raw is not None:
            tl.store(raw + row * splits + split, tl.where(row_mask, loss, 0.0), mask=valid)
        loss = tl.where(row_mask, loss * by_row, 0.0)
        if losses is not None:
            tl.store(losses + row * splits + split, narrow(loss, losses), mask=valid)
        if total is not None:
            store_total(total, program, loss, valid, count, MEAN)

    # Gradients: T² cancels one 1 / T of the logits' scale, which leaves T.
    if to_teacher is not None or to_student is not None or to_peer is not None:
        factor = by_row * t / count.to(COMPUTE)
        if grad is not None:
            factor = factor * tl.load(grad + batch * grad_outer + inside * grad_row, mask=valid, other=0).to(COMPUTE)
        factor = tl.where(row_mask, factor, 0.0)[:, None]
        tile_mask = row_mask[:, None]
        for begin in range(start, last, COLUMNS):
            if not WHOLE:
                column, mask = piece(begin, last, valid, COLUMNS)
                x = load_tile(teacher, at_teacher, teacher_column, column, mask, classes, COMPUTE)
                y = load_tile(student, at_student, student_column, column, mask, classes, COMPUTE)
            if REVERSE:
                _, by_teacher, u, p = _pair(y, y_top, y_log, x, x_top, x_log, scale, TERMS)
                by_student = _by_p(p, u, student_value)
            else:
                _, by_student, u, p = _pair(x, x_top, x_log, y, y_top, y_log, scale, TERMS)
                by_teacher = _by_p(p, u, student_value)
            if to_student is not None:
                place = at_student[:, None] + (column * student_column)[None, :]
                value = tl.where(tile_mask, factor * by_student, 0.0)
                tl.store(to_student + place, narrow(value, to_student), mask=mask)
            if peer is not None:
                if not WHOLE:
                    z = load_tile(peer, at_peer, peer_column, column, mask, classes, COMPUTE)
                if REVERSE:
                    _, by_teacher2, u, p = _pair(z, z_top, z_log, x, x_top, x_log, scale, TERMS)
                    by_peer = _by_p(p, u, peer_value)
                else:
                    _, by_peer, u, p = _pair(x, x_top, x_log, z, z_top, z_log, scale, TERMS)
                    by_teacher2 = _by_p(p, u, peer_value)
                by_teacher += by_teacher2
                if to_peer is not None:
                    place = at_peer[:, None] + (column * peer_column)[None, :]
                    value = tl.where(tile_mask, factor * by_peer, 0.0)
                    tl.store(to_peer + place, narrow(value, to_peer), mask=mask)
            if to_teacher is not None:
                place = at_teacher[:, None] + (column * teacher_column)[None, :]
                value = tl.where(tile_mask, factor * by_teacher, 0.0)
                tl.store(to_teacher + place, narrow(value, to_teacher), mask=mask)


@triton.jit(do_not_specialize=["count"])
def entropy_kernel(
    logits, grad, to_logits, losses, total, tops, totals, values,
    count, inner, classes, tiles, splits, span,
    outer_stride, row_stride, class_stride, grad_outer, grad_row,
    COMPUTE: tl.constexpr, MEAN: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Compute ``-sum p log p`` of rows, or its gradient, with the arguments of :func:`divergence_kernel`."""
    program = tl.program_id(0)
    split = program % splits
    batch, inside, valid, row = rows_of((program // splits).to(tl.int64), tiles, inner, ROWS)
    offset = batch * outer_stride + inside * row_stride
    start = split * span
    last = tl.minimum(start + span, classes)
    column, mask = piece(start, last, valid, COLUMNS)
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
        for begin in range(start, last, COLUMNS):
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
        for begin in range(start, last, COLUMNS):
            if not WHOLE:
                column, mask = piece(begin, last, valid, COLUMNS)
                x = load_tile(logits, offset, class_stride, column, mask, classes, COMPUTE)
            log_p = (x - top[:, None]) - log_total[:, None]
            by_x = tl.where(log_p == float("-inf"), 0.0, -tl.exp(log_p) * (log_p + value[:, None]))
            place = offset[:, None] + (column * class_stride)[None, :]
            tl.store(to_logits + place, narrow(factor[:, None] * by_x, to_logits), mask=mask)
