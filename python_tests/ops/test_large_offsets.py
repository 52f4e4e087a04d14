"""Tests of elements further apart than 2^31: 64-bit offsets in every operator, on the way in and on the way out."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._aggregate.reference import normal
from python_tests.ops.every_operator import Operator, each_operator

pytestmark = pytest.mark.usefixtures("one_thread")

FAR = 2**31 + 64
HALF = torch.bfloat16


def available_gigabytes() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """Return more than 2^31 elements, of which tests touch a few pages."""
    return torch.empty(FAR + 2**20, dtype=HALF)


def far_apart(x: Tensor, memory: Tensor, place: int) -> Tensor:
    """Return ``x`` with its first axis stretched over more than 2^31 elements, at a place of its own."""
    if not x.dim() or x.shape[0] == 1:
        return x
    step = FAR // (x.shape[0] - 1) + 1
    assert step > place + x[0].numel()
    view = memory[place:].as_strided(x.shape, (step, *x[0].contiguous().stride()))
    return view.copy_(x)


@pytest.mark.parametrize("axis", [0, -1])
@each_operator
def test_inputs_far_apart(operator: Operator, axis: int, memory: Tensor) -> None:
    """The test covers the forward and the backward pass."""
    if operator.only_cpu:
        pytest.skip("its kernel takes dense maps of fp32 alone")
    near = operator.inputs(HALF)
    turned = [x.movedim(axis, 0) if x.dim() else x for x in near]
    far = [far_apart(x, memory, 4096 * i).movedim(0, axis) for i, x in enumerate(turned)]
    assert any(x.dim() and x.stride(axis) * (x.shape[axis] - 1) > 2**31 for x in far)
    if operator.changed and not operator.alike:  # state is contiguous
        far = [n if i in operator.changed else f for i, (n, f) in enumerate(zip(near, far, strict=True))]
        near, far = ([x.float() if i in operator.changed else x for i, x in enumerate(g)] for g in (near, far))
    results = []
    for inputs in (near, far):
        leaves = [x.detach().requires_grad_(operator.gradient) for x in inputs]
        given = operator.results(*leaves)
        if operator.gradient:
            given += torch.autograd.grad([x.float().sum() for x in given], leaves)
        results.append([x.detach() for x in given])
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-2)


def expand(*shape: int, axis: int = 0) -> Tensor:
    """Return a bf16 tensor of a shape in which one axis repeats a single slice."""
    stored = list(shape)
    stored[axis] = 1
    return torch.randn(stored, generator=torch.Generator().manual_seed(len(shape))).to(HALF).expand(shape)


def _blend() -> tuple[Tensor, Tensor]:
    x, y = expand(40, 2**26), expand(40, 2**26)
    return ops.blend(x, y, 0.25)[-1], ops.blend(x[:1], y[:1], 0.25)[0]


def _boxes() -> tuple[Tensor, Tensor]:
    images, boxes = expand(700, 3, 1024, 1024), torch.tensor([[[5.0, 6.0, 700.0, 900.0]]])
    return ops.erase_boxes(images, boxes.expand(700, 1, 4))[-1], ops.erase_boxes(images[:1], boxes)[0]


def _kl() -> tuple[Tensor, Tensor]:
    student, teacher = expand(2**28 + 5, 8), expand(2**28 + 5, 8).flip(1)
    short = ops.kl_div(student[:3], teacher[:3], reduction="none")
    return ops.kl_div(student, teacher, reduction="none")[-3:], short


def _kl_gradient() -> tuple[Tensor, Tensor]:
    gradients = []
    for rows in (2**28 + 5, 3):
        student = expand(2**28 + 5, 8)[:rows].contiguous().requires_grad_()
        ops.kl_div(student, expand(2**28 + 5, 8).flip(1)[:rows], reduction="sum").backward()
        gradients.append(student.grad[-3:].clone())
    return gradients[0], gradients[1]


def ends(compute: Callable[[int], Sequence[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return the last three rows (axis -2) of the gradients of ``count`` equal rows, and of three rows alone."""
    got, expected = (torch.stack([x[..., -3:, :].float() for x in compute(rows)]) for rows in (count, 3))
    return got, expected


def _dual_kl_gradients(rows: int) -> Sequence[Tensor]:
    teacher = expand(rows, 8)
    students = [factor * teacher[:1] for factor in (-1, 2)]
    students = [x.expand(rows, 8).requires_grad_() for x in students]
    return torch.autograd.grad(ops.dual_kl(*students, teacher, reduction="sum"), students)


def _entropy_gradient(rows: int) -> Sequence[Tensor]:
    logits = expand(rows, 8).requires_grad_()
    return torch.autograd.grad(ops.entropy(logits, reduction="sum"), logits)


def stack(rows: int) -> Tensor:
    """Return two teachers of ``rows`` equal rows."""
    return torch.stack((expand(1, 8), expand(1, 8).flip(1))).expand(2, rows, 8).requires_grad_()


