"""Random calls of every public operator beside its reference in float64, and the tolerances of the comparison.

A case is drawn by hypothesis as plain numbers and names, so that it can be printed, sent to another process and shrunk.
:func:`check` makes the tensors, calls the operator, and compares results and gradients with those of the reference.
Families' own tests compare the references with formulas.
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.plain import PLAIN
from fedkern.ops._aggregate.robust_reference import krum_scores_reference
from fedkern.ops._core.backend import forced_backend
from fedkern.ops._distill.checks import spread_weights
from fedkern.ops._distill.ensemble_reference import normalised_weights
from python_tests.ops._conv import conv_cases
from python_tests.ops.operator_cases import assert_close, move_to
from python_tests.ops.operator_runs import tensors_in

Case = dict[str, Any]
CPU = torch.device("cpu")

# -- drawing -----------------------------------------------------------------------------------------------------------

DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("contiguous", "permuted", "strided", "offset", "expanded", "channels_last", "negated")
SIZES = st.sampled_from([1, 0, 1, 2, 3, 5, 7, 8, 16, 17, 33])
FEW = st.sampled_from([1, 0, 2, 3, 4, 5])
POOLS = st.sampled_from([1, 2])
MANY = st.sampled_from([1, 0, 2, 3, 5, 7, 8, 10, 31, 64, 100, 127, 129, 257, 1000])
UPLOADS = st.sampled_from([1, 2, 3, 4, 5, 7, 10, 17, 33])
SEEDS = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
DIMS = st.sampled_from([1, 1, -1, 0])  # axis of the classes
positions = st.lists(st.sampled_from([1, 0, 2, 3, 5]), max_size=2)


@st.composite
def tensor(draw, shape, dtype=dtypes, values="normal", grad=True):
    """Draw a tensor's description for :func:`make`."""
    return {
        "shape": list(shape),
        "dtype": dtype if isinstance(dtype, str) else draw(dtype),
        "values": values if isinstance(values, str) else draw(values),
        "layout": draw(layouts),
        "grad": grad and draw(st.booleans()),
        "seed": draw(SEEDS),
    }


def make(case: Case) -> Tensor:
    """Return the tensor of a case: its values rounded to its dtype, in its layout."""
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
    x = x.to(dtype) if case["layout"] != "expanded" else _expand(x, dtype)
    return _laid_out(x, case["layout"], generator).requires_grad_(case["grad"])


def _expand(x: Tensor, dtype: torch.dtype) -> Tensor:
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


# -- comparing ---------------------------------------------------------------------------------------------------------


