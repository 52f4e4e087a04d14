"""Cases of ensemble_kl, js_div and consensus: stacks of K teachers in many shapes, and the expected results."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core.backend import compute_dtype
from fedkern.ops._distill.checks import spread_row_weights, spread_weights
from fedkern.ops._distill.ensemble_reference import consensus_reference, ensemble_reference, js_reference
from fedkern.ops._distill.rows import LOGITS, MEAN, PROBS, REDUCTIONS
from python_tests.ops.operator_cases import assert_close, move_to, pairwise, thin_out, using

CPU = torch.device("cpu")
FACTOR = 3.0  # every loss is multiplied before backward: a dropped grad_output shows
LARGEST = 40_000  # elements of a case
# What mixes for a student: ensemble_kl's arguments, and the reference's.
MIXES: dict[str, tuple[dict[str, Any], int]] = {
    "probs": ({"mix": "probs"}, PROBS),
    "logits": ({"mix": "logits"}, LOGITS),
    "mean": ({"mode": "mean_of_kl"}, MEAN),
}

COMMON: dict[str, Any] = {
    "teachers": (1, 2, 3, 5, 20),
    "classes": (1, 2, 3, 7, 10, 17, 100, 129, 700, 3000),
    "rows": (0, 1, 2, 7, 16, 33),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "reduction": ("none", "sum", "batchmean"),
    "layout": ("stacked", "gaps", "batch_first", "positions", "channels_last"),
    "near": (None, 1e-2, 1e-3, 0.0),
    "zeros": (False, True),
    "special": (None, "extreme", "masked"),
    "weights_dtype": (None, torch.float64, torch.float32, torch.bfloat16),  # None: that of the arithmetic
}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).to(dtype)


def lay_out(values: Tensor, layout: str, rows: int) -> Tensor:
    """Return the same logits, classes last, in another shape or with other strides that the operators do not copy."""
    if layout == "gaps":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 3), 7.0)
        return wide[..., 1 : 2 * values.shape[-1] : 2].copy_(values)
    if layout == "batch_first":
        return values.transpose(0, -2).contiguous().transpose(0, -2)
    if layout in ("positions", "channels_last"):
        width = 3 if rows % 3 == 0 else 1
        split = values.unflatten(-2, (rows // width, width)).transpose(-1, -2)
        return split.contiguous() if layout == "positions" else split.transpose(-1, -2).contiguous().transpose(-1, -2)
    return values


def make_inputs(case: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return student, teachers and weights (in a shape that the case names) of a case."""
    generator = torch.Generator().manual_seed(seed)
    count, classes, rows = case["teachers"], case["classes"], case["rows"]
    if count * classes * rows > LARGEST:
        rows = 2
    student = torch.randn(rows, classes, generator=generator) * 2
    noise = torch.randn(count, rows, classes, generator=generator)
    teachers = 2 * noise if case["near"] is None else student + case["near"] * noise
    if case["special"] == "extreme":
        teachers[0, :, 0], teachers[-1, :, classes // 2], student[:, -1] = 1e4, -1e4, 1e4
    if case["special"] == "masked":
        masked = torch.rand(rows, classes, generator=generator) < 0.3
        masked[:, 0] = False
        teachers, student = teachers.masked_fill(masked, -math.inf), student.masked_fill(masked, -math.inf)
        if count > 2:
            teachers[1, :, 1:] = -math.inf  # who knows one class only
    if case.get("log_probs"):
        teachers = teachers.log_softmax(-1)
    student, teachers = (lay_out(x.to(case["dtype"]), case["layout"], rows) for x in (student, teachers))
    batch, positions = student.shape[0], student.shape[2:]
    shapes: dict[str, tuple[int, ...]] = {
        "K": (count,), "KB": (count, batch), "KB1": (count, batch, 1), "KC": (count, classes),
        "K1C": (count, 1, classes), "KBC": (count, batch, classes), "full": (count, batch, classes, *positions),
        "rows": (count, batch, *positions),
    }  # fmt: skip
    if case["weights"] is None:
        return student, teachers, None
    name = case["weights"]
    if batch == classes and "mix" in case:  # [K, B] or [K, C]?
        name = {"KB": "KB1", "KC": "K1C"}.get(name, name)
    weights = torch.rand(shapes[name], generator=generator) + 0.1
    if case["zeros"]:
        weights[torch.rand(weights.shape, generator=generator) < 0.4] = 0
    return student, teachers, weights.to(case.get("weights_dtype") or compute_dtype(case["dtype"]))


def differentiate(compute, tensors, needs):
    leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    loss = compute(*leaves)
    steps = torch.arange(loss.numel(), dtype=torch.float64, device=loss.device).reshape(loss.shape) % 5 + 1
    (loss * (FACTOR * steps).to(loss.dtype)).sum().backward()
    return loss.detach(), [None if x is None else x.grad for x in leaves]


def exactly(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def compare(case, names, compute, reference, tensors, needs, stacked=True):
    """Compare a case on the backends ``names`` with ``reference`` in float64.

    ``tensors``: student, teachers and weights; logits of one shape and their weight where none is ``stacked``.
    """
    expected, gradients = differentiate(reference, [exactly(x) for x in tensors], needs)
    finite = torch.cat([x.double()[x.isfinite()].flatten() for x in tensors[:-1] if x is not None])
    spread = max(1.0, float(finite.max() - finite.min())) if finite.numel() else 1.0
    temperature = case.get("temperature", 1.0)
    scale = spread * (temperature if temperature < math.inf else 1.0)
    sample = tensors[1][0] if stacked else tensors[0]
    rows = max(sample.numel() // case["classes"], 1)
    # What a sum over rows may be off by grows with the rows, a gradient's error with what it is multiplied by.
    factor = {"none": 5 * FACTOR, "sum": FACTOR, "batchmean": FACTOR / rows}[case["reduction"]]
    for name in names:
        with using(name):
            loss, got = differentiate(compute, tensors, needs)
        assert loss.dtype == case["dtype"]
        wide = 10 if name == "reference" else 1  # autograd through the reference subtracts larger terms
        magnitude = scale * (rows if case["reduction"] == "sum" else 1)
        assert_close(f"{name} loss", loss, expected, absolute=1e-6 * magnitude)
        assert not (loss < 0).any(), f"{name}: negative"
        for i, (ours, theirs, x) in enumerate(zip(got, gradients, tensors, strict=True)):
            assert (ours is None) == (theirs is None)
            if ours is None or theirs is None or x is None:
                continue
            assert ours.dtype == x.dtype, f"{name}: gradient {i} in another dtype"
            if i == len(tensors) - 1 and stacked:
                # Differences of losses, summed over all rows and classes that share a weight; at T = infinity those
                # are squares of logits.
                shared = factor * max(rows * case["classes"] // max(x[0].numel(), 1), 1)
                loss_scale = spread**2 if math.isinf(temperature) else scale * max(temperature, 1)
                if case["dtype"] is not torch.float64 and ours.dtype is torch.float64:
                    ours = ours.float()  # computed as the losses are
                assert_close(f"{name} weights' gradient", ours, theirs, absolute=1e-6 * wide * loss_scale * shared)
                continue
            if i < len(tensors) - 1 and case["layout"] in ("stacked", "rows", "positions", "channels_last"):
                assert strides(ours) == strides(x), f"{name}: gradient {i} in another memory format"
            assert_close(f"{name} gradient {i}", ours, theirs, absolute=1e-6 * wide * scale * factor)


def strides(x: Tensor) -> list[int]:
    """Return the strides of axes longer than 1."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def ensemble(case: dict[str, Any], mask: Tensor | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the operator of a case, and its reference."""
    temperature, log_probs, reduction = (case[n] for n in ("temperature", "log_probs", "reduction"))
    names, mix = MIXES[case["mix"]]

    def compute(student: Tensor, teachers: Tensor, weights: Tensor | None) -> Tensor:
        return ops.ensemble_kl(
            student, teachers, weights, temperature, class_mask=mask, log_probs=log_probs, reduction=reduction, **names
        )

    def reference(student: Tensor, teachers: Tensor, weights: Tensor | None) -> Tensor:
        spread = None if weights is None else spread_weights(weights, teachers)
        code = REDUCTIONS[reduction]
        return ensemble_reference(student, teachers, spread, mask, temperature, mix, log_probs, code)

    return compute, reference


def agreement(case: dict[str, Any]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return js_div, or both results of consensus, and the reference."""
    reduction = case["reduction"]

    def compute(_: None, stack: Tensor, weights: Tensor | None) -> Tensor:
        if case["operator"] == "js_div":
            return ops.js_div(stack, weights, reduction=reduction)
        return torch.stack(ops.consensus(stack, weights, reduction=reduction))

    def reference(_: None, stack: Tensor, weights: Tensor | None) -> Tensor:
        spread = None if weights is None else spread_row_weights(weights, stack)
        if case["operator"] == "js_div":
            return js_reference(stack, spread, REDUCTIONS[reduction])
        return torch.stack(consensus_reference(stack, spread, REDUCTIONS[reduction]))

    return compute, reference


# --- ensemble_kl in every way

ENSEMBLES = pairwise(
    {
        **COMMON,
        "temperature": (0.5, 1.0, 4.0, math.inf),
        "mix": ("probs", "logits", "mean"),
        "log_probs": (False, True),
        "weights": (None, "K", "KB", "KB1", "KC", "K1C", "KBC", "full"),
        "mask": (False, True),
        "needs": ("student", "teachers", "all"),
    },
    seed=3,
)
NEEDS = {"student": (True, False, False), "teachers": (False, True, False), "all": (True, True, True)}


def run_ensemble(number: int, names: list[str], device: torch.device = CPU) -> None:
    """Run case ``number`` of :data:`ENSEMBLES` on the backends ``names``."""
    case = dict(ENSEMBLES[number])
    if case["mix"] == "mean":  # takes weights per teacher alone
        case["mask"] = False
        if case["weights"] in ("KC", "K1C", "KBC", "full"):
            case["weights"] = "KB1"
    student, teachers, weights = make_inputs(case, seed=number)
    mask = None
    if case["mask"]:
        draw = torch.rand(case["teachers"], case["classes"], generator=torch.Generator().manual_seed(number))
        mask = (draw < 0.6).to(device)
    tensors = [x if x is None else move_to(x, device) for x in (student, teachers, weights)]
    compare(case, names, *ensemble(case, mask), tensors, NEEDS[case["needs"]])


# --- js_div and consensus in every way

AGREEMENTS = pairwise(
    {
        **COMMON,
        "operator": ("js_div", "consensus"),
        "weights": (None, "K", "KB", "rows"),
        "needs": ("logits", "weights", "all"),
    },
    seed=4,
)
NEEDS_OF_AGREEMENTS = {"logits": (False, True, False), "weights": (False, False, True), "all": (False, True, True)}


def run_agreement(number: int, names: list[str], device: torch.device = CPU) -> None:
    """Run case ``number`` of :data:`AGREEMENTS` on the backends ``names``."""
    case = AGREEMENTS[number]
    _, stack, weights = make_inputs(case, seed=number)
    needs = NEEDS_OF_AGREEMENTS["logits" if weights is None else case["needs"]]
    tensors = [None, *(x if x is None else move_to(x, device) for x in (stack, weights))]
    compare(case, names, *agreement(case), tensors, needs)


# --- little mass: masks and weights by class that take from teachers what they are sure of

DIFFERENCES = (10.0, 18.0, 30.0, 88.0, 200.0, 1e4)
PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "layout": "stacked", "reduction": "none", "mix": "probs", "log_probs": False,
    "temperature": 1.0,
}  # fmt: skip


def compare_on(device, name, case, mask, tensors):
    """Compare all gradients of a case on a backend."""
    given = [x if x is None else move_to(x, device) for x in tensors]
    needs = (True, True, tensors[2] is not None)
    compare(case, [name], *ensemble(case, mask if mask is None else mask.to(device)), given, needs)


def compare_little_mass(name, difference, classes, rows, device=CPU, **changes):
    """Compare two teachers, each sure of classes that it is masked from: the remaining mass is far below 1."""
    case = {**PLAIN, "classes": classes, **changes}
    low_half = torch.arange(classes) < classes // 2
    mask = torch.stack((~low_half, low_half))
    sure = difference * torch.stack((low_half, ~low_half)).unsqueeze(1).expand(2, rows, classes)
    shares = (None, torch.tensor((0.3, 0.9)), torch.rand(2, 1, classes) + 0.1)
    for noise, number in thin_out(list(itertools.product((0.0, 1e-3, 1.0), range(3)))):  # 0: equal rows
        student = noise * logits(rows, classes)
        teachers = sure + noise * logits(2, rows, classes, seed=1)
        teachers[:, ::3] *= 0.1  # so that not all rows of a block are alike
        if case["log_probs"]:
            teachers = teachers - difference
        compare_on(device, name, case, mask, [student.to(case["dtype"]), teachers.to(case["dtype"]), shares[number]])


def compare_random_masks(name: str, scale: float, rows: int, device: torch.device = CPU) -> None:
    """Compare confident teachers under random masks: some rows keep little, in blocks with rows that keep much."""
    for count, classes in ((2, 10), (3, 10), (3, 40)):
        student, teachers = scale / 2 * logits(rows, classes), scale / 2 * logits(count, rows, classes, seed=1)
        mask = torch.rand(count, classes, generator=torch.Generator().manual_seed(2)) < 0.4
        case = {**PLAIN, "classes": classes}
        compare_on(device, name, case, mask, [student, teachers, None])


def compare_dtypes_of_weights(name: str, device: torch.device = CPU) -> None:
    """Compare weights of any dtype with logits of any other, in every shape, with a mask and without."""
    axes: dict[str, Any] = {
        "shape": ("K", "KB1", "K1C", "KBC"),
        "masked": (False, True),
        "size": ((20, 5), (3, 40)),
        "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        "weights_dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
        "mix": ("probs", "logits"),
    }
    for case in pairwise(axes, seed=1):
        rows, classes = case["size"]
        fixed = {"teachers": 3, "rows": rows, "classes": classes, "near": None, "special": None, "zeros": False}
        case = {**PLAIN, **case, **fixed, "weights": case["shape"]}
        mask = None
        if case["masked"]:
            mask = torch.rand(3, classes, generator=torch.Generator().manual_seed(rows)) < 0.6
        compare_on(device, name, case, mask, list(make_inputs(case, seed=4)))
