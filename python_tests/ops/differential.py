"""Random calls of every public operator beside formulas in float64: what to call, what must come out, how exactly.

A case is drawn by hypothesis as plain numbers and names, so that it can be printed, sent to another process and shrunk.
:func:`check` makes the tensors, calls the operator, and compares the results and the gradients with the formula's.  The
formulas are written here from the definitions, not taken from the operators' references.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from python_tests.ops.operator_cases import assert_close

Case = dict[str, Any]

# -- drawing -----------------------------------------------------------------------------------------------------------

DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("contiguous", "permuted", "strided", "offset", "expanded", "channels_last", "negated")
SIZES = st.sampled_from([1, 0, 1, 2, 3, 5, 7, 8, 16, 17, 33])
FEW = st.sampled_from([1, 0, 2, 3, 4, 5])
POOLS = st.sampled_from([1, 2])
MANY = st.sampled_from([1, 0, 2, 3, 5, 8, 31, 64, 100, 257, 1000])
SEEDS = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
DIMS = st.sampled_from([1, 1, -1, 0])  # axis of the classes
positions = st.lists(st.sampled_from([1, 0, 2, 3, 5]), max_size=2)


@st.composite
def tensor(draw, shape, dtype=dtypes, values="normal", grad=True):
    """A tensor as :func:`make` reads it."""
    return {
        "shape": list(shape),
        "dtype": dtype if isinstance(dtype, str) else draw(dtype),
        "values": values if isinstance(values, str) else draw(values),
        "layout": draw(layouts),
        "grad": grad and draw(st.booleans()),
        "seed": draw(SEEDS),
    }


def make(case: Case) -> Tensor:
    """The tensor of a case: its values rounded to its dtype, in memory as its layout says."""
    shape, kind = tuple(case["shape"]), case["values"]
    dtype = getattr(torch, case["dtype"])
    generator = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "large":
        x = x * 3e3
    elif kind == "equal":  # near-equal rows: what every round starts with
        x = torch.randn(shape[-1:] if shape else (), generator=torch.Generator().manual_seed(7)).double() + x * 1e-4
    elif kind == "positive":
        x = x.abs() + 0.05
    elif kind == "weights":  # some of them nothing
        x = torch.where(x > -0.5, x.abs() + 0.05, 0.0)
    elif kind == "unit":
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
    elif kind == "integers":
        x = (x * 60).round()
    if dtype in (torch.uint8, torch.bool):
        x = x.abs()
    if case["layout"] == "expanded" and shape:
        # One row for all: along the first axis that has several.
        axis = next((i for i, n in enumerate(shape) if n > 1), 0)
        x = x.narrow(axis, 0, min(1, shape[axis])).expand(shape)
    x = x.to(dtype) if case["layout"] != "expanded" else _expanded(x, dtype)
    return _laid_out(x, case["layout"], generator).requires_grad_(case["grad"])


def _expanded(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.numel():
        return x.to(dtype)
    base = x[tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for s, n in zip(x.stride(), x.shape, strict=True))]
    return base.contiguous().to(dtype).expand(x.shape)


def _laid_out(x: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    if layout == "permuted" and x.dim() > 1:
        order = torch.randperm(x.dim(), generator=generator).tolist()
        back = [order.index(i) for i in range(x.dim())]
        return x.permute(order).contiguous().permute(back)
    if layout == "strided" and x.dim():
        axis = int(torch.randint(x.dim(), (), generator=generator))
        shape = list(x.shape)
        shape[axis] = 2 * shape[axis] + 1
        wide = torch.full(shape, 3, dtype=x.dtype)
        narrow = wide[tuple(slice(1, None, 2) if i == axis else slice(None) for i in range(x.dim()))]
        return narrow.copy_(x)
    if layout == "offset":
        start = int(torch.randint(1, 18, (), generator=generator))
        memory = torch.full((start + x.numel() + 3,), 3, dtype=x.dtype)
        return memory[start : start + x.numel()].view(x.shape).copy_(x)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "negated" and x.dtype.is_floating_point and x.dtype.itemsize >= 4:
        return torch._neg_view(-x)
    return x if layout == "expanded" else x.contiguous()


def exact(x):
    """The same values as a float64 leaf of its own."""
    return None if x is None else x.detach().double().clone().requires_grad_(x.requires_grad)


# -- comparing ---------------------------------------------------------------------------------------------------------

SLACK = 1.0
"""What absolute tolerances are multiplied by: 4 for the reference, which sums in torch's order and dtype."""


def compare(
    got, expected, inputs, *, absolute=1e-6, relative=1e-5, gradient=None, by_weights=1.0, coarse=False, unseen=False
):
    """Results, and the gradients of their product with random numbers, against the formula's.

    ``by_weights``: what the tolerance of the gradient of weights is multiplied by (:func:`over_weights`).
    ``coarse``: computed in fp32, whatever the dtype of a weight or a scale and so of its gradient.  ``unseen``: what
    has weight 0 is not looked at, so that its weight gets no gradient.
    """
    absolute = absolute * SLACK
    gradient = None if gradient is None else gradient * SLACK
    gots = [got] if isinstance(got, Tensor) else list(got)
    wants = [expected] if isinstance(expected, Tensor) else list(expected)
    for number, (ours, theirs) in enumerate(zip(gots, wants, strict=True)):
        assert_close(f"result {number}", _rounded(ours, coarse), theirs, relative=relative, absolute=absolute)
    leaves = {name: pair for name, pair in inputs.items() if pair[0] is not None and pair[0].requires_grad}
    if not leaves:
        assert not any(x.requires_grad for x in gots), "a result requires a gradient, and no input does"
        return
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in gots]
    ours = torch.autograd.grad(gots, [pair[0] for pair in leaves.values()], along, allow_unused=True)
    theirs = torch.autograd.grad(
        wants, [pair[1] for pair in leaves.values()], [x.double() for x in along], allow_unused=True
    )
    for (name, (leaf, _)), one, other in zip(leaves.items(), ours, theirs, strict=True):
        assert leaf is not None
        if one is None or other is None:
            assert other is None or not other.any(), f"gradient of {name}: None instead of {other}"
            assert one is None or not one.any(), f"gradient of {name}: {one} instead of none"
            continue
        assert one.dtype == leaf.dtype, f"gradient of {name} is {one.dtype}, not {leaf.dtype}"
        most = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
        bound = gradient if gradient is not None else absolute
        bound *= by_weights if name == "weights" else 1.0
        if name == "weights" and bool((leaf == 0).any()) and unseen:
            other = other.masked_fill(leaf.detach() == 0, 0.0)
        assert_close(
            f"gradient of {name}", _rounded(one, coarse), other, relative=relative, absolute=bound * max(1.0, most)
        )


def _rounded(x: Tensor, coarse: bool) -> Tensor:
    return x.float() if coarse and x.dtype == torch.float64 else x


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of a result of tensors that may have several."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def is_coarse(*computed: Tensor) -> bool:
    return not any(x.dtype == torch.float64 for x in computed)


def spread(*logits: Tensor | None) -> float:
    """The largest difference of finite logits, those of a student from its teacher's among them."""
    finite = [x.detach().double().flatten() for x in logits if x is not None]
    every = torch.cat([x[x.isfinite()] for x in finite])
    return max(1.0, float(every.max() - every.min())) if every.numel() else 1.0


def over_weights(weights: Tensor | None) -> float:
    """Gradients of weights are those of shares over the sum of the weights: one over the least sum, at least 1."""
    if weights is None:
        return 1.0
    sums = weights.detach().double().sum(0)
    return max(1.0, float(1 / sums[sums > 0].min())) if bool((sums > 0).any()) else 1.0


# -- distill -----------------------------------------------------------------------------------------------------------