def exact(value: Any) -> Any:
    """Return the same value: a floating tensor as a float64 leaf of its own, another one as a copy."""
    if isinstance(value, list):
        return [exact(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.clone()
    return value.detach().double().clone().requires_grad_(value.requires_grad)


DIVERGENCES = {"kl_div", "dual_kl", "ensemble_kl", "js_div", "entropy"}
"""Operators whose results are never negative."""
Arguments = dict[str, Any]
Limits = dict[str, Any]


def keep_given(case: Case, given: Arguments) -> Arguments:
    return given


@dataclass(frozen=True)
class Checked:
    """Making and comparison of random calls of an operator.

    Attributes:
        cases: draws arguments by name, tensors as :func:`make` reads them; a name with a leading "_" is no argument.
        tolerance: of :func:`compare`, by case and arguments; None where nothing can be compared.
        prepare: makes the arguments of a case, before they are copied for the reference.
        view: makes the arguments of the call, in which logits may have their classes on another axis.
        dtype: names of arguments whose promoted dtype the first result has.
        changed: names of arguments that are results too.
        call: the called function; None: the operator itself.
        copy: makes the reference's arguments.
    """

    cases: st.SearchStrategy[Case]
    tolerance: Callable[[Case, Arguments], Limits | None]
    prepare: Callable[[Case, Arguments], Arguments] = keep_given
    view: Callable[[Case, Arguments], Arguments] = keep_given
    dtype: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    call: Callable[..., Any] | None = None
    copy: Callable[[Any], Any] = exact

    def results(self, operator: str, case: Case, given: Arguments) -> list[Tensor]:
        found = (self.call or getattr(ops, operator))(**self.view(case, given))
        parts = [found] if isinstance(found, Tensor) else list(found)
        return [*parts, *(given[name] for name in self.changed if given[name] is not None)]


def agree(
    operator: str, examples: int, device: torch.device = CPU, cases: st.SearchStrategy[Case] | None = None
) -> None:
    """Check random cases, of ``cases`` or of any, on the backend in use, the same ones every time.

    Cases that the backend has no kernel for are left out.
    """

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @drawn(OPERATORS[operator].cases if cases is None else cases)
    def agree_on(case: Case) -> None:
        try:
            check(operator, case, device)
        except RuntimeError as error:
            if not re.search("no kernel|cannot serve", str(error)):
                raise

    agree_on()


def check(operator: str, case: Case, device: torch.device = CPU) -> None:
    """Compare a case on ``device`` with the reference in float64."""
    given = {name: make_value(value) for name, value in case.items() if not name.startswith("_")}
    check_given(operator, case, OPERATORS[operator].prepare(case, given), device)


def check_given(operator: str, case: Case, given: Arguments, device: torch.device = CPU) -> None:
    """Compare a call with these arguments, which are on the CPU, with the reference in float64."""
    checked = OPERATORS[operator]
    wide, tolerance = {name: checked.copy(value) for name, value in given.items()}, checked.tolerance(case, given)
    if tolerance is None:
        return
    given = {name: move_value(value, device) for name, value in given.items()}
    got = [x.cpu() for x in checked.results(operator, case, given)]
    with ops.use_backend("reference"):
        expected = checked.results(operator, case, wide)
    assert not checked.dtype or got[0].dtype == promote(*(x for name in checked.dtype for x in tensors_in(given[name])))
    assert operator not in DIVERGENCES or not (got[0] < 0).any()
    wide_leaves = dict(leaves(wide))
    compare(got, expected, {name: (leaf, wide_leaves[name]) for name, leaf in leaves(given)}, **tolerance)


def move_value(value: Any, device: torch.device) -> Any:
    """Return an argument whose tensors are leaves on ``device``, with their strides."""
    if isinstance(value, list):
        return [move_value(item, device) for item in value]
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    return move_to(value.detach(), device).requires_grad_(value.requires_grad)


def make_value(value: Any) -> Any:
    """Return the tensors of an argument's case."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [make(item) for item in value]
    return make(value) if isinstance(value, dict) else value


def leaves(given: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors that require a gradient."""
    for name, value in given.items():
        for place, x in enumerate(tensors_in(value)):
            if x.requires_grad:
                yield name if x is value else f"{name} {place}", x


def compare(
    got, expected, inputs, *, absolute=1e-6, relative=1e-5, later=None, gradient=None, by_weights=1.0, coarse=False,
    unseen=False, along=None,
):  # fmt: skip
    """Compare results, and the gradients of their product with random numbers, with the reference's.

    ``later``: the absolute tolerance of results after the first.  ``by_weights``: a factor on the tolerance of the
    gradient of weights (:func:`over_weights`).  ``coarse``: computed in fp32, whatever the dtype of a weight or a scale
    and so of its gradient.  ``unseen``: samples of weight 0 are not read, so that their weight gets no gradient.
    ``along``: the gradient of the first result, in place of random numbers.  Absolute tolerances are four times as
    large for the reference, which sums in torch's order and dtype.
    """
    slack = 4.0 if forced_backend() == "reference" else 1.0
    gradient = slack * (absolute if gradient is None else gradient)
    bounds = [slack * absolute, *[slack * (absolute if later is None else later)] * len(got)]
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs), f"result {number}"
            continue
        assert_close(
            f"result {number}", coarsen(ours, coarse), theirs.double(), relative=relative, absolute=bounds[number]
        )
    if not inputs:
        assert not any(x.requires_grad for x in got), "a result requires a gradient, and no input does"
        return
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in got]
    if along is not None:
        grads[0] = along.to(got[0].dtype)
    assert [x.requires_grad for x in got] == [x.requires_grad for x in expected]
    recorded = [number for number, x in enumerate(got) if x.requires_grad]
    ours, theirs = (
        torch.autograd.grad([results[n] for n in recorded], leaves, [given[n] for n in recorded], allow_unused=True)
        for results, leaves, given in (
            (got, [leaf for leaf, _ in inputs.values()], grads),
            (expected, [leaf for _, leaf in inputs.values()], [x.double() for x in grads]),
        )
    )
    for (name, (leaf, _)), our_grad, their_grad in zip(inputs.items(), ours, theirs, strict=True):
        if our_grad is None or their_grad is None:
            assert their_grad is None or not their_grad.any(), f"gradient of {name}: None instead of {their_grad}"
            assert our_grad is None or not our_grad.any(), f"gradient of {name}: {our_grad} instead of none"
            continue
        assert our_grad.dtype == leaf.dtype, f"gradient of {name} is {our_grad.dtype}, not {leaf.dtype}"
        size_ = float(their_grad.abs().nan_to_num(0, 0, 0).max()) if their_grad.numel() else 0.0
        bound = gradient * (by_weights if name == "weights" else 1.0) * max(1.0, size_)
        if name == "weights" and unseen:
            their_grad = their_grad.masked_fill(leaf.detach().cpu() == 0, 0.0)
        our_grad = coarsen(our_grad.cpu(), coarse)
        assert_close(f"gradient of {name}", our_grad, their_grad, relative=relative, absolute=bound)


def coarsen(x: Tensor, coarse: bool) -> Tensor:
    return x.float() if coarse and x.dtype == torch.float64 else x


