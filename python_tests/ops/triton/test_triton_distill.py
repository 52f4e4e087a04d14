"""Tests of the distill family in Triton's interpreter beyond the operators' own tests: rows in parts."""

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._distill.ensemble_reference import consensus_reference, js_reference
from fedkern.ops._distill.reference import entropy_reference, kl_div_reference
from fedkern.ops._distill.rows import REDUCTIONS
from python_tests.ops.operator_cases import BACKENDS, assert_close, using

if "triton" not in BACKENDS:
    pytest.skip("Triton's interpreter is not there", allow_module_level=True)

from fedkern.ops._distill.triton import rows

pytestmark = pytest.mark.usefixtures("_parts")


@pytest.fixture
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a device of many processors that holds no row whole: 150 classes make three parts."""
    monkeypatch.setattr(rows, "processors", lambda device: 64)
    monkeypatch.setattr(rows, "WHOLE", 64)


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    steps = torch.arange(loss.numel(), dtype=torch.float64).reshape(loss.shape) % 5 + 1
    return list(torch.autograd.grad((3 * loss * steps.to(loss.dtype)).sum(), leaves))


def compare(ours: Tensor, leaves: list[Tensor], exact: Tensor, exact_leaves: list[Tensor], scale: float = 1.0) -> None:
    assert_close("loss", ours, exact, absolute=1e-6 * scale)
    for number, (got, two) in enumerate(zip(gradients(ours, leaves), gradients(exact, exact_leaves), strict=True)):
        # Autograd sums a broadcast weight's gradient in the weight's type.
        slack = 0.02 * float(two.abs().max()) if got.dtype is torch.bfloat16 and number == 2 else 0.0
        assert_close(f"gradient {number}", got, two, absolute=2e-5 * scale, slack=slack)


@pytest.mark.parametrize(
    ("direction", "reduction"), [("teacher", "none"), ("student", "sum"), ("student", "none"), ("teacher", "batchmean")]
)
def test_divergences_of_rows_in_parts(direction: str, reduction: str) -> None:
    tensors = [torch.randn(2, 150, requires_grad=True) for _ in range(3)]
    weight = torch.tensor([0.5, 1.5], requires_grad=True)
    leaves = [*tensors, weight]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with using("triton"):
        loss = ops.dual_kl(*tensors, 2.0, direction=direction, weight=weight, reduction=reduction)
        a, b, teacher, by = exact
        wanted = kl_div_reference(
            a, teacher, 2.0, weight=by, reduction=reduction, peer=b, reverse=direction == "student"
        )
        compare(loss, leaves, wanted, exact, 4.0)


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_entropy_of_rows_in_parts(reduction: str) -> None:
    x = torch.randn(3, 150, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    with using("triton"):
        compare(ops.entropy(x, reduction=reduction), [x], entropy_reference(exact, reduction=reduction), [exact])


def test_rows_in_parts_of_maps_without_one_stride() -> None:
    tensors = [torch.randn(2, 150, 3, 5).mT.contiguous().mT.requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with using("triton"):
        student, two, teacher = exact
        wanted = kl_div_reference(student, teacher, peer=two, reverse=True)
        compare(ops.dual_kl(*tensors, direction="student"), tensors, wanted, exact)
        compare(ops.entropy(tensors[0]), tensors[:1], entropy_reference(exact[0]), exact[:1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["none", "members", "rows"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("classes", [7, 70])
def test_divergence_and_consensus_of_members(kind, reduction, classes, monkeypatch):
    monkeypatch.setattr(rows, "WHOLE", 64)
    logits = torch.randn(3, 4, classes, requires_grad=True)
    shape = {"none": None, "members": (3,), "rows": (3, 4)}[kind]
    leaves = [logits] if shape is None else [logits, torch.rand(shape).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    full = None if shape is None else exact[1].reshape(3, -1).expand(3, 4)
    with using("triton"):
        compare(
            ops.js_div(*leaves, reduction=reduction), leaves, js_reference(exact[0], full, REDUCTIONS[reduction]), exact
        )
        ours = ops.consensus(*leaves, reduction=reduction)
        wanted = consensus_reference(exact[0], full, REDUCTIONS[reduction])
        assert_close("mean entropy", ours[1], wanted[1])
        compare(ours[0] + 2 * ours[1], leaves, wanted[0] + 2 * wanted[1], exact, 4.0)