TEMPERATURES = st.sampled_from([1.0, 0.5, 2.0, 4.0, 0.1, 20.0, math.inf])
REDUCTIONS = st.sampled_from(["batchmean", "sum", "none"])
LOGITS = st.sampled_from(["normal", "large", "equal"])


@st.composite
def rows(draw: st.DrawFn) -> list[int]:
    return [draw(FEW), draw(MANY.filter(bool)), *draw(positions)]


def turned(x: Any, dim: int, stack: int = 0) -> Any:
    """A view of logits whose classes lie on axis ``dim`` behind ``stack`` axes."""
    return x.movedim(1 + stack, dim if dim < 0 else dim + stack)


def masked(x: Tensor, share: float, seed: int, axis: int) -> Tensor:
    """``x`` with some classes at -inf, the first one never.

    A leaf where x is one.
    """
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    draw.select(axis, 0).fill_(False)
    return x.detach().masked_fill(draw, -math.inf).requires_grad_(x.requires_grad)


def log_softmax(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Logarithms of the probabilities, 0 in place of -inf, and the probabilities.

    No derivative of an infinity.
    """
    out = x == -math.inf
    finite = torch.where(out, 0.0, x)
    most = finite.masked_fill(out, -math.inf).amax(axis, keepdim=True).detach()
    powers = torch.where(out, 0.0, (torch.where(out, most, finite) - most).exp())
    total = powers.sum(axis, keepdim=True)
    return torch.where(out, 0.0, finite - most - total.log()), powers / total


def divergence(log_p: Tensor, p: Tensor, log_q: Tensor, axis: int) -> Tensor:
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(axis)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) for every row of [B, C, ...]."""
    if temperature == math.inf:
        return half_variance(teacher - student, 1)
    log_p, p = log_softmax(teacher / temperature, 1)
    log_q, _ = log_softmax(student / temperature, 1)
    return temperature**2 * divergence(log_p, p, log_q, 1)


def half_variance(difference: Tensor, axis: int) -> Tensor:
    known = difference.isfinite()
    count = known.sum(axis, keepdim=True).clamp_min(1)
    value = torch.where(known, difference, 0.0)
    centred = torch.where(known, value - value.sum(axis, keepdim=True) / count, 0.0)
    return centred.square().sum(axis) / (2 * count.squeeze(axis))


def reduced(each: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" or not each.numel() else each.sum() / each.numel()


def times(temperature: float) -> float:
    return 1.0 if temperature == math.inf else max(1.0, temperature)


@st.composite
def kl_div_case(draw: st.DrawFn) -> Case:
    shape = draw(rows())
    weight = draw(st.sampled_from([None, [shape[0]], [shape[0], *shape[2:]]]))
    return {
        **{name: draw(tensor(shape, values=LOGITS)) for name in ("student", "teacher", "third")},
        "weight": weight and draw(tensor(weight, values="weights")),
        "mask": draw(st.sampled_from([0.0, 0.3])),
        "temperature": draw(TEMPERATURES),
        "reduction": draw(REDUCTIONS),
        "direction": draw(st.sampled_from(["teacher", "student"])),
        "dim": draw(DIMS),
        "same": draw(st.booleans()),
    }


def _weighted(each: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return each
    weight = weight.reshape(*weight.shape, *(1,) * (each.dim() - weight.dim()))
    return torch.where(weight == 0, 0.0 * weight, weight) * each


def _compare_divergence(case, got, rows, inputs, terms=1):
    """Compare a sum of ``terms`` divergences of every row, whose tolerances grow with the logits' spread."""
    logits = [leaf for name, (leaf, _) in inputs.items() if name != "weight" and leaf is not None]
    assert got.dtype == promoted(*logits)
    size, T = spread(*logits), case["temperature"]
    many = max(1, len(logits[0])) if case["reduction"] == "sum" else 1
    compare(
        got, reduced(rows, case["reduction"]), inputs,
        absolute=1e-6 * terms * size * times(T) * many * (size if math.inf == T else 1),
        gradient=2e-6 * terms * size * times(T), coarse=is_coarse(*logits),
    )  # fmt: skip


def check_kl_div(case: Case) -> None:
    student, teacher = make(case["student"]), make(case["teacher"])
    if case["same"]:
        teacher = student.detach().clone().requires_grad_(teacher.requires_grad)
    if case["mask"]:
        teacher = masked(teacher, case["mask"], 5, 1)
    weight = None if case["weight"] is None else make(case["weight"])
    T, reduction = case["temperature"], case["reduction"]
    s, t, w = exact(student), exact(teacher), exact(weight)
    dim = case["dim"]
    got = ops.kl_div(turned(student, dim), turned(teacher, dim), T, weight=weight, reduction=reduction, dim=dim)
    _compare_divergence(
        case, got, _weighted(kl(s, t, T), w), {"student": (student, s), "teacher": (teacher, t), "weight": (weight, w)}
    )


def check_dual_kl(case: Case) -> None:
    a, teacher, b = make(case["student"]), make(case["teacher"]), make(case["third"])
    if case["same"]:
        b = a.detach().clone().requires_grad_(b.requires_grad)
    weight = None if case["weight"] is None else make(case["weight"])
    T, reduction, direction = case["temperature"], case["reduction"], case["direction"]
    x, t, y, w = exact(a), exact(teacher), exact(b), exact(weight)
    logits = [turned(logits, case["dim"]) for logits in (a, b, teacher)]
    got = ops.dual_kl(*logits, T, direction=direction, weight=weight, reduction=reduction, dim=case["dim"])
    pairs = kl(x, t, T) + kl(y, t, T) if direction == "teacher" else kl(t, x, T) + kl(t, y, T)
    inputs = {"a": (a, x), "b": (b, y), "teacher": (teacher, t), "weight": (weight, w)}
    _compare_divergence(case, got, _weighted(pairs, w), inputs, terms=2)


@st.composite
def ensemble_case(draw: st.DrawFn) -> Case:
    B, C, *rest = draw(rows())
    K = draw(FEW.filter(bool))
    mode = draw(st.sampled_from(["kl_of_mean", "mean_of_kl"]))
    per_teacher = [[K], [K, B, 1], [K, 1, 1]] + ([[K, B]] if B != C else [])
    forms = [None, *per_teacher]
    if mode == "kl_of_mean":
        forms += [[K, 1, C], [K, B, C], *([[K, C]] if B != C else [])]
    weights = draw(st.sampled_from(forms))
    log_probs = draw(st.booleans())
    # Logarithms of probabilities that were rounded to 16 bits are those of no distribution.
    kinds = st.sampled_from(["float32", "float64"]) if log_probs else dtypes
    return {
        "student": draw(tensor([B, C, *rest], values=LOGITS)),
        "teachers": draw(tensor([K, B, C, *rest], kinds, LOGITS)),
        "weights": weights and draw(tensor(weights, values="weights")),
        "temperature": draw(TEMPERATURES),
        "mix": "probs" if mode == "mean_of_kl" else draw(st.sampled_from(["probs", "logits"])),
        "mode": mode,
        "class_mask": draw(st.booleans()) and mode == "kl_of_mean",
        "log_probs": log_probs,
        "reduction": draw(REDUCTIONS),
        "dim": draw(DIMS),
    }


def shares(weights: Tensor | None, shape: Sequence[int], known: Tensor | None) -> Tensor:
    """Weights [K, B, C, ...] normalised over the teachers.

    Equal where nothing is left.
    """
    K, B = shape[:2]
    if weights is None:
        full = torch.ones(tuple(shape), dtype=torch.float64)
    else:
        if weights.dim() == 1:
            form = (K, *(1,) * (len(shape) - 1))
        elif weights.dim() == 2:
            # [K, B] or [K, C]: a case has them only where the two differ.
            form = (K, B, 1) if weights.shape[1] == B else (K, 1, shape[2])
        else:
            form = tuple(weights.shape)
        full = weights.reshape(*form, *(1,) * (len(shape) - len(form))).expand(tuple(shape))
    if known is not None:
        full = full * known.double().reshape(K, 1, -1, *(1,) * (len(shape) - 3))
    total = full.sum(0, keepdim=True)
    return torch.where(total > 0, full / torch.where(total > 0, total, 1.0), 1.0 / K)


def check_ensemble_kl(case: Case) -> None:
    student, teachers = make(case["student"]), make(case["teachers"])
    if case["log_probs"]:
        teachers = teachers.detach().log_softmax(2).requires_grad_(teachers.requires_grad)
    weights = None if case["weights"] is None else make(case["weights"])
    K, _, C = teachers.shape[:3]
    known = None
    if case["class_mask"]:
        known = torch.rand(K, C, generator=torch.Generator().manual_seed(3)) < 0.7
    T, mix, mode, reduction = case["temperature"], case["mix"], case["mode"], case["reduction"]
    s, t, w = exact(student), exact(teachers), exact(weights)
    settings = {name: case[name] for name in ("mix", "mode", "log_probs", "reduction", "dim")}
    dim, given = case["dim"], weights
    if weights is not None and weights.dim() == teachers.dim():
        given = turned(weights, dim, 1)
    got = ops.ensemble_kl(turned(student, dim), turned(teachers, dim, 1), given, T, class_mask=known, **settings)
    assert got.dtype == promoted(student, teachers)
    W = shares(w, t.shape, known)
    if mode == "mean_of_kl":
        each = sum(W[k].select(1, 0) * _teacher_kl(s, t[k], T, case["log_probs"]) for k in range(K))
        assert isinstance(each, Tensor)
    else:
        each = _mixture_kl(s, t, W, T, mix, case["log_probs"])
    expected = reduced(each, reduction)
    size = spread(student, teachers)
    many = max(1, student.shape[0]) if reduction == "sum" else 1
    usual, value, slope = 8e-6 * size * times(T) * (size if math.inf == T else 1), 0.0, 0.0
    if mix == "logits" and math.isfinite(T) and s.numel():
        value, slope = _mixing_errors(s, t, W, T)
    compare(
        got,
        expected,
        {"student": (student, s), "teachers": (teachers, t), "weights": (weights, w)},
        absolute=2e-6 * size * times(T) * many * (size if math.inf == T else 1) + value * many,
        gradient=usual + slope,
        by_weights=over_weights(weights) * (usual + slope * size) / (usual + slope),
        # Logarithms of probabilities that were rounded to fp32 do not sum to one any better.
        coarse=is_coarse(student, teachers) or (case["log_probs"] and teachers.dtype != torch.float64),
        unseen=True,
    )


def _teacher_kl(s: Tensor, t: Tensor, T: float, log_probs: bool) -> Tensor:
    if not (log_probs and T == 1):
        return kl(s, t, T)
    # Taken as they are, they need not sum to one: sum P log(P / Q) - P + Q, which is least at P = Q nevertheless.
    log_q, q = log_softmax(s, 1)
    return (t.exp() * (t - log_q) - t.exp() + q).sum(1)


def _mixture_kl(s: Tensor, t: Tensor, W: Tensor, T: float, mix: str, log_probs: bool) -> Tensor:
    if math.inf == T:
        if mix == "probs":  # to first order in 1 / T a softmax is (1 + (t - mean t) / T) / C
            t = t - t.mean(2, keepdim=True)
        return half_variance((W * t).sum(0) - s, 1)
    if mix == "logits":
        return kl(s, (W * t).sum(0), T)
    # In logarithms: teachers who are sure may leave no mass that float64 can hold.  A share of 0 counts for nothing.
    each = t if log_probs and T == 1 else log_softmax(t / T, 2)[0]
    shares = W.expand_as(each)
    logs = (torch.where(shares > 0, shares, 1.0).log() + each).masked_fill((shares == 0) | (t == -math.inf), -math.inf)
    log_p, P = log_softmax(_log_sum(logs, 0), 1)
    return T**2 * divergence(log_p, P, log_softmax(s / T, 1)[0], 1)


def _mixing_errors(s: Tensor, t: Tensor, W: Tensor, T: float) -> tuple[float, float]:
    """Return how far a row's loss, and its gradient by the mixed logits, move where fp32 rounds the mixture.

    Each mixed logit is wrong by ``error`` at most: K products and shares, sums and a difference.  With g the gradient
    of a row and G the sum of its sizes, its loss moves by error G, and g in all by 4 error (1 + G / T).
    """
    mixed = (W * t).sum(0).detach().requires_grad_()
    error = (len(t) + 4) / 2 * torch.finfo(torch.float32).eps * float(t.detach().abs().max())
    (slopes,) = torch.autograd.grad(kl(s.detach(), mixed, T).sum(), mixed)
    most = float(slopes.abs().sum(1).max())
    return error * most, 4 * error * (1 + most / T)


def _log_sum(x: Tensor, axis: int) -> Tensor:
    """log sum exp, -inf of nothing but -inf, without the derivative of an infinity."""
    most = x.amax(axis, keepdim=True).detach()
    most = torch.where(most == -math.inf, 0.0, most)
    total = (x - most).exp().sum(axis)
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + most.squeeze(axis), -math.inf)


@st.composite
def js_case(draw: st.DrawFn) -> Case:
    B, C, *rest = draw(rows())
    K = draw(FEW.filter(bool))
    weights = draw(st.sampled_from([None, [K], [K, B], [K, B, *rest]]))
    return {
        "logits": draw(tensor([K, B, C, *rest], values=LOGITS)),
        "weights": weights and draw(tensor(weights, values="weights")),
        "mask": draw(st.sampled_from([0.0, 0.3])),
        "reduction": draw(REDUCTIONS),
        "dim": draw(DIMS),
    }


def check_stack(case: Case, *, consensus: bool) -> None:
    """js_div, or the two entropies of ``consensus`` whose difference it is."""
    logits = make(case["logits"])
    if case["mask"]:
        logits = masked(logits, case["mask"], 5, 2)
    weights = None if case["weights"] is None else make(case["weights"])
    x, w = exact(logits), exact(weights)
    K, B, _, *rest = x.shape
    full = torch.ones(K, B, *rest, dtype=torch.float64)
    if w is not None:
        full = w.reshape(*w.shape, *(1,) * (full.dim() - w.dim())).expand(full.shape)
    total = full.sum(0, keepdim=True)
    W = torch.where(total > 0, full / torch.where(total > 0, total, 1.0), 1.0 / K)
    log_p, p = log_softmax(x, 2)
    mixture = (W.unsqueeze(2) * p).sum(0)
    log_m = torch.where(mixture > 0, mixture, 1.0).log()
    of_mixture = -(mixture * log_m).sum(1)
    of_each = -(W * torch.where(p > 0, p * log_p, 0.0).sum(2)).sum(0)
    js = (W * divergence(log_p, p, log_m.expand_as(log_p), 2)).sum(0)
    parts = (of_mixture, of_each) if consensus else (js,)
    reduction, dim = case["reduction"], case["dim"]
    got = (ops.consensus if consensus else ops.js_div)(turned(logits, dim, 1), weights, reduction=reduction, dim=dim)
    size = spread(logits) * (max(1, B) if reduction == "sum" else 1)
    compare(
        got,
        [reduced(part, reduction) for part in parts],
        {"logits": (logits, x), "weights": (weights, w)},
        absolute=2e-6 * size,
        gradient=8e-6 * size,
        # Gradients of weights are differences of entropies, which are log C at most.
        by_weights=over_weights(weights) * max(1.0, math.log(logits.shape[2])),
        coarse=is_coarse(logits),
        unseen=True,
    )


@st.composite
def entropy_case(draw: st.DrawFn) -> Case:
    return {"logits": draw(tensor(draw(rows()), values=LOGITS)), "reduction": draw(REDUCTIONS), "dim": draw(DIMS)}


def check_entropy(case: Case) -> None:
    logits = make(case["logits"])
    x = exact(logits)
    log_p, p = log_softmax(x, 1)
    expected = reduced(-(p * log_p).sum(1), case["reduction"])
    size = spread(logits) * (max(1, logits.shape[0]) if case["reduction"] == "sum" else 1)
    got = ops.entropy(turned(logits, case["dim"]), reduction=case["reduction"], dim=case["dim"])
    compare(got, expected, {"logits": (logits, x)}, absolute=1e-6 * size, gradient=4e-6 * size)


# -- contrast ----------------------------------------------------------------------------------------------------------


@st.composite
def contrastive_case(draw: st.DrawFn) -> Case:
    shape = [draw(SIZES), draw(SIZES)]
    return {
        "x": draw(tensor(shape)),
        "y": draw(tensor(shape)),
        "temperature": draw(st.sampled_from([1.0, 0.5, 0.07, 0.01, 30.0, "tensor"])),
        "learnt": draw(st.booleans()),
    }


def check_contrastive(case: Case) -> None:
    x, y = make(case["x"]), make(case["y"])
    T: Any = case["temperature"]
    a, b = exact(x), exact(y)
    given, t = None, T
    if T == "tensor":
        given = torch.tensor(0.3, requires_grad=case["learnt"])
        T, t = given, exact(given)
    got = ops.contrastive(x, y, T)
    assert got.dtype == promoted(x, y)
    scores = a @ b.T / t
    each = -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal())
    expected = each.mean() if len(a) else scores.sum() * 0
    size = float(scores.detach().abs().max()) if scores.numel() else 1.0
    inputs = {"x": (x, a), "y": (y, b), "temperature": (given, t if given is not None else None)}
    # The derivative by the temperature is a sum of scores over the temperature, which may cancel.
    slope = 2e-5 * max(1, size / min(1.0, float(T)))
    compare(got, expected, inputs, absolute=4e-6 * max(1, size), gradient=slope, coarse=is_coarse(x, y))


# -- blend -------------------------------------------------------------------------------------------------------------


@st.composite
def blend_case(draw: st.DrawFn) -> Case:
    B, N = draw(FEW), draw(FEW)
    dtype, inner = draw(dtypes), draw(st.lists(SIZES, max_size=3))
    other = draw(st.sampled_from([dtype, *DTYPES]))
    indexed = draw(st.booleans()) and (N > 0 or B == 0)
    alpha = draw(st.sampled_from(["number", "whole", "scalar", "each"]))
    return {
        "foreground": draw(tensor([B, *inner], dtype)),
        "background": draw(tensor([N if indexed else B, *inner], other)),
        "indexed": indexed,
        "index_layout": draw(st.sampled_from(["contiguous", "strided", "expanded"])),
        "kind": alpha,
        "alpha": draw(tensor([B] if alpha == "each" else [], values="unit")),
    }


def check_blend(case: Case) -> None:
    foreground, background = make(case["foreground"]), make(case["background"])
    B, N = len(foreground), len(background)
    index = None
    if case["indexed"]:
        index = torch.randint(max(N, 1), (B,), generator=torch.Generator().manual_seed(1))
        if case["index_layout"] == "expanded" and B:
            index = index[:1].expand(B)
        elif case["index_layout"] == "strided":
            index = _laid_out(index, "strided", torch.Generator().manual_seed(0))
    x, y = exact(foreground), exact(background)
    alpha: Any = 1 if case["kind"] == "whole" else 0.3
    a: Any = alpha
    given = None
    if case["kind"] in ("scalar", "each"):
        alpha = given = make(case["alpha"])
        a = exact(given)
    got = ops.blend(foreground, background, alpha, index=index)
    assert got.dtype == promoted(foreground, background)
    each = a.reshape(-1, *(1,) * (x.dim() - 1)) if isinstance(a, Tensor) and a.dim() else a
    expected = each * x + (1 - each) * (y if index is None else y[index])
    inputs = {
        "foreground": (foreground, x),
        "background": (background, y),
        "alpha": (given, a if given is not None else None),
    }
    many = max(1.0, math.sqrt(x.numel()) / 8)  # the reference sums alpha's gradient in fp32
    compare(got, expected, inputs, relative=1e-6, gradient=1e-6 * many, coarse=is_coarse(foreground))


@st.composite
def boxes_case(draw: st.DrawFn) -> Case:
    B, C, H, W = draw(FEW), draw(FEW), draw(SIZES), draw(SIZES)
    return {
        "images": draw(tensor([B, C, H, W], st.sampled_from([*DTYPES, "uint8", "int64"]), "integers", grad=False)),
        "grad": draw(st.booleans()),
        "counts": [draw(st.integers(0, 3)) for _ in range(B)],
        "padded": draw(st.booleans()),
        "box_dtype": draw(st.sampled_from(["float32", "float64", "int64", "float16"])),
        "fill": draw(st.sampled_from(["number", "sequence", "tensor"])),
        "seed": draw(SEEDS),
    }


def check_boxes(case: Case, *, keep: bool) -> None:
    images = make(case["images"])
    images.requires_grad_(case["grad"] and images.is_floating_point())
    B, C, H, W = images.shape
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = getattr(torch, case["box_dtype"])
    each = [(torch.rand(n, 4, generator=generator) * (max(H, W) + 4) - 2).to(dtype) for n in case["counts"]]
    boxes: Any = each
    if case["padded"]:
        most = max(case["counts"], default=0)
        boxes = torch.zeros(B, most, 4, dtype=dtype)
        for b, own in enumerate(each):
            boxes[b, : len(own)] = own
    values = [float(c % 5) for c in range(C)]
    fill: Any = {"number": 2, "sequence": values, "tensor": torch.tensor(values)}[case["fill"]]
    if case["fill"] == "number":
        values = [2.0] * C
    inside = torch.zeros(B, 1, H, W, dtype=torch.bool)
    for b, own in enumerate(each):
        for x1, y1, x2, y2 in own.double().tolist():
            for i in range(H):
                for j in range(W):
                    inside[b, 0, i, j] |= bool(x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2)
    x = images.detach().double().clone().requires_grad_(images.requires_grad)
    got = (ops.keep_boxes if keep else ops.erase_boxes)(images, boxes, fill)
    colour = torch.tensor(values, dtype=torch.float64).reshape(1, C, 1, 1)
    expected = torch.where(inside == keep, x, colour)
    assert got.dtype == images.dtype
    if images.is_floating_point():
        compare(got, expected, {"images": (images, x)}, relative=0, absolute=0)
    else:
        assert torch.equal(got.double(), expected)


# -- aggregate ---------------------------------------------------------------------------------------------------------

WEIGHTS = st.sampled_from(["list", "tuple", "numpy", "float64", "float32", "int64", "tensor"])


@st.composite
def vectors_case(draw: st.DrawFn, grad: bool = False) -> Case:
    M, P, dtype = draw(FEW.filter(bool)), draw(MANY), draw(dtypes)
    values = draw(st.sampled_from(["normal", "equal", "large"]))
    stacked = draw(st.booleans())
    given = [draw(tensor([M, P], dtype, values, grad))] if stacked else [
        draw(tensor([P], dtype, values, grad)) for _ in range(M)
    ]  # fmt: skip
    return {
        "stacked": stacked,
        "vectors": given,
        "weights": draw(WEIGHTS),
        "weight": draw(tensor([M], st.sampled_from(["float32", "float64"]), "weights", grad)),
    }


def vectors_of(case: Case) -> tuple[Any, Tensor, list[tuple[Tensor, Tensor]]]:
    """Vectors as they are given, float64 [M, P], and the pairs of leaves."""
    made = [make(one) for one in case["vectors"]]
    leaves = [exact(one) for one in made]
    wide = leaves[0] if case["stacked"] else torch.stack(leaves)
    return (made[0] if case["stacked"] else made), wide, list(zip(made, leaves, strict=True))


def weights_of(case: Case) -> tuple[Any, Tensor, Tensor | None]:
    """Weights as they are given, in float64, and the leaf where they are one.

    The first is never 0.
    """
    made = make(case["weight"]).detach().clone()
    if not case.get("weighted", True):
        return None, torch.ones(len(made), dtype=torch.float64), None
    made[:1] = 1.5
    kind = case["weights"]
    if kind == "tensor":
        leaf = made.requires_grad_(case["weight"]["grad"])
        return leaf, exact(leaf), leaf
    if kind == "int64":
        made = (made * 3).ceil()
        return made.long(), made.double(), None
    if kind in ("float64", "float32"):
        made = made.to(getattr(torch, kind))
        return made, made.double(), None
    values = made.double().tolist()
    given = {"list": values, "tuple": tuple(values), "numpy": np.array(values)}[kind]
    return given, torch.tensor(values, dtype=torch.float64), None


def _robust_bound(wide: Tensor) -> dict[str, float]:
    largest = float(wide.detach().abs().max()) if wide.numel() else 1.0
    return {"relative": 1e-6, "absolute": 1e-7 * max(1.0, largest)}


@st.composite
def mean_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case(grad=True))
    out = draw(st.sampled_from([None, *DTYPES, "vector"]))
    return {**case, "out": out, "out_layout": draw(layouts)}