def promote(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of a result of tensors that may have several."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def is_coarse(*computed: Tensor) -> bool:
    return not any(x.dtype == torch.float64 for x in computed)


def spread(*logits: Tensor | None) -> float:
    """Return the largest difference of finite logits, including those of a student from its teacher."""
    finite = [x.detach().double().flatten() for x in logits if x is not None]
    values = torch.cat([x[x.isfinite()] for x in finite])
    return max(1.0, float(values.max() - values.min())) if values.numel() else 1.0


def largest(*values: Tensor) -> float:
    """Return the largest absolute value, at least 1."""
    return max([1.0, *(float(x.detach().abs().max()) for x in values if x.numel())])


def over_weights(weights: Tensor | None) -> float:
    """Return the factor of weights' gradients, shares over the sum of weights: one over the least sum, at least 1."""
    if weights is None:
        return 1.0
    sums = weights.detach().double().sum(0)
    return max(1.0, float(1 / sums[sums > 0].min())) if bool((sums > 0).any()) else 1.0


# -- distill -----------------------------------------------------------------------------------------------------------

TEMPERATURES = st.sampled_from([1.0, 0.5, 2.0, 4.0, 0.1, 20.0, math.inf])
REDUCTIONS = st.sampled_from(["batchmean", "sum", "none"])
LOGITS = st.sampled_from(["normal", "large", "equal"])
STACKS = ("teachers", "logits")


@st.composite
def rows(draw: st.DrawFn) -> list[int]:
    inner = draw(positions)
    return [draw(FEW if inner else SIZES), draw(MANY.filter(bool)), *inner]


def turn_axis(case: Case, given: Arguments) -> Arguments:
    """Return logits as views whose classes lie on axis ``dim``, and so weights with as many axes as the teachers."""
    dim, found = case["dim"], dict(given)
    stacked = next((given[name] for name in STACKS if name in given and case["_stacked"]), None)
    for name, x in given.items():
        stack = stacked is not None and (name in STACKS or (name == "weights" and case["_by_class"]))
        if isinstance(x, Tensor) and (stack or name in ("student", "teacher", "a", "b", "logits")):
            found[name] = x.movedim(1 + stack, dim if dim < 0 else dim + stack)
    return found


def mask_classes(x: Tensor, share: float, axis: int) -> Tensor:
    """Return ``x`` with some classes at -inf, the first one never.

    A leaf where x is one.
    """
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < share
    draw.select(axis, 0).fill_(False)
    return x.detach().masked_fill(draw, -math.inf).requires_grad_(x.requires_grad)


def times(temperature: float) -> float:
    return 1.0 if temperature == math.inf else max(1.0, temperature)


@st.composite
def divergence_case(draw: st.DrawFn, dual: bool) -> Case:
    shape = draw(rows())
    weight = draw(st.sampled_from([None, [shape[0]], [shape[0], *shape[2:]]]))
    names, options = (
        (("a", "b"), {"direction": draw(st.sampled_from(["teacher", "student"]))}) if dual else (("student",), {})
    )
    return {
        **{name: draw(tensor(shape, values=LOGITS)) for name in (*names, "teacher")},
        "weight": weight and draw(tensor(weight, values="weights")),
        "temperature": draw(TEMPERATURES),
        "reduction": draw(REDUCTIONS),
        "dim": draw(DIMS),
        "_mask": draw(st.sampled_from([0.0, 0.3])),
        "_everywhere": dual or draw(st.booleans()),
        "_same": draw(st.booleans()),
        "_stacked": False,
        **options,
    }


def prepare_divergence(case: Case, given: Arguments) -> Arguments:
    source, second = ("a", "b") if "b" in given else ("student", "teacher")
    if case["_same"]:
        given[second] = given[source].detach().clone().requires_grad_(given[second].requires_grad)
    masked = [*rows_of(given)] if case["_everywhere"] else ["teacher"]
    return given | {name: mask_classes(given[name], case["_mask"], 1) for name in masked} if case["_mask"] else given


def rows_of(given: Arguments) -> dict[str, Tensor]:
    """Return the logits of a divergence by name."""
    return {name: given[name] for name in ("student", "a", "b", "teacher") if name in given}


def close_divergence(case: Case, given: Arguments) -> Limits:
    """Return tolerances that grow with the spread of the logits and with the number of divergences."""
    logits = [*rows_of(given).values()]
    terms, T = len(logits) - 1, case["temperature"]
    size = terms * spread(*logits) * times(T)
    count = max(1, len(logits[0])) if case["reduction"] == "sum" else 1
    absolute = 1e-6 * size * count * (size / terms if math.inf == T else 1)
    return {"absolute": absolute, "gradient": 2e-6 * size, "coarse": is_coarse(*logits)}


@st.composite
def ensemble_case(draw: st.DrawFn) -> Case:
    B, C, *inner = draw(rows())
    K = draw(FEW.filter(bool) if inner else UPLOADS)
    mode = draw(st.sampled_from(["kl_of_mean", "mean_of_kl"]))
    per_teacher = [[K], [K, B, 1], [K, 1, 1]] + ([[K, B]] if B != C else [])
    forms = [None, *per_teacher]
    if mode == "kl_of_mean":
        forms += [[K, 1, C], [K, B, C], *([[K, C]] if B != C else [])]
    weights = draw(st.sampled_from(forms))
    log_probs = draw(st.booleans())
    # Logarithms of probabilities that were rounded to 16 bits are those of no distribution.
    kinds = st.sampled_from(["float32", "float64"]) if log_probs else dtypes
    mix = "probs" if mode == "mean_of_kl" else draw(st.sampled_from(["probs", "logits"]))
    return {
        "student": draw(tensor([B, C, *inner], values=LOGITS)),
        "teachers": draw(tensor([K, B, C, *inner], kinds, LOGITS)),
        "weights": weights and draw(tensor(weights, values="weights")),
        "temperature": draw(TEMPERATURES),
        "mix": mix,
        "mode": mode,
        "class_mask": draw(st.booleans()) and mode == "kl_of_mean",
        "log_probs": log_probs,
        "reduction": draw(REDUCTIONS),
        "dim": draw(DIMS),
        "_mask": draw(st.sampled_from([0.0, 0.3])) if mix == "probs" else 0.0,  # 0 times a mixed -inf is NaN
        "_stacked": True,
        "_by_class": weights is not None and len(weights) == 3 + len(inner),
    }


def prepare_ensemble(case: Case, given: Arguments) -> Arguments:
    teachers = given["teachers"]
    if case["_mask"]:
        given["student"] = mask_classes(given["student"], case["_mask"], 1)
        teachers = teachers.detach().masked_fill(given["student"].isinf(), -math.inf)
        given["teachers"] = teachers.requires_grad_(case["teachers"]["grad"])
    if case["log_probs"]:
        given["teachers"] = teachers.detach().log_softmax(2).requires_grad_(teachers.requires_grad)
    draw = torch.rand(len(teachers), teachers.shape[2], generator=torch.Generator().manual_seed(3)) < 0.7
    return {**given, "class_mask": draw if case["class_mask"] else None}


def close_ensemble(case: Case, given: Arguments) -> Limits:
    student, teachers, weights, T = (given[name] for name in ("student", "teachers", "weights", "temperature"))
    size = spread(student, teachers)
    count = max(1, student.shape[0]) if case["reduction"] == "sum" else 1
    limit = size if math.inf == T else 1
    usual, value, slope = 8e-6 * size * times(T) * limit, 0.0, 0.0
    if case["mix"] == "logits" and math.isfinite(T) and student.numel():
        value, slope = mixing_errors(given)
    return {
        "absolute": 2e-6 * size * times(T) * count * limit + value * count,
        "gradient": usual + slope,
        "by_weights": over_weights(weights) * (usual + slope * size) / (usual + slope),
        # Logarithms of probabilities that were rounded to fp32 do not sum to one any better.
        "coarse": is_coarse(student, teachers) or (case["log_probs"] and teachers.dtype != torch.float64),
        "unseen": True,
    }


def mixing_errors(given: Arguments) -> tuple[float, float]:
    """Return how far a row's loss, and its gradient by the mixed logits, move where fp32 rounds the mixture.

    Each mixed logit is wrong by ``error`` at most: K products and shares, sums and a difference.  With g the gradient
    of a row and G the sum of its sizes, its loss moves by error G, and g in all by 4 error (1 + G / T).
    """
    t, T = given["teachers"].detach().double(), given["temperature"]
    weights = None if given["weights"] is None else spread_weights(given["weights"].detach().double(), t)
    mixed = (normalised_weights(weights, given["class_mask"], t) * t).sum(0).requires_grad_()
    error = (len(t) + 4) / 2 * torch.finfo(torch.float32).eps * float(t.abs().max())
    with ops.use_backend("reference"):
        loss = ops.kl_div(given["student"].detach().double(), mixed, T, reduction="sum")
    steepest = float(torch.autograd.grad(loss, mixed)[0].abs().sum(1).max())
    return error * steepest, 4 * error * (1 + steepest / T)


@st.composite
def stack_case(draw: st.DrawFn) -> Case:
    B, C, *inner = draw(rows())
    K = draw(FEW.filter(bool) if inner else UPLOADS)
    weights = draw(st.sampled_from([None, [K], [K, B], [K, B, *inner]]))
    return {
        "logits": draw(tensor([K, B, C, *inner], values=LOGITS)),
        "weights": weights and draw(tensor(weights, values="weights")),
        "reduction": draw(REDUCTIONS),
        "dim": draw(DIMS),
        "_mask": draw(st.sampled_from([0.0, 0.3])),
        "_stacked": True,
        "_by_class": False,
    }


def prepare_stack(case: Case, given: Arguments) -> Arguments:
    return {**given, "logits": mask_classes(given["logits"], case["_mask"], 2)} if case["_mask"] else given


def close_stack(case: Case, given: Arguments) -> Limits:
    logits = given["logits"]
    size = spread(logits) * (max(1, logits.shape[1]) if case["reduction"] == "sum" else 1)
    # Gradients of weights are differences of entropies, which are log C at most.
    by_weights = over_weights(given["weights"]) * max(1.0, math.log(logits.shape[2]))
    tolerances: Limits = {"absolute": 2e-6 * size, "gradient": 8e-6 * size, "by_weights": by_weights}
    return {**tolerances, "coarse": is_coarse(logits), "unseen": True}


@st.composite
def entropy_case(draw: st.DrawFn) -> Case:
    logits, reduction = draw(tensor(draw(rows()), values=LOGITS)), draw(REDUCTIONS)
    return {"logits": logits, "reduction": reduction, "dim": draw(DIMS), "_stacked": False}


def close_entropy(case: Case, given: Arguments) -> Limits:
    logits = given["logits"]
    size = spread(logits) * (max(1, logits.shape[0]) if case["reduction"] == "sum" else 1)
    return {"absolute": 1e-6 * size, "gradient": 4e-6 * size}


# -- contrast ----------------------------------------------------------------------------------------------------------


@st.composite
def contrastive_case(draw: st.DrawFn) -> Case:
    shape = [draw(SIZES), draw(SIZES)]
    temperature = draw(st.sampled_from([1.0, 0.5, 0.07, 0.01, 30.0, "tensor"]))
    return {
        "x": draw(tensor(shape)),
        "y": draw(tensor(shape)),
        "temperature": temperature,
        "_learnt": draw(st.booleans()),
    }


def prepare_contrastive(case: Case, given: Arguments) -> Arguments:
    if given["temperature"] != "tensor":
        return given
    return {**given, "temperature": torch.tensor(0.3, requires_grad=case["_learnt"])}


def close_contrastive(case: Case, given: Arguments) -> Limits:
    x, y, T = given["x"], given["y"], float(given["temperature"])
    size = largest(x.detach().double() @ y.detach().double().T / T)
    # The derivative by the temperature is a sum of scores over the temperature, which may cancel.
    return {"absolute": 4e-6 * size, "gradient": 2e-5 * max(1, size / min(1.0, T)), "coarse": is_coarse(x, y)}


# -- blend -------------------------------------------------------------------------------------------------------------


@st.composite
def blend_case(draw: st.DrawFn) -> Case:
    B, N = draw(FEW), draw(FEW)
    dtype, inner = draw(dtypes), draw(st.lists(SIZES, max_size=3))
    background_dtype = draw(st.sampled_from([dtype, *DTYPES]))
    indexed = draw(st.booleans()) and (N > 0 or B == 0)
    alpha = draw(st.sampled_from([0.3, 1, [], [B]]))
    return {
        "foreground": draw(tensor([B, *inner], dtype)),
        "background": draw(tensor([N if indexed else B, *inner], background_dtype)),
        "alpha": draw(tensor(alpha, values="unit")) if isinstance(alpha, list) else alpha,
        "_index": draw(st.sampled_from(["contiguous", "strided", "expanded"])) if indexed else None,
    }


def prepare_blend(case: Case, given: Arguments) -> Arguments:
    B, N = len(given["foreground"]), len(given["background"])
    if case["_index"] is None:
        return given
    index = torch.randint(max(N, 1), (B,), generator=torch.Generator().manual_seed(1))
    if case["_index"] == "expanded" and B:
        index = index[:1].expand(B)
    elif case["_index"] == "strided":
        index = _laid_out(index, "strided", torch.Generator().manual_seed(0))
    return {**given, "index": index}


def close_blend(case: Case, given: Arguments) -> Limits:
    terms = max(1.0, math.sqrt(given["foreground"].numel()) / 8)  # the reference sums alpha's gradient in fp32
    return {"relative": 1e-6, "gradient": 1e-6 * terms, "coarse": is_coarse(given["foreground"])}


@st.composite
def boxes_case(draw: st.DrawFn) -> Case:
    B, C, H, W = draw(FEW), draw(FEW), draw(SIZES), draw(SIZES)
    images = draw(tensor([B, C, H, W], st.sampled_from([*DTYPES, "uint8", "int64"]), "integers"))
    images["grad"] = images["grad"] and images["dtype"] in DTYPES
    return {
        "images": images,
        "fill": draw(st.sampled_from(["number", "sequence", "tensor"])),
        "_counts": [draw(st.integers(0, 3)) for _ in range(B)],
        "_padded": draw(st.booleans()),
        "_dtype": draw(st.sampled_from(["float32", "float64", "int64", "float16"])),
        "_seed": draw(SEEDS),
    }


def prepare_boxes(case: Case, given: Arguments) -> Arguments:
    _, C, H, W = given["images"].shape
    generator, dtype = torch.Generator().manual_seed(case["_seed"]), getattr(torch, case["_dtype"])
    boxes: Any = [
        (torch.rand(n, 4, generator=generator) * (max(H, W) + 4) - 2).to(dtype) for n in case["_counts"]
    ]  # fmt: skip
    if case["_padded"]:
        boxes = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True) if boxes else torch.zeros(0, 0, 4, dtype=dtype)
    values = [float(c % 5) for c in range(C)]
    fill = {"number": 2, "sequence": values, "tensor": torch.tensor(values)}[given["fill"]]
    return {**given, "boxes": boxes, "fill": fill}