def _ensemble_gradients(rows: int, **settings: Any) -> Sequence[Tensor]:
    student, teachers = (2 * expand(1, 8)).expand(rows, 8).requires_grad_(), stack(rows)
    loss = ops.ensemble_kl(student, teachers, reduction="sum", **settings)
    to_student, to_teachers = torch.autograd.grad(loss, (student, teachers))
    return [to_student, *to_teachers]


def _js_gradient(rows: int) -> Sequence[Tensor]:
    teachers = stack(rows)
    return torch.autograd.grad(ops.js_div(teachers, reduction="sum"), teachers)


def _consensus_gradient(rows: int) -> Sequence[Tensor]:
    teachers = stack(rows)
    total, second = ops.consensus(teachers, reduction="sum")
    return torch.autograd.grad(total - 0.5 * second, teachers)


def _mean() -> tuple[Tensor, Tensor]:
    vectors = [torch.tensor([value], dtype=HALF).expand(FAR) for value in (1.0, 2.0, 6.0)]
    return ops.weighted_mean(vectors, [1.0, 1.0, 2.0])[-70:], torch.full((70,), 3.75, dtype=HALF)


def _median() -> tuple[Tensor, Tensor]:
    vectors = [torch.tensor([value], dtype=HALF).expand(FAR) for value in (1.0, 2.0, 6.0)]
    return ops.median(vectors)[-70:], torch.full((70,), 2.0, dtype=HALF)


def _trimmed_mean() -> tuple[Tensor, Tensor]:
    vectors = [torch.tensor([value], dtype=HALF).expand(FAR) for value in (1.0, 2.0, 4.0, 60.0)]
    return ops.trimmed_mean(vectors, 1)[-70:], torch.full((70,), 3.0, dtype=HALF)


def _server_step() -> tuple[Tensor, Tensor]:
    vectors = [torch.tensor([value], dtype=HALF).expand(FAR) for value in (2.0, 4.0)]
    step = ops.server_step(torch.ones(1, dtype=HALF).expand(FAR), vectors, [1.0, 1.0], learning_rate=0.5)
    torch.testing.assert_close(step.norms, torch.tensor([1.0, 3.0], dtype=torch.float64) * FAR**0.5)
    return step.model[-70:], torch.full((70,), 2.0, dtype=HALF)


def _clip_and_noise() -> tuple[Tensor, Tensor]:
    vector = torch.full((1,), 2.0, dtype=HALF).expand(FAR)
    bound = float(FAR) ** 0.5
    noisy = ops.clip_and_noise(vector, bound, 1 / bound, seed=5, offset=3)
    return noisy[-70:], (1 + normal(70, 5, 3 + FAR - 70)).to(HALF)


def _clip() -> tuple[Tensor, Tensor]:
    vector = torch.full((1,), 2.0, dtype=HALF).expand(FAR)
    clipped = ops.clip_by_norm(vector, float(FAR) ** 0.5)
    return clipped[-70:], torch.ones(70, dtype=HALF)


def _fuse_mean() -> tuple[Tensor, Tensor]:
    map_ = expand(40, 3, 2**12, 2**12)
    maps = [map_, map_[:1].flip(1).expand(map_.shape)]
    return ops.fuse_mean(maps, activation="relu")[-1], ops.fuse_mean([x[:1] for x in maps], activation="relu")[0]


def _fuse() -> tuple[Tensor, Tensor]:
    maps = [expand(40, 3, 2**12, 2**12, axis=0), expand(40, 1, 2**12, 2**12, axis=0)]
    return ops.fuse_concat(maps, activation="relu")[-1], ops.fuse_concat([x[:1] for x in maps], activation="relu")[0]


LARGE: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "blend": _blend,
    "boxes": _boxes,
    "kl_div": _kl,
    "kl_div gradient": _kl_gradient,
    "dual_kl gradients": partial(ends, _dual_kl_gradients, 2**28 + 5),
    "entropy gradient": partial(ends, _entropy_gradient, 2**28 + 5),
    "ensemble_kl gradients": partial(ends, _ensemble_gradients, 2**27 + 5),
    "ensemble_kl logits gradients": partial(ends, partial(_ensemble_gradients, mix="logits"), 2**27 + 5),
    "ensemble_kl mean gradients": partial(ends, partial(_ensemble_gradients, mode="mean_of_kl"), 2**27 + 5),
    "ensemble_kl limit gradients": partial(ends, partial(_ensemble_gradients, temperature=torch.inf), 2**27 + 5),
    "js_div gradient": partial(ends, _js_gradient, 2**27 + 5),
    "consensus gradient": partial(ends, _consensus_gradient, 2**27 + 5),
    "weighted_mean": _mean,
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "server_step": _server_step,
    "clip_by_norm": _clip,
    "clip_and_noise": _clip_and_noise,
    "fuse_concat": _fuse,
    "fuse_mean": _fuse_mean,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_results_beyond_two_to_the_31(name: str) -> None:
    """Inputs are bf16 of stride 0, so that hardly more than the result needs memory."""
    if available_gigabytes() < 12:
        pytest.skip("needs 12 GB of free memory")
    got, expected = LARGE[name]()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
