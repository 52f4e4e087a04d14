"""ensemble_kl, js_div and consensus on CUDA against the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ensemble_cases import DIFFERENCES, compare_dtypes_of_weights, compare_little_mass, compare_random_masks
from operator_cases import BACKENDS, DTYPES, assert_close, describe, pairwise, using
from torch import Tensor

from fedkern import ops
from fedkern.ops import backend
from fedkern.ops.cuda.distill import CudaDistill
from fedkern.ops.distill_common import PROBS, REDUCTIONS
from fedkern.ops.distill_ensemble_reference import consensus_reference, ensemble_reference, js_reference

AXES: dict[str, Any] = {
    "operator": ("probs", "js", "consensus"),
    "count": (1, 2, 5, 20),
    "classes": (1, 3, 10, 33, 100, 1030),
    "rows": (0, 1, 4, 9),
    "dtype": DTYPES,
    "layout": ("rows", "gaps", "positions", "channels_last"),
    "weights": ("none", "teacher", "row", "zeros", "class", "mask"),
    "near": (None, 1e-3, 0.0),
    "special": (None, "extreme", "masked"),
    "reduction": ("none", "sum", "batchmean"),
    "needs": ("student", "all"),
    "temperature": (1.0, 3.0),
    "log_probs": (False, True),
}
CASES = pairwise(AXES, seed=9)
FACTOR = 3.0


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Logits ``[..., B, C]`` in another shape or with other strides."""
    *_, rows, classes = values.shape
    if layout == "gaps":
        wide = values.new_full((*values.shape[:-1], 2 * classes + 3), 7.0)
        return wide[..., 1 : 2 * classes : 2].copy_(values)
    width = 3 if rows % 3 == 0 else 1
    split = values.unflatten(-2, (rows // width, width)).transpose(-1, -2)
    if layout == "positions":
        return split.contiguous()
    if layout == "channels_last":
        return split.transpose(-1, -2).contiguous().transpose(-1, -2)
    return values


def make(case: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Student, teachers, weights and mask."""
    generator = torch.Generator().manual_seed(seed)
    count, rows, classes = case["count"], case["rows"], case["classes"]
    student = torch.randn(rows, classes, generator=generator) * 2
    noise = torch.randn(count, rows, classes, generator=generator)
    teachers = 2 * noise if case["near"] is None else student + case["near"] * noise
    if case["special"] == "extreme":
        teachers[..., :1] = 1e4
        student[..., -1:] = 1e4
    if case["special"] == "masked" and classes > 2:
        gone = torch.rand(count, rows, classes, generator=generator) < 0.3
        gone[..., :2] = False
        teachers.masked_fill_(gone, -torch.inf)
        student[..., -1] = -torch.inf
        teachers[..., -1] = -torch.inf
    if case["log_probs"] and case["operator"] == "probs":
        teachers = teachers.log_softmax(-1)
    weights = mask = None
    by_class = case["operator"] == "probs"
    kind = case["weights"] if by_class or case["weights"] not in ("class", "mask") else "row"
    if kind == "teacher":
        weights = torch.rand(count, generator=generator) + 0.2
    elif kind in ("row", "zeros"):
        weights = torch.rand(count, rows, generator=generator) + 0.2
        if kind == "zeros":
            weights[torch.rand(count, rows, generator=generator) < 0.4] = 0
    elif kind == "class":
        weights = torch.rand(count, 1, classes, generator=generator) + 0.2
        weights[0] = 0
    elif kind == "mask":
        mask = torch.rand(count, classes, generator=generator) < 0.7
    split = lay_out(student.to(case["dtype"]), case["layout"]), lay_out(teachers.to(case["dtype"]), case["layout"])
    if weights is not None and weights.dim() == 2:
        width = split[0].shape[2] if split[0].dim() > 2 else 1
        weights = weights.unflatten(1, (rows // width, width)) if split[0].dim() > 2 else weights
    if weights is not None and weights.dim() == 3 and kind == "class" and split[0].dim() > 2:
        weights = weights.unsqueeze(-1)
    return *split, weights, mask


def call(case: dict[str, Any], student: Tensor, teachers: Tensor, weights: Any, mask: Any) -> tuple[Tensor, ...]:
    reduction = case["reduction"]
    if case["operator"] == "js":
        return (ops.js_div(teachers, weights, reduction=reduction),)
    if case["operator"] == "consensus":
        return ops.consensus(teachers, weights, reduction=reduction)
    if weights is not None and weights.dim() == teachers.dim() - 1 > 1:
        weights = weights.unsqueeze(2)  # [K, B] is undecidable where B = C
    more: dict[str, Any] = {"class_mask": mask, "log_probs": case["log_probs"], "reduction": reduction}
    return (ops.ensemble_kl(student, teachers, weights, case["temperature"], **more),)


def call_reference(
    case: dict[str, Any], student: Tensor, teachers: Tensor, weights: Any, mask: Any
) -> tuple[Tensor, ...]:
    reduction = REDUCTIONS[case["reduction"]]
    if weights is not None:
        weights = weights.reshape(weights.shape[0], *[1] * (teachers.dim() - 1)) if weights.dim() == 1 else weights
        if weights.dim() < teachers.dim():
            weights = weights.unsqueeze(2)
        weights = weights.expand(teachers.shape[0], teachers.shape[1], weights.shape[2], *teachers.shape[3:])
    if case["operator"] in ("js", "consensus"):
        weights = None if weights is None else weights.squeeze(2)
        if case["operator"] == "js":
            return (js_reference(teachers, weights, reduction),)
        return consensus_reference(teachers, weights, reduction)
    given = (student, teachers, weights, mask, case["temperature"])
    return (ensemble_reference(*given, PROBS, case["log_probs"], reduction),)


def differentiate(case: dict[str, Any], compute: Any, *given: Any) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    student, teachers, weights, mask = given
    everything = case["needs"] == "all"
    alone = case["operator"] in ("js", "consensus")
    leaves = [
        student.detach().requires_grad_(not alone),
        teachers.detach().requires_grad_(everything or alone),
        None if weights is None else weights.detach().requires_grad_(everything),
    ]
    results = compute(case, *leaves, mask)
    loss = sum(
        (r * (FACTOR * (i + 1) * (torch.arange(r.numel(), device=r.device) % 5 + 1).view_as(r)).to(r.dtype)).sum()
        for i, r in enumerate(results)
    )
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    assert isinstance(loss, Tensor)
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return results, [next(found) if x is not None and x.requires_grad else None for x in leaves]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{describe(CASES[n])}")
def test_against_float64(device: torch.device, number: int) -> None:
    case = CASES[number]
    given = make(case, number)
    exact = [x if x is None or x.dtype is torch.bool else x.double() for x in given]
    expected, gradients = differentiate(case, call_reference, *exact)
    results, got = differentiate(case, call, *(None if x is None else x.to(device) for x in given))
    rows = max(1, case["rows"])
    values = exact[1][exact[1].isfinite()] if exact[1] is not None else torch.zeros(1)
    spread = max(1.0, float(values.max() - values.min())) if values.numel() else 1.0
    scale = 1e-6 * spread * case["temperature"] ** 2
    total = scale * (rows if case["reduction"] == "sum" else 1)
    for i, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        assert ours.dtype == case["dtype"]
        assert_close(f"result {i}", ours.cpu(), theirs, absolute=total)
        assert not (ours < 0).any(), "a negative divergence"
    for name, ours, theirs in zip(("student", "teachers", "weights"), got, gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert_close(f"gradient of {name}", ours.cpu(), theirs, absolute=scale * 5 * FACTOR * 4)


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_nearly_equal_distributions_keep_their_digits(device: torch.device, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 50, generator=generator)
    teachers = student + scale * torch.randn(5, 7, 50, generator=generator)
    loss = ops.js_div(teachers.to(device), reduction="none").cpu()
    expected = js_reference(teachers.double(), None, 0)
    assert ((loss - expected).abs() / expected).max() < 2e-5
    loss = ops.ensemble_kl(student.to(device), teachers.to(device), None, reduction="none").cpu()
    expected = ensemble_reference(student.double(), teachers.double(), None, None, 1.0, PROBS, False, 0)
    assert ((loss - expected).abs() / expected).max() < 2e-5
    equal = teachers[:1].expand(5, -1, -1).to(device)
    assert ops.js_div(equal, reduction="none").abs().max() < 1e-12


def test_weights_of_other_dtypes_than_the_logits(device: torch.device) -> None:
    compare_dtypes_of_weights("cuda", device, mixes=("probs",))


@pytest.mark.parametrize("difference", [*DIFFERENCES, 1e3])
@pytest.mark.parametrize("classes", [2, 40, 1030])
def test_masks_that_leave_little_mass(device: torch.device, classes: int, difference: float) -> None:
    """By a thread, a warp, a block; 1e3 is too much for fp64 as well."""
    compare_little_mass("cuda", difference, classes, rows=5, device=device)


@pytest.mark.parametrize("more", [{"dtype": torch.float64}, {"log_probs": True}, {"temperature": 2.0}], ids=str)
def test_little_mass_in_other_ways(device: torch.device, more: dict[str, Any]) -> None:
    for difference in (30.0, 200.0, 1e4):
        compare_little_mass("cuda", difference, classes=6, rows=5, device=device, **more)


@pytest.mark.parametrize("scale", [10.0, 20.0])
def test_masks_on_teachers_who_are_sure(device: torch.device, scale: float) -> None:
    compare_random_masks("cuda", scale, rows=100, device=device)


LACKING = [{"mix": "logits"}, {"mode": "mean_of_kl"}, {"temperature": torch.inf}]


@pytest.mark.parametrize("settings", LACKING)
def test_what_it_has_no_kernel_for_is_an_error_where_it_is_forced(
    device: torch.device, settings: dict[str, Any]
) -> None:
    student, teachers = torch.randn(4, 6, device=device), torch.randn(3, 4, 6, device=device)
    with pytest.raises(RuntimeError, match="backend 'cuda' was forced, but it has no kernel for ensemble_kl"):
        ops.ensemble_kl(student, teachers, **settings)


@pytest.mark.parametrize("settings", LACKING)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not there")
def test_what_it_has_no_kernel_for_goes_to_triton(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reduction: str
) -> None:
    """But for the limit of infinite temperature, which is plain PyTorch."""
    kernel = CudaDistill(SimpleNamespace(distill=None, distill_workspace=None))  # nothing may be asked of its core
    beside: list[str] = []

    def find(operator: str, *place: str) -> Any:
        beside.append(operator)
        return triton

    with using("triton"):
        triton = backend.select("ensemble_kl", torch.zeros(1))
    monkeypatch.setattr(backend, "beside", find)
    monkeypatch.setattr("fedkern.ops.distill_ensemble.kernel_for", lambda *_: kernel)
    student = torch.randn(4, 6, requires_grad=True)
    teachers = torch.randn(3, 4, 6, requires_grad=True)
    given = {"reduction": reduction, **settings}
    loss = ops.ensemble_kl(student, teachers, **given)
    grads = torch.autograd.grad(loss.sum(), (student, teachers))
    monkeypatch.undo()
    with ops.use_backend("reference"):
        expected = ops.ensemble_kl(student, teachers, **given)
        wanted = torch.autograd.grad(expected.sum(), (student, teachers))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, wanted)
    assert bool(beside) == ("temperature" not in settings)