# -- aggregate ---------------------------------------------------------------------------------------------------------

WEIGHTS = st.sampled_from(["list", "tuple", "numpy", "float64", "float32", "int64", "strided", "tensor"])


@st.composite
def vectors_case(draw: st.DrawFn, weighted: bool | None = False, grad: bool = False) -> Case:
    """Draw vectors, with their number as "_count", and weights: always, never, or (None) sometimes."""
    M, P, dtype = draw(UPLOADS), draw(st.one_of(MANY, st.just(2051))), draw(dtypes)
    values = draw(st.sampled_from(["normal", "equal", "large"]))
    if draw(st.booleans()):
        given: Any = draw(tensor([M, P], dtype, values, grad))
    else:
        given = [draw(tensor([P], dtype, values, grad)) for _ in range(M)]
    case: Case = {"vectors": given, "_count": M}
    if weighted or (weighted is None and draw(st.booleans())):
        case["weights"] = draw(tensor([M], st.sampled_from(["float32", "float64"]), "weights", grad))
        case["_form"] = draw(WEIGHTS)
    return case


def prepare_vectors(case: Case, given: Arguments) -> Arguments:
    """Return weights in one of many forms, the first never 0."""
    if "weights" not in given:
        return given
    weights = given["weights"].detach().clone()
    weights[:1] = 1.5
    form = case["_form"]
    if form == "tensor":
        return {**given, "weights": weights.requires_grad_(case["weights"]["grad"])}
    if form == "int64":
        return {**given, "weights": (weights * 3).ceil().long()}
    if form == "strided":
        return {**given, "weights": weights.repeat_interleave(3)[::3]}
    if form in ("float64", "float32"):
        return {**given, "weights": weights.to(getattr(torch, form))}
    values = weights.double().tolist()
    return {**given, "weights": {"list": values, "tuple": tuple(values), "numpy": np.array(values)}[form]}