def check_weighted_mean(case: Case) -> None:
    given, wide, leaves = vectors_of(case)
    weights, w, leaf = weights_of(case)
    inputs = {f"vectors {m}": pair for m, pair in enumerate(leaves)}
    inputs["weights"] = (leaf, w)
    expected = (w[:, None] * wide).sum(0) / w.sum()
    largest = float(wide.detach().abs().max()) if wide.numel() else 1.0
    bounds = {"relative": 1e-6, "absolute": 1e-7 * max(1.0, largest), "gradient": 1e-6 * max(1.0, largest)}
    if case["out"] is None:
        compare(ops.weighted_mean(given, weights), expected, inputs, **bounds)
        return
    first = given[0]
    with torch.no_grad():
        if case["out"] == "vector":
            out = first
        else:
            form = {"shape": list(first.shape), "dtype": case["out"], "values": "normal", "grad": False, "seed": 0}
            layout = "contiguous" if case["out_layout"] in ("expanded", "negated") else case["out_layout"]
            out = make({**form, "layout": layout})
        if out.is_neg() or (out.dim() and 0 in out.stride() and out.numel() > 1):
            return
        result = ops.weighted_mean([x.detach() for x in given] if not case["stacked"] else given.detach(), weights, out)
    assert result is out
    assert_close("out", out, expected, relative=1e-6, absolute=bounds["absolute"])
    if out.dtype == torch.float64:  # the sum is taken in fp64, whatever the vectors' dtype and out's layout
        torch.testing.assert_close(out, expected.detach(), rtol=1e-13, atol=1e-13 * max(1.0, largest))


