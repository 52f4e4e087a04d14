"""Cases of ensemble_kl, js_div and consensus: stacks of K teachers beside the float64 reference."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fedkern.ops._distill.rows import LOGITS, MEAN, PROBS
from python_tests.ops import differential
from python_tests.ops.operator_cases import pairwise, thin_out, using

CPU = torch.device("cpu")
# What mixes for a student: ensemble_kl's arguments, and the reference's.
MIXES: dict[str, tuple[dict[str, Any], int]] = {
    "probs": ({"mix": "probs"}, PROBS),
    "logits": ({"mix": "logits"}, LOGITS),
    "mean": ({"mode": "mean_of_kl"}, MEAN),
}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).to(dtype)


def check_rows(operator, count, shape, device=CPU, *, values="normal", weights=(), **settings):
    """Compare a call of ``count`` teachers and of samples of ``shape`` with the reference.

    ``operator``: a key of :data:`MIXES`, js_div or consensus.
    """

    def numbers(*shape: int, values: str = values) -> differential.Case:
        drawn = {"dtype": "float32", "values": values, "layout": "contiguous", "grad": True}
        return {"shape": list(shape), "seed": len(shape), **drawn}

    case = {
        "weights": numbers(count, *(weights or shape[:1]), values="weights"), "reduction": "batchmean", "dim": 1,
        "_mask": 0.0 if operator == "logits" else 0.3, "_stacked": True, "_by_class": False,
    }  # fmt: skip
    if operator in MIXES:
        own = {"mix": "probs", "mode": "kl_of_mean", "temperature": 1.0, "class_mask": False, "log_probs": False}
        case |= {"student": numbers(*shape), "teachers": numbers(count, *shape), **own, **MIXES[operator][0]}
    else:
        case["logits"] = numbers(count, *shape)
    differential.check("ensemble_kl" if operator in MIXES else operator, {**case, **settings}, device)


# --- little mass: masks and weights by class that take from teachers what they are sure of

DIFFERENCES = (10.0, 18.0, 30.0, 88.0, 200.0, 1e4)
PLAIN: dict[str, Any] = {
    "mix": "probs", "mode": "kl_of_mean", "log_probs": False, "temperature": 1.0, "reduction": "none", "dim": 1,
}  # fmt: skip


def compare_on(device, name, mask, tensors, **settings):
    """Compare all gradients of a call on a backend."""
    given = dict(zip(("student", "teachers", "weights"), tensors, strict=True)) | {"class_mask": mask}
    given = {name: x.requires_grad_() if x is not None and x.is_floating_point() else x for name, x in given.items()}
    with using(name):
        differential.check_given(
            "ensemble_kl", {"_stacked": True, "_by_class": False, **PLAIN, **settings}, {**PLAIN, **given, **settings},
            device,
        )  # fmt: skip


def compare_little_mass(name, difference, classes, rows, device=CPU, dtype=torch.float32, **changes):
    """Compare two teachers, each sure of classes that it is masked from: the remaining mass is far below 1."""
    low_half = torch.arange(classes) < classes // 2
    mask = torch.stack((~low_half, low_half))
    sure = difference * torch.stack((low_half, ~low_half)).unsqueeze(1).expand(2, rows, classes)
    shares = (None, torch.tensor((0.3, 0.9)), torch.rand(2, 1, classes) + 0.1)
    for noise, number in thin_out(list(itertools.product((0.0, 1e-3, 1.0), range(3)))):  # 0: equal rows
        student = noise * logits(rows, classes)
        teachers = sure + noise * logits(2, rows, classes, seed=1)
        teachers[:, ::3] *= 0.1  # so that not all rows of a block are alike
        if changes.get("log_probs"):
            teachers = teachers - difference
        compare_on(device, name, mask, [student.to(dtype), teachers.to(dtype), shares[number]], **changes)


def compare_random_masks(name: str, scale: float, rows: int, device: torch.device = CPU) -> None:
    """Compare confident teachers under random masks: some rows keep little, in blocks with rows that keep much."""
    for count, classes in ((2, 10), (3, 10), (3, 40)):
        student, teachers = scale / 2 * logits(rows, classes), scale / 2 * logits(count, rows, classes, seed=1)
        mask = torch.rand(count, classes, generator=torch.Generator().manual_seed(2)) < 0.4
        compare_on(device, name, mask, [student, teachers, None])


def compare_dtypes_of_weights(name: str, device: torch.device = CPU) -> None:
    """Compare weights of any dtype with logits of any other, in every shape, with a mask and without."""
    axes: dict[str, Any] = {
        "weighed": ((False, False), (True, False), (False, True), (True, True)),
        "masked": (False, True),
        "size": ((20, 5), (3, 40)),
        "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        "weights_dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
        "mix": ("probs", "logits"),
    }
    for number, case in enumerate(pairwise(axes, seed=1)):
        rows, classes = case["size"]
        by_row, by_class = case["weighed"]
        draw = torch.Generator().manual_seed(number)
        weights = torch.rand(3, rows if by_row else 1, classes if by_class else 1, generator=draw) + 0.1
        mask = torch.rand(3, classes, generator=draw) < 0.6 if case["masked"] else None
        tensors = [logits(rows, classes, dtype=case["dtype"]), logits(3, rows, classes, seed=1, dtype=case["dtype"])]
        compare_on(device, name, mask, [*tensors, weights.to(case["weights_dtype"])], mix=case["mix"])