def close_robust(case: Case, given: Arguments) -> Limits:
    size = largest(*tensors_in(given["vectors"]))
    return {"relative": 1e-6, "absolute": 1e-7 * size, "gradient": 1e-6 * size}


@st.composite
def mean_case(draw: st.DrawFn) -> Case:
    out = draw(st.sampled_from([None, *DTYPES, "vector"]))
    case = draw(vectors_case(weighted=True, grad=out is None))
    size = (case["vectors"] if isinstance(case["vectors"], dict) else case["vectors"][0])["shape"][-1]
    if out in DTYPES:
        case["out"] = draw(tensor([size], out, grad=False))
        if case["out"]["layout"] in ("expanded", "negated"):
            case["out"]["layout"] = "contiguous"
    return {**case, "_within": out == "vector"}


def view_mean(case: Case, given: Arguments) -> Arguments:
    return {**given, "out": given["vectors"][0]} if case["_within"] else given


def take_mean(**given: Any) -> Tensor:
    mean = ops.weighted_mean(**given)
    assert given.get("out") is None or mean is given["out"]
    return mean


def close_mean(case: Case, given: Arguments) -> Limits | None:
    vector = given["vectors"][0]
    if case["_within"] and (vector.is_neg() or (0 in vector.stride() and vector.numel() > 1)):
        return None
    return close_robust(case, given)


def accumulate(vectors: Any, weights: Any) -> list[Tensor]:
    """Return the means of both accumulators, the exact one's in another order."""
    totals = [ops.Accumulator(len(vectors[0]), exact=kept, device=vectors[0].device) for kept in (False, True)]
    for total, order in zip(totals, (range(len(vectors)), reversed(range(len(vectors)))), strict=True):
        for m in order:
            total.add(vectors[m], float(weights[m]))
    return [total.mean() for total in totals]