def check_accumulator(case: Case) -> None:
    _, wide, leaves = vectors_of(case)
    _, w, _ = weights_of(case)
    rows = leaves[0][0].detach() if case["stacked"] else [pair[0].detach() for pair in leaves]
    expected = (w[:, None] * wide).sum(0).detach() / w.detach().sum()
    results = []
    for kept in (False, True):
        total = ops.Accumulator(wide.shape[1], exact=kept)
        order = range(len(w)) if not kept else reversed(range(len(w)))
        for m in order:
            total.add(rows[m], float(w[m]))
        results.append(total.mean())
    for got in results:
        assert_close("mean", got, expected, **_robust_bound(wide))


RULES = st.sampled_from(["mean", "momentum", "adam", "yogi", "adagrad"])


@st.composite
def server_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case())
    P, dtype = case["vectors"][0]["shape"][-1], case["vectors"][0]["dtype"]
    state = draw(st.sampled_from(["float32", "float64"]))
    return {
        **case,
        "global": draw(tensor([P], dtype, grad=False)),
        "rule": draw(RULES),
        "state": state,
        "rate": draw(st.sampled_from([None, 0.5])),
        "out": draw(st.sampled_from([None, *DTYPES])),
    }


def check_server_step(case: Case) -> None:
    given, wide, _ = vectors_of(case)
    weights, w, _ = weights_of(case)
    base = make(case["global"])
    rule = case["rule"]
    rate, beta1, beta2, tau = {
        "mean": (1.0, 0.0, 0.0, 0.0),
        "momentum": (1.0, 0.0, 0.0, 0.0),
        "adam": (0.1, 0.9, 0.99, 1e-9),
        "yogi": (0.01, 0.9, 0.99, 1e-3),
        "adagrad": (0.1, 0.0, 0.0, 1e-9),
    }[rule]
    rate = case["rate"] or rate
    state = getattr(torch, case["state"])
    generator = torch.Generator().manual_seed(2)
    first = None if rule == "mean" else torch.randn(len(base), generator=generator).to(state)
    second = None if rule in ("mean", "momentum") else torch.rand(len(base), generator=generator).to(state) + 0.01
    g = base.double()
    m, v = (None if x is None else x.double().clone() for x in (first, second))
    deltas = wide.detach() - g
    d = (w.detach()[:, None] * deltas).sum(0) / w.detach().sum()
    if rule == "mean":
        step = d
    elif rule == "momentum":
        m = step = beta1 * m + d
    else:
        m = beta1 * m + (1 - beta1) * d
        if rule == "adam":
            v = beta2 * v + (1 - beta2) * d**2
        elif rule == "yogi":
            v = v - (1 - beta2) * d**2 * (v - d**2).sign()
        else:
            v = v + d**2
        step = m / (v.sqrt() + tau)
    options: dict[str, Any] = {"learning_rate": case["rate"]} if case["rate"] else {}
    out = None if case["out"] is None else torch.zeros(len(base), dtype=getattr(torch, case["out"]))
    weights = weights.detach() if isinstance(weights, Tensor) else weights
    got = ops.server_step(base, given, weights, rule, first=first, second=second, out=out, **options)
    largest = max(1.0, float(wide.detach().abs().max()) if wide.numel() else 1.0)
    assert out is None or got.model is out
    assert_close("model", got.model, g + rate * step, relative=1e-6, absolute=1e-6 * largest)
    for name, ours, theirs in (("first", first, m), ("second", second, v)):
        if ours is not None and theirs is not None:
            assert_close(name, ours, theirs, relative=1e-6, absolute=1e-6 * largest**2)
    norms = deltas.square().sum(1).sqrt()
    assert_close("norms", got.norms, norms, absolute=1e-6)
    torch.testing.assert_close(got.norms, norms, rtol=1e-9, atol=1e-9 * largest)
    whole = float(d.square().sum().sqrt())
    products = deltas @ d
    cosines = torch.where((norms > 0) & (whole > 0), products / (norms * whole).clamp_min(1e-300), 0.0)
    torch.testing.assert_close(got.cosines, cosines, rtol=1e-6, atol=1e-6)