@st.composite
def server_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case(weighted=True))
    vectors = case["vectors"] if isinstance(case["vectors"], dict) else case["vectors"][0]
    size, rule = vectors["shape"][-1], draw(st.sampled_from(["mean", "momentum", "adam", "yogi", "adagrad"]))
    state = {"dtype": draw(st.sampled_from(["float32", "float64"])), "grad": False, "seed": 2, "layout": "contiguous"}
    states = ("first", "second")[: {"mean": 0, "momentum": 1}.get(rule, 2)]
    kinds = {"first": "normal", "second": "positive"}
    global_, out = draw(tensor([size], vectors["dtype"], grad=False)), draw(st.sampled_from([None, "global_", *DTYPES]))
    if out == "global_" and global_["layout"] in ("expanded", "negated"):
        global_["layout"] = "contiguous"
    return {
        **case,
        "global_": global_,
        "rule": rule,
        **{name: {**state, "shape": [size], "values": kinds[name]} if name in states else None for name in kinds},
        "learning_rate": draw(st.sampled_from([None, 0.5])),
        "similarities": draw(st.booleans()),
        "_out": out,
    }


def server_step(**given: Any) -> list[Tensor]:
    step = ops.server_step(**given)
    assert given.get("out") is None or step.model is given["out"]
    return [step.model, step.norms, step.cosines.float()]


def prepare_server(case: Case, given: Arguments) -> Arguments:
    if case["_out"] in DTYPES:
        given["out"] = torch.zeros(len(given["global_"]), dtype=getattr(torch, case["_out"]))
    return prepare_vectors(case, given)


def view_server(case: Case, given: Arguments) -> Arguments:
    return {**given, "out": given["global_"]} if case["_out"] == "global_" else given


def close_server(case: Case, given: Arguments) -> Limits:
    size = largest(*tensors_in(given["vectors"]))
    return {"relative": 1e-6, "absolute": 1e-6 * size, "later": 1e-6 * size**2}


@st.composite
def trimmed_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case(weighted=None))
    return {**case, "trim": draw(st.integers(0, (case["_count"] - 1) // 2))}


def objective(vectors: Any, weights: Any = None) -> Tensor:
    """Return the sum of the distances to the geometric median."""
    wide = torch.stack(list(vectors)).double()
    by = torch.ones(len(wide)) if weights is None else torch.as_tensor(weights)
    point = ops.geometric_median(vectors, weights)
    return (by.double() * (wide - point.double()).square().sum(1).sqrt()).sum()


def close_objective(case: Case, given: Arguments) -> Limits:
    wide = tensors_in(given["vectors"])
    eps, count = torch.finfo(wide[0].dtype).eps, sum(x.numel() for x in wide)
    by = case["_count"] * (largest(torch.as_tensor(given["weights"])) if "weights" in given else 1.0)
    unit = eps * largest(*wide) * math.sqrt(max(1, count)) * by
    return {"relative": 1e-6, "absolute": unit + 1e-5, "coarse": True}


@st.composite
def krum_case(draw: st.DrawFn) -> Case:
    case = draw(vectors_case())
    M = case["_count"]
    byzantine = draw(st.integers(0, max(0, (M - 3) // 2)))
    return {**case, "byzantine": byzantine, "keep": draw(st.integers(1, max(1, M - byzantine)))}


def close_krum(case: Case, given: Arguments) -> Limits | None:
    f, keep, M = case["byzantine"], case["keep"], case["_count"]
    if 2 * f + 2 >= M:
        with pytest.raises(ValueError, match=r"byzantine"):
            ops.krum(given["vectors"], f, keep)
        return None
    rows = [x.detach().double() for x in given["vectors"]]
    scores = krum_scores_reference(PLAIN.squared_distances(rows), f).sort().values.tolist()
    # Which of two is closer may be decided by rounding.
    decided = keep == M or scores[keep] - scores[keep - 1] > 1e-9 * max(scores[keep - 1], 1e-12) or scores[keep] == 0
    return close_robust(case, given) if decided else None


@st.composite
def clip_case(draw: st.DrawFn, noisy: bool) -> Case:
    case = draw(vectors_case())
    case["_single"] = draw(st.booleans()) and isinstance(case["vectors"], list)
    case["max_norm"] = draw(st.sampled_from([1.0, 0.1, 6e3, 3]))
    if noisy:
        case["noise"] = draw(st.sampled_from([0.0, 1.0, 0.3]))
        case["seed"] = draw(st.integers(0, 2**64 - 1))
        case["offset"] = draw(st.one_of(st.integers(0, 200), st.integers(2**63, 2**64 - 1)))
    return case


def prepare_clip(case: Case, given: Arguments) -> Arguments:
    return {**given, "vectors": given["vectors"][0]} if case["_single"] else given


def close_clip(case: Case, given: Arguments) -> Limits:
    """Return tolerances: the noise has fp32 resolution whatever the dtype."""
    size, noise = largest(*tensors_in(given["vectors"])), case.get("noise", 0.0)
    absolute = 2e-6 * max(size, 7 * noise * case["max_norm"]) if noise else 1e-7 * size
    return {"relative": 1e-6, "absolute": absolute, "coarse": noise > 0}


# -- fuse --------------------------------------------------------------------------------------------------------------


@st.composite
def fuse_case(draw: st.DrawFn, mean: bool) -> Case:
    B, dtype = draw(FEW), draw(dtypes)
    inner = draw(st.one_of(positions, st.sampled_from([[16, 17], [2, 3, 4], [1, 300]])))
    M, widths = draw(st.sampled_from([1, 2, 3, 5, 50])), SIZES if len(inner) < 2 else FEW
    width = draw(widths)
    channels = [width if mean else draw(widths) for _ in range(M)]
    return {
        "features": [draw(tensor([B, c, *inner], dtype)) for c in channels],
        **{name: draw(tensor([sum(channels)])) if draw(st.booleans()) else None for name in ("scale", "shift")},
        "activation": draw(st.sampled_from([None, "relu"])),
    }


def close_fuse(case: Case, given: Arguments) -> Limits | None:
    features, scale, shift = given["features"], given["scale"], given["shift"]
    if case["activation"] and not scale is shift is None:
        with ops.use_backend("reference"):
            value = ops.fuse_concat([x.detach().double() for x in features], exact(scale), exact(shift))
        if bool((value.detach().abs() < 1e-5).any()):  # whether it counts is decided by rounding
            return None
    return {"absolute": 2e-6, "gradient": 2e-6, "coarse": is_coarse(*features)}


# -- optimise ----------------------------------------------------------------------------------------------------------


@st.composite
def step_case(draw: st.DrawFn, adamw: bool) -> Case:
    shape = [draw(MANY)] if draw(st.booleans()) else [draw(FEW), draw(MANY)]
    dtype = draw(dtypes)

    def vector(values: str = "normal", own: bool = False) -> Case:
        case: Case = draw(tensor(shape if own or draw(st.booleans()) else shape[-1:], dtype, values, grad=False))
        if own and case["layout"] == "expanded":  # is refused where it is written to
            case["layout"] = "strided"
        return case

    rate, form = draw(st.sampled_from([0.1, 0.0, 1.0, 1e-3])), draw(st.sampled_from(["", "list", "tensor"]))
    rates = [rate * (m + 1) for m in range(shape[0])] if form and len(shape) == 2 else rate
    anchored, momentum = draw(st.booleans()), draw(st.sampled_from([0.0, 0.9, 0.5]))
    own: Case = {"velocity": vector(own=True) if momentum else None, "momentum": momentum}
    if adamw:
        betas, step = draw(st.sampled_from([(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)])), draw(st.sampled_from([1, 2, 1000]))
        moments = {"first": vector(own=True), "second": vector("positive", own=True)}
        own = {**moments, "betas": betas, "step": step, "eps": 1e-3}
    return {
        "parameters": vector(own=True),
        "gradients": vector(own=True),
        **own,
        "anchor": vector() if anchored else None,
        "correction": vector() if draw(st.booleans()) else None,
        "gradient_sum": vector(own=True) if draw(st.booleans()) else None,
        "lr": rates,
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 1.0])),
        "proximal": draw(st.sampled_from([0.0, 0.01, 2.0])) if anchored else 0.0,
        "max_norm": draw(st.sampled_from([None, 0.5, 1e4])),
        "zero": draw(st.booleans()),
        "_tensor": form == "tensor" and len(shape) == 2,
    }


def prepare_step(case: Case, given: Arguments) -> Arguments:
    return {**given, "lr": torch.tensor(given["lr"], dtype=torch.float64)} if case["_tensor"] else given


def take_step(**given: Any) -> list[Tensor]:
    step = (ops.adamw_step if "first" in given else ops.sgd_step)(**given)
    return [step.finite, step.squared_norm.float()]


def close_step(case: Case, given: Arguments) -> Limits:
    """Return tolerances by the size of the intermediate numbers that are rounded."""
    rates = case["lr"] if isinstance(case["lr"], list) else [case["lr"]]
    return {"absolute": 4e-5 * max([1.0, *rates]) * (1 + case["proximal"]), "relative": 1e-5}


# -- conv --------------------------------------------------------------------------------------------------------------

MAPS = st.sampled_from([1, 0, 2, 3, 5, 33])
OUT = st.sampled_from([8, 1, 5, 16, 24])


def draw_layouts(draw: st.DrawFn, served: bool) -> tuple[bool, st.SearchStrategy[str], st.SearchStrategy[str], str]:
    """Return whether a convolution's kernel shall serve, layouts of maps and of vectors, and the dtype."""
    if served or draw(st.booleans()):
        return True, st.sampled_from(["channels_last", "channels_last", "contiguous"]), st.just("contiguous"), "float32"
    return False, st.sampled_from(["channels_last", *LAYOUTS]), layouts, draw(st.sampled_from(["float32", "float64"]))


@st.composite
def conv_case(draw: st.DrawFn, layer: Any = None) -> Case:
    training, pool, (served, maps, vectors, dtype) = draw(st.booleans()), draw(POOLS), draw_layouts(draw, bool(layer))
    stride, kernel, (channels, out, *sizes) = layer or draw(st.sampled_from(conv_cases.SHAPES))
    if not served:
        sides = st.integers(1 + (pool - 1) * stride, 9)
        channels, out, sizes = draw(st.sampled_from([3, 1, 2, 8, 16])), draw(OUT), [draw(sides), draw(sides)]
    shape, rows = [draw(MAPS), channels, *sizes], [-(-size // stride) for size in sizes]
    groups = draw(st.sampled_from([0, 0, *(n for n in (1, 2, 8, out) if out % n == 0)]))
    if (training or groups == out) and shape[0] * rows[0] * rows[1] == 1:
        shape[0] = 2
    statistics = not groups and (not training or draw(st.booleans()))
    residual = draw(st.booleans()) and not (served and pool == 2)

    def make_case(shape: list[int], layouts: st.SearchStrategy[str], **settings: Any) -> Case:
        return {**draw(tensor(shape, dtype, **settings)), "layout": draw(layouts)}

    running = st.sampled_from(["contiguous", "contiguous", "strided"])
    return {
        "x": make_case(shape, maps),
        "weight": make_case([out, channels, kernel, kernel], maps),
        **{name: make_case([out], vectors) for name in ("scale", "shift")},
        "bias": make_case([out], vectors) if groups > 0 and draw(st.booleans()) else None,
        "mean": make_case([out], running, grad=False) if statistics else None,
        "variance": make_case([out], running, values="positive", grad=False) if statistics else None,
        "groups": groups,
        "residual": make_case([shape[0], out, *rows], maps) if residual else None,
        "momentum": draw(st.sampled_from([0.1, 0, 1.0])),
        "eps": draw(st.sampled_from([1e-5, 0.1])),
        "stride": stride,
        "relu": draw(st.booleans()),
        "pool": pool,
        "update": draw(st.booleans()),
        "training": training,
    }


@st.composite
def pool_case(draw: st.DrawFn, layer: Any = None) -> Case:
    served, maps, vectors, dtype = draw_layouts(draw, bool(layer))
    side, padding, channels, out, *sizes = layer or draw(st.sampled_from(conv_cases.POOLED))
    if not served:
        smallest = side + 1 - 2 * padding
        sides = st.integers(smallest, smallest + 7)
        channels, out, sizes = draw(st.sampled_from([3, 1, 2, 8, 16])), draw(OUT), [draw(sides), draw(sides)]
    return {
        "x": {**draw(tensor([draw(MAPS), channels, *sizes], dtype)), "layout": draw(maps)},
        "weight": {**draw(tensor([out, channels, side, side], dtype)), "layout": draw(maps)},
        "bias": {**draw(tensor([out], dtype)), "layout": draw(vectors)} if draw(st.booleans()) else None,
        "padding": padding,
        "relu": draw(st.booleans()),
    }


def close_conv(case: Case, given: Arguments) -> Limits:
    """Return tolerances by the digits that differences of large numbers lose.

    The gradient is 0 where rounding decides what passes.
    """
    wide = {name: exact(x.detach()) if isinstance(x, Tensor) else x for name, x in given.items()}
    x, weight, bias, normed = wide["x"], wide["weight"], wide["bias"], "scale" in given
    z = torch.nn.functional.conv2d(x, weight, bias, case.get("stride", 1), case.get("padding", weight.shape[-1] // 2))
    size, power = largest(z), 1
    if normed:
        parts = z.unflatten(1, (case["groups"] or z.shape[1], -1))
        batch = (2, 3, 4) if case["groups"] else (0, 2, 3, 4)
        given_variance = case["mean"] is not None and not case["training"]
        variances = wide["variance"] if given_variance or not z.numel() else parts.var(batch, correction=0)
        variance = 1.0 if variances is None else float(variances.min())
        size = max(1.0, size / (variance + case["eps"]) ** 0.5) * (1 + largest(wide["scale"]))
        power = 2
        with ops.use_backend("reference"):
            z = ops.conv_norm(**{**wide, "relu": False, "pool": 1, "update": False})
    along = conv_cases.grad_of(z, case["relu"], case.get("pool", 2), 0, near=4e-5 * size)
    return {"absolute": 2e-5 * size, "later": 2e-5 * size**power, "gradient": 2e-5 * size**power, "along": along}


OPERATORS = {
    "blend": Checked(blend_case(), close_blend, prepare_blend, dtype=("foreground", "background")),
    **{
        name: Checked(
            boxes_case(), lambda case, given: {"relative": 0, "absolute": 0}, prepare_boxes, dtype=("images",)
        )
        for name in ("erase_boxes", "keep_boxes")
    },
    "kl_div": Checked(
        divergence_case(False), close_divergence, prepare_divergence, turn_axis, dtype=("student", "teacher")
    ),
    "dual_kl": Checked(
        divergence_case(True), close_divergence, prepare_divergence, turn_axis, ("a", "b", "teacher")
    ),
    "ensemble_kl": Checked(ensemble_case(), close_ensemble, prepare_ensemble, turn_axis, dtype=("student", "teachers")),
    "js_div": Checked(stack_case(), close_stack, prepare_stack, turn_axis, ("logits",)),
    "consensus": Checked(stack_case(), close_stack, prepare_stack, turn_axis, ("logits",)),
    "entropy": Checked(entropy_case(), close_entropy, view=turn_axis, dtype=("logits",)),
    "contrastive": Checked(contrastive_case(), close_contrastive, prepare_contrastive, dtype=("x", "y")),
    "weighted_mean": Checked(mean_case(), close_mean, prepare_vectors, view_mean, call=take_mean),
    "Accumulator": Checked(
        vectors_case(weighted=True), close_robust, prepare_vectors, dtype=("vectors",), call=accumulate
    ),
    "server_step": Checked(
        server_case(), close_server, prepare_server, view_server, changed=("first", "second"), call=server_step
    ),
    "trimmed_mean": Checked(trimmed_case(), close_robust, prepare_vectors, dtype=("vectors",)),
    "median": Checked(vectors_case(weighted=None), close_robust, prepare_vectors, dtype=("vectors",)),
    "geometric_median": Checked(vectors_case(weighted=None), close_objective, prepare_vectors, call=objective),
    "krum": Checked(krum_case(), close_krum, dtype=("vectors",)),
    "pairwise_distances": Checked(vectors_case(), lambda case, given: {"absolute": 0}),
    "clip_by_norm": Checked(clip_case(False), close_clip, prepare_clip, dtype=("vectors",), copy=copy.deepcopy),
    "clip_and_noise": Checked(clip_case(True), close_clip, prepare_clip, dtype=("vectors",), copy=copy.deepcopy),
    "sgd_step": Checked(
        step_case(False), close_step, prepare_step, call=take_step,
        changed=("parameters", "gradients", "velocity", "gradient_sum"),
    ),
    "adamw_step": Checked(
        step_case(True), close_step, prepare_step, call=take_step,
        changed=("parameters", "gradients", "first", "second", "gradient_sum"),
    ),
    "fuse_concat": Checked(fuse_case(False), close_fuse, dtype=("features",)),
    "fuse_mean": Checked(fuse_case(True), close_fuse, dtype=("features",)),
    "conv_norm": Checked(conv_case(), close_conv, changed=("mean", "variance")),
    "conv_pool": Checked(pool_case(), close_conv),
}  # fmt: skip