@st.composite
def trimmed_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case())
    M = case["vectors"][0]["shape"][0] if case["stacked"] else len(case["vectors"])
    return {**case, "trim": draw(st.integers(0, (M - 1) // 2)), "weighted": draw(st.booleans())}


def check_trimmed_mean(case: Case) -> None:
    given, wide, _ = vectors_of(case)
    weights, w, _ = weights_of(case)
    trim, M = case["trim"], len(wide)
    order = wide.sort(dim=0, stable=True).indices
    kept = order[trim : M - trim]
    chosen = w[kept]
    expected = (chosen * wide.gather(0, kept)).sum(0) / chosen.sum(0)
    assert_close("result", ops.trimmed_mean(given, trim, weights), expected, **_robust_bound(wide))


def check_median(case: Case) -> None:
    given, wide, _ = vectors_of(case)
    weights, w, _ = weights_of(case)
    values, order = wide.sort(dim=0, stable=True)
    total, below = w.sum(), w[order].cumsum(0)
    slack = total * 2.0**-40
    lower = values.gather(0, (below >= total / 2 - slack).double().argmax(0, keepdim=True))[0]
    upper = values.gather(0, (below > total / 2 + slack).double().argmax(0, keepdim=True))[0]
    assert_close("result", ops.median(given, weights), (lower + upper) / 2, **_robust_bound(wide))


def check_geometric_median(case: Case) -> None:
    given, wide, _ = vectors_of(case)
    weights, w, _ = weights_of(case)
    w = w.detach()
    z, before = (w[:, None] * wide).sum(0) / w.sum(), math.inf
    for _ in range(100):
        distances = (wide - z).square().sum(1).sqrt()
        now = float((w * distances).sum())
        if abs(before - now) <= 1e-10 * now:
            break
        before, b = now, w / distances.clamp_min(1e-6)
        z = (b[:, None] * wide).sum(0) / b.sum()
    got = ops.geometric_median(given, weights)
    ours = float((w * (wide - got.double()).square().sum(1).sqrt()).sum())
    best = float((w * (wide - z).square().sum(1).sqrt()).sum())
    largest = float(wide.abs().max()) if wide.numel() else 1.0
    unit = torch.finfo(got.dtype).eps * max(1.0, largest) * math.sqrt(max(1, wide.shape[1])) * float(w.sum())
    assert ours <= best * (1 + 1e-6) + unit + 1e-5, f"{ours} is more than {best}"


@st.composite
def krum_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case())
    M = case["vectors"][0]["shape"][0] if case["stacked"] else len(case["vectors"])
    byzantine = draw(st.integers(0, max(0, (M - 3) // 2)))
    return {**case, "byzantine": byzantine, "keep": draw(st.integers(1, max(1, M - byzantine)))}


def check_krum(case: Case) -> None:
    given, wide, _ = vectors_of(case)
    f, keep, M = case["byzantine"], case["keep"], len(wide)
    if 2 * f + 2 >= M:
        with pytest.raises(ValueError, match=r"byzantine"):
            ops.krum(given, f, keep)
        return
    squares = (wide[:, None] - wide[None]).square().sum(2)
    scores = []
    for m in range(M):
        others = torch.cat([squares[m, :m], squares[m, m + 1 :]]).sort().values
        scores.append(float(others[: M - f - 2].sum()))
    order = sorted(range(M), key=lambda m: (scores[m], m))
    edge = scores[order[keep - 1]]
    if keep < M and abs(scores[order[keep]] - edge) <= 1e-9 * max(edge, 1e-12) and scores[order[keep]] != edge:
        return  # which of two is closer is decided by rounding
    if keep < M and scores[order[keep]] == edge and edge > 0:
        return
    expected = wide[sorted(order[:keep])].mean(0)
    assert_close("result", ops.krum(given, f, keep), expected, **_robust_bound(wide))


def check_pairwise_distances(case: Case) -> None:
    given, wide, _ = vectors_of(case)
    got = ops.pairwise_distances(given)
    expected = (wide[:, None] - wide[None]).square().sum(2).sqrt()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@st.composite
def clip_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case())
    single = draw(st.booleans()) and not case["stacked"]
    return {
        **case,
        "single": single,
        "max_norm": draw(st.sampled_from([1.0, 0.1, 6e3, 3])),
        "noise": draw(st.sampled_from([0.0, 1.0, 0.3])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "offset": draw(st.one_of(st.integers(0, 200), st.integers(2**63, 2**64 - 1))),
    }


def _clipped(case: Case) -> tuple[Any, Tensor, Tensor, float]:
    given, wide, _ = vectors_of(case)
    if case["single"]:
        given, wide = given[0], wide[:1]
    norms = wide.square().sum(1, keepdim=True).sqrt()
    bound = float(case["max_norm"])
    dtype = (given if isinstance(given, Tensor) else given[0]).dtype
    # Without noise, results of 16 bits are shorter than the bound by what rounding may add.
    room = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 and not case.get("noise") else 0.0
    clipped = wide * torch.where(norms > bound, (1 - room) * bound / norms.clamp_min(1e-300), 1.0)
    return given, wide, clipped, bound


def _joined(got: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    return (got if isinstance(got, Tensor) else torch.stack(list(got))).reshape(like.shape)


def check_clip_by_norm(case: Case) -> None:
    given, wide, clipped, _ = _clipped(case)
    got = ops.clip_by_norm(given, case["max_norm"])
    assert_close("result", _joined(got, clipped), clipped, **_robust_bound(wide))


def philox_words(counters: Sequence[int], seed: int) -> np.ndarray:
    """Four 32-bit words of Philox4x32-10 for every counter, in Python's integers: uint64 [n, 4]."""
    result = []
    for counter in counters:
        c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            one, two = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(two >> 32) ^ c[1] ^ k[0], two & 0xFFFFFFFF, (one >> 32) ^ c[3] ^ k[1], one & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        result.append(c)
    return np.array(result, dtype=np.uint64).reshape(-1, 4)


def normal_numbers(size: int, seed: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers at places offset, offset + 1, ... of a stream, and where the radius is an ordinary one."""
    places = [(offset + j) % 2**64 for j in range(size)]
    counters = [(16 * (place >> 6) + (place & 15)) & ((1 << 62) - 1) for place in places]
    words = philox_words(counters, seed)
    which = np.array([(place >> 4) & 3 for place in places], dtype=np.int64)
    at = np.arange(size)
    first, second = words[at, which & 2], words[at, (which & 2) + 1]
    u = (first.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
    signed = np.where(second >= 1 << 31, second.astype(np.int64) - (1 << 32), second.astype(np.int64))
    angle = (signed.astype(np.float32) * np.float32(2.0**-31)).astype(np.float64) * math.pi
    return radius * np.where(which & 1, np.sin(angle), np.cos(angle)), first >= 1 << 13


def check_clip_and_noise(case: Case) -> None:
    given, wide, clipped, bound = _clipped(case)
    got = ops.clip_and_noise(given, case["max_norm"], case["noise"], case["seed"], case["offset"])
    got = _joined(got, clipped)
    numbers, usual = normal_numbers(clipped.numel(), case["seed"], case["offset"])
    noise = torch.from_numpy(numbers).reshape(clipped.shape) * case["noise"] * bound
    keep = torch.from_numpy(usual).reshape(clipped.shape)
    expected = clipped + noise
    largest = max(1.0, float(wide.abs().max()) if wide.numel() else 1.0, 7 * case["noise"] * bound)
    if got.dtype == torch.float64:  # the noise has fp32 resolution whatever the dtype
        torch.testing.assert_close(got[keep], expected[keep], rtol=1e-6, atol=2e-6 * largest)
    else:
        assert_close("result", got[keep], expected[keep], relative=1e-6, absolute=2e-6 * largest)


# -- fuse --------------------------------------------------------------------------------------------------------------


@st.composite
def fuse_case(draw: st.DrawFn) -> Case:
    B, dtype, rest = draw(FEW), draw(dtypes), draw(positions)
    M = draw(FEW.filter(bool))
    mean = draw(st.booleans())
    one = draw(FEW)
    channels = [one if mean else draw(FEW) for _ in range(M)]
    total = sum(channels)
    affine = st.sampled_from([None, "normal"])
    return {
        "mean": mean,
        "features": [draw(tensor([B, c, *rest], dtype)) for c in channels],
        "scale": draw(affine) and draw(tensor([total])),
        "shift": draw(affine) and draw(tensor([total])),
        "activation": draw(st.sampled_from([None, "relu"])),
    }


def check_fuse(case: Case) -> None:
    features = [make(one) for one in case["features"]]
    scale, shift = (None if case[name] is None else make(case[name]) for name in ("scale", "shift"))
    xs, a, b = [exact(x) for x in features], exact(scale), exact(shift)
    got = (ops.fuse_mean if case["mean"] else ops.fuse_concat)(features, scale, shift, case["activation"])
    joined = torch.cat(xs, 1)
    form = (1, -1, *(1,) * (joined.dim() - 2))
    value = joined if a is None else joined * a.reshape(form)
    value = value if b is None else value + b.reshape(form)
    if case["activation"] == "relu":
        # Where the sum is nothing but rounding, whether it counts is decided by rounding.
        close = (value.detach().abs() < 1e-5) & (a is not None or b is not None)
        if bool(close.any()):
            return
        value = torch.where(value > 0, value, 0.0)
    if case["mean"]:
        value = value.unflatten(1, (len(xs), joined.shape[1] // len(xs))).mean(1)
    inputs = {f"features {m}": pair for m, pair in enumerate(zip(features, xs, strict=True))}
    inputs |= {"scale": (scale, a), "shift": (shift, b)}
    compare(got, value, inputs, absolute=2e-6, gradient=2e-6, coarse=is_coarse(*features))


# -- optimise ----------------------------------------------------------------------------------------------------------


@st.composite
def step_case(draw: st.DrawFn) -> Case:
    shape = [draw(MANY)] if draw(st.booleans()) else [draw(FEW), draw(MANY)]
    dtype = draw(dtypes)

    def vector(values: str = "normal", own: bool = False) -> Case:
        case: Case = draw(tensor(shape if own or draw(st.booleans()) else shape[-1:], dtype, values, grad=False))
        if own and case["layout"] == "expanded":  # is refused where it is written to
            case["layout"] = "strided"
        return case

    return {
        "parameters": vector(own=True),
        "gradients": vector(own=True),
        "first": vector(own=True),
        "second": vector("positive", own=True),
        "anchor": vector() if draw(st.booleans()) else None,
        "correction": vector() if draw(st.booleans()) else None,
        "gradient_sum": vector(own=True) if draw(st.booleans()) else None,
        "each": len(shape) == 2 and draw(st.sampled_from(["", "list", "tensor"])),
        "lr": draw(st.sampled_from([0.1, 0.0, 1.0, 1e-3])),
        "momentum": draw(st.sampled_from([0.0, 0.9, 0.5])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 1.0])),
        "proximal": draw(st.sampled_from([0.0, 0.01, 2.0])),
        "max_norm": draw(st.sampled_from([None, 0.5, 1e4])),
        "betas": draw(st.sampled_from([[0.9, 0.999], [0.3, 0.5], [0.0, 0.9]])),
        "step": draw(st.sampled_from([1, 2, 1000])),
        "zero": draw(st.booleans()),
    }


def check_step(case: Case, *, adamw: bool) -> None:
    names = ("parameters", "gradients", "first", "second", "anchor", "correction", "gradient_sum")
    given = {name: None if case[name] is None else make(case[name]) for name in names}
    theta, g, first, second, anchor, correction, total = (
        None if x is None else x.double().clone() for x in given.values()
    )
    rows = theta.shape[0] if theta.dim() == 2 else 1
    each = [case["lr"] * (m + 1) for m in range(rows)] if case["each"] else [case["lr"]] * rows
    lr = torch.tensor(each, dtype=torch.float64)[:, None] if theta.dim() == 2 else case["lr"]
    rates: Any = (
        each if case["each"] == "list" else torch.tensor(each, dtype=torch.float64) if case["each"] else case["lr"]
    )
    raw = g
    if correction is not None:
        g = g + correction
    if anchor is not None:
        g = g + case["proximal"] * (theta - anchor)
    squared = g.square().sum(-1)
    if case["max_norm"] is not None:
        g = g * (case["max_norm"] / squared.sqrt().clamp_min(case["max_norm"])).unsqueeze(-1)
    decay = case["weight_decay"]
    settings = {
        "lr": rates, "weight_decay": decay, "anchor": given["anchor"], "correction": given["correction"],
        "proximal": case["proximal"] if anchor is not None else 0.0, "gradient_sum": given["gradient_sum"],
        "max_norm": case["max_norm"], "zero": case["zero"],
    }  # fmt: skip
    if adamw:
        (beta1, beta2), t = case["betas"], case["step"]
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g**2
        below = (second / (1 - beta2**t)).sqrt() + 1e-3
        theta = theta * (1 - lr * decay) - lr / (1 - beta1**t) * first / below
        got = ops.adamw_step(
            given["parameters"], given["gradients"], given["first"], given["second"], t, betas=tuple(case["betas"]),
            eps=1e-3, **settings,
        )  # fmt: skip
    else:
        g = g + decay * theta
        if case["momentum"]:
            g = first = case["momentum"] * first + g
        theta = theta - lr * g
        velocity = given["first"] if case["momentum"] else None
        got = ops.sgd_step(given["parameters"], given["gradients"], velocity, momentum=case["momentum"], **settings)
    # What is rounded on the way is as large as this.
    size = 4.0 * max(1.0, float(case["lr"]) * rows) * (1 + case["proximal"]) * 10
    wanted = {"parameters": theta, "first": first, "second": second if adamw else None}
    wanted["gradient_sum"] = None if total is None else total + raw
    for name, expected in wanted.items():
        tensor_ = given[name]
        if expected is not None and tensor_ is not None:
            assert_close(name, tensor_, expected, relative=1e-5, absolute=1e-6 * size)
    assert not case["zero"] or given["gradients"] is None or not given["gradients"].any()
    torch.testing.assert_close(got.squared_norm, squared, rtol=1e-4, atol=1e-6)
    assert got.finite.shape == squared.shape
    assert bool(got.finite.all())


# -- conv --------------------------------------------------------------------------------------------------------------


@st.composite
def conv_case(draw: st.DrawFn) -> Case:
    dtype, training, pool = draw(st.sampled_from(["float32", "float32", "float64"])), draw(st.booleans()), draw(POOLS)
    stride = draw(st.sampled_from([1, 1, 2]))
    sides = st.integers(1 + (pool - 1) * stride, 9)
    shape = [draw(FEW), draw(st.sampled_from([3, 1, 2, 8, 16])), draw(sides), draw(sides)]
    rows = [-(-size // stride) for size in shape[2:]]
    if training and shape[0] * rows[0] * rows[1] == 1:
        shape[0] = 2
    out = draw(st.sampled_from([8, 1, 5, 16, 24]))
    groups = draw(st.sampled_from([0, 0, *(n for n in (1, 2, 8, out) if out % n == 0)]))
    if groups == out and shape[0] * rows[0] * rows[1] == 1:
        shape[0] = 2
    last = st.sampled_from(["channels_last", "channels_last", *LAYOUTS])
    return {
        "x": {**draw(tensor(shape, dtype)), "layout": draw(last)},
        "weight": draw(tensor([out, shape[1], 3, 3], dtype)),
        **{name: draw(tensor([out], dtype)) for name in ("scale", "shift", "bias")},
        "mean": draw(tensor([out], dtype, grad=False)),
        "variance": draw(tensor([out], dtype, "positive", grad=False)),
        "statistics": not groups and (not training or draw(st.booleans())),
        "groups": groups,
        "biased": groups > 0 and draw(st.booleans()),
        "residual": {**draw(tensor([shape[0], out, *rows], dtype)), "layout": draw(last)},
        "added": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.1, 0, 1.0])),
        "eps": draw(st.sampled_from([1e-5, 0.1])),
        "stride": stride,
        "relu": draw(st.booleans()),
        "pool": pool,
        "update": draw(st.booleans()),
        "training": training,
    }


def check_conv_norm(case: Case) -> None:
    names = ("x", "weight", "scale", "shift", "bias", "residual")
    x, weight, scale, shift, bias, residual = (make(case[name]) for name in names)
    given = [make(case[name]).contiguous().resolve_neg().clone() for name in ("mean", "variance")]
    running = [one.double() for one in given]
    stride, pool, training, groups = case["stride"], case["pool"], case["training"], case["groups"]
    a, w, s, b, c, r = (exact(one) for one in (x, weight, scale, shift, bias, residual))
    B, _, H, W = a.shape
    padded = a.new_zeros(B, a.shape[1], H + 2, W + 2)
    padded[:, :, 1:-1, 1:-1] = a
    taps = [(i, j) for i in range(3) for j in range(3)]
    y = sum(torch.einsum("bchw,oc->bohw", padded[:, :, i : i + H, j : j + W], w[:, :, i, j]) for i, j in taps)
    assert isinstance(y, Tensor)
    y = y[:, :, ::stride, ::stride]
    H, W = y.shape[2:]
    y = y + c[:, None, None] if case["biased"] else y
    many = B * H * W
    mean, variance = (one[:, None, None] for one in running)
    if groups and many:
        parts = y.unflatten(1, (groups, -1))
        variance, mean = torch.var_mean(parts, (2, 3, 4), correction=0)
        mean, variance = (one.repeat_interleave(parts.shape[2], 1)[:, :, None, None] for one in (mean, variance))
    elif training and many:
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        if case["update"]:
            unbiased = variance.detach() * many / (many - 1)
            for one, new in zip(running, (mean.detach(), unbiased), strict=True):
                one += case["momentum"] * (new - one)
        mean, variance = mean[:, None, None], variance[:, None, None]
    deviation = (variance + case["eps"]).sqrt()
    z = s[:, None, None] * (y - mean) / deviation + b[:, None, None]
    z = z + r if case["added"] else z
    # What differences of large numbers lose.
    size = max(1.0, float((y.detach().abs() / deviation.detach()).max())) if y.numel() else 1.0
    size *= 1 + float(scale.detach().abs().max())
    near = float((z.detach().abs() < 2e-5 * size).sum()) if case["relu"] else 0
    z = torch.where(z > 0, z, 0.0) if case["relu"] else z
    if pool == 2:
        windows = z[:, :, : H // 2 * 2, : W // 2 * 2].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        windows = windows.transpose(3, 4).flatten(4)
        first, second = windows.detach().topk(2, -1).values.unbind(-1)
        near += float(((first - second < 2e-5 * size) & (first > 0 if case["relu"] else first == first)).sum())
        z = windows.amax(-1)
    got = ops.conv_norm(
        x, weight, scale, shift, *(given if case["statistics"] else (None, None)), momentum=case["momentum"],
        eps=case["eps"], stride=stride, relu=case["relu"], pool=pool, residual=residual if case["added"] else None,
        update=case["update"], training=training, groups=groups, bias=bias if case["biased"] else None,
    )  # fmt: skip
    inputs = {"x": (x, a), "weight": (weight, w), "scale": (scale, s), "shift": (shift, b)}
    if case["biased"]:
        inputs["bias"] = (bias, c)
    if case["added"]:
        inputs["residual"] = (residual, r)
    if near:  # rounding decides which maximum counts, and whether one does
        got, inputs = got.detach(), {}
    compare(got, z, inputs, absolute=2e-5 * size, gradient=2e-5 * size**2)
    if case["statistics"]:
        for name, ours, theirs in zip(("mean", "variance"), given, running, strict=True):
            assert_close(name, ours, theirs, absolute=1e-5 * size**2)


@st.composite
def pool_case(draw: st.DrawFn) -> Case:
    dtype, side = draw(st.sampled_from(["float32", "float32", "float64"])), draw(st.sampled_from([3, 5]))
    padding = draw(st.sampled_from([0, side // 2]))
    least = side + 1 - 2 * padding
    sides = st.integers(least, least + 7)
    shape = [draw(FEW), draw(st.sampled_from([3, 1, 2, 8, 16])), draw(sides), draw(sides)]
    out = draw(st.sampled_from([8, 1, 5, 16, 24]))
    return {
        "x": draw(tensor(shape, dtype)),
        "weight": draw(tensor([out, shape[1], side, side], dtype)),
        "bias": draw(tensor([out], dtype)),
        "biased": draw(st.booleans()),
        "padding": padding,
        "relu": draw(st.booleans()),
    }


def check_conv_pool(case: Case) -> None:
    x, weight, bias = (make(case[name]) for name in ("x", "weight", "bias"))
    padding, relu, biased = case["padding"], case["relu"], case["biased"]
    a, w, b = exact(x), exact(weight), exact(bias)
    B, C, H, W = a.shape
    padded = a.new_zeros(B, C, H + 2 * padding, W + 2 * padding)
    padded[:, :, padding : padding + H, padding : padding + W] = a
    patches = padded.unfold(2, w.shape[2], 1).unfold(3, w.shape[3], 1)
    y = torch.einsum("bchwij,ocij->bohw", patches, w)
    y = y + b[:, None, None] if biased else y
    # What differences of large numbers lose.
    size = max(1.0, float(y.detach().abs().max())) if y.numel() else 1.0
    windows = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    first, second = windows.detach().topk(2, -1).values.unbind(-1)
    near = (first - second < 2e-5 * size) & ((first > -2e-5 * size) if relu else True)
    if relu:
        near |= first.abs() < 2e-5 * size
    z = windows.amax(-1)
    z = torch.where(z > 0, z, 0.0) if relu else z
    got = ops.conv_pool(x, weight, bias if biased else None, padding=padding, relu=relu)
    inputs = {"x": (x, a), "weight": (weight, w), **({"bias": (bias, b)} if biased else {})}
    if near.any():  # rounding decides which maximum counts, and whether one does
        got, inputs = got.detach(), {}
    compare(got, z, inputs, absolute=2e-5 * size, gradient=2e-5 * size)


OPERATORS: dict[str, tuple[st.SearchStrategy[Case], Callable[[Case], None]]] = {
    "blend": (blend_case(), check_blend),
    "erase_boxes": (boxes_case(), functools.partial(check_boxes, keep=False)),
    "keep_boxes": (boxes_case(), functools.partial(check_boxes, keep=True)),
    "kl_div": (kl_div_case(), check_kl_div),
    "dual_kl": (kl_div_case(), check_dual_kl),
    "ensemble_kl": (ensemble_case(), check_ensemble_kl),
    "js_div": (js_case(), functools.partial(check_stack, consensus=False)),
    "consensus": (js_case(), functools.partial(check_stack, consensus=True)),
    "entropy": (entropy_case(), check_entropy),
    "contrastive": (contrastive_case(), check_contrastive),
    "weighted_mean": (mean_case(), check_weighted_mean),
    "Accumulator": (vectors_case(), check_accumulator),
    "server_step": (server_case(), check_server_step),
    "trimmed_mean": (trimmed_case(), check_trimmed_mean),
    "median": (trimmed_case(), check_median),
    "geometric_median": (trimmed_case(), check_geometric_median),
    "krum": (krum_case(), check_krum),
    "pairwise_distances": (vectors_case(), check_pairwise_distances),
    "clip_by_norm": (clip_case(), check_clip_by_norm),
    "clip_and_noise": (clip_case(), check_clip_and_noise),
    "sgd_step": (step_case(), functools.partial(check_step, adamw=False)),
    "adamw_step": (step_case(), functools.partial(check_step, adamw=True)),
    "fuse_concat": (fuse_case(), check_fuse),
    "fuse_mean": (fuse_case(), check_fuse),
    "conv_norm": (conv_case(), check_conv_norm),
    "conv_pool": (pool_case(), check_conv_pool),
}
