"""Tests of every operator beside its reference: subsets of gradients, sizes 0 and 1, NaN, infinities, sure answers."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.every_operator import OPERATORS, Operator, each_differentiable, each_operator
from python_tests.ops.operator_cases import ulp
from python_tests.ops.operator_runs import run

pytestmark = pytest.mark.usefixtures("one_thread")

Outcome = tuple[str, list[Tensor | None]]
SURE = torch.tensor([0.9, 0.99, 0.999, 1 - 1e-4, 1 - 1e-5, 1 - 1e-6])
CLASSES = 7


@pytest.fixture(autouse=True)
def _choose_for_convolutions(backend: str, operator: Operator) -> Iterator[None]:
    """Force no backend where operators have kernels for some sizes of fp32 and AVX2 alone."""
    if operator.only_cpu and backend in ("cpu-portable", "triton"):
        pytest.skip("has kernels for AVX2 alone")
    with ops.use_backend(None) if operator.only_cpu and backend != "reference" else contextlib.nullcontext():
        yield


def weigh(results: Sequence[Tensor]) -> Tensor:
    """Return a sum in which neighbours count differently."""
    return torch.stack([(r.flatten() * (torch.arange(r.numel()) % 5 + 1)).sum() for r in results]).sum()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_differentiable
def test_gradients_of_every_subset_of_operands(backend: str, operator: Operator, dtype: torch.dtype) -> None:
    """Operands without ``requires_grad`` get no gradient, and the others have the bits of a pass for all."""
    inputs = operator.inputs(dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(weigh(operator.results(*leaves)), leaves)
    for flags in itertools.product((False, True), repeat=len(inputs)):
        for recorded in (False, True):
            leaves = [x.clone().requires_grad_(flag) for x, flag in zip(inputs, flags, strict=True)]
            results = operator.results(*leaves)
            assert {x.requires_grad for x in results} == {any(flags)}
            if any(flags):
                weigh(results).backward(create_graph=recorded)
            for x, flag, gradient in zip(leaves, flags, expected, strict=True):
                if not flag:
                    assert x.grad is None
                elif not recorded:
                    assert torch.equal(x.grad, gradient)
                else:  # computed by the reference
                    size = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
                    torch.testing.assert_close(x.grad, gradient, rtol=size, atol=size * float(gradient.abs().max()))


def outcome(operator: Operator, inputs: Sequence[Tensor]) -> Outcome:
    """Return the error's type, or results and gradients."""
    try:
        return "", list(run(operator, inputs, operator.gradient))
    except (TypeError, ValueError, IndexError) as error:
        return type(error).__name__, []


def check_beside_reference(operator: Operator, inputs: Sequence[Tensor]) -> None:
    """Compare with the reference in float64, or in float32 for convolutions, where NaN in padding differs.

    A gradient may be 0 in a place where the reference's is not finite, and the other way round: the loss is NaN there.
    """
    with ops.use_backend("reference"):
        expected_error, expected = outcome(operator, [x if operator.only_cpu else x.double() for x in inputs])
    error, values = outcome(operator, inputs)
    assert error == expected_error
    results = len(values) - operator.gradient * len(inputs)
    for place, (got, wanted) in enumerate(zip(values, expected, strict=True)):
        assert (got is None) == (wanted is None)
        if got is None or wanted is None:
            continue
        assert got.shape == wanted.shape
        got, wanted = got.detach().double(), wanted.detach().double()
        firm = wanted.isfinite() & ((wanted != 0) | (place < results))
        bound = 1e-5 * max([1.0, *wanted[firm].abs().tolist()])
        torch.testing.assert_close(got[firm], wanted[firm], rtol=1e-4, atol=bound)
        doubtful = got[~firm]
        assert not (doubtful.isfinite() & ((doubtful.abs() > bound) | (place < results))).any()


def resize(operator: Operator) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield the operator's shapes with each size 0 or 1 at all its places, and on each axis alone."""
    for new in (0, 1):
        for size in {size for shape in operator.shapes for size in shape}:
            yield tuple(tuple(new if n == size else n for n in shape) for shape in operator.shapes)
        for tensor, shape in enumerate(operator.shapes):
            for axis in range(len(shape)):
                small = (*shape[:axis], new, *shape[axis + 1 :])
                yield (*operator.shapes[:tensor], small, *operator.shapes[tensor + 1 :])


@pytest.mark.sampled(12)
@each_operator
def test_sizes_of_nothing_and_of_one_on_every_axis(backend: str, operator: Operator) -> None:
    for shapes in dict.fromkeys(resize(operator)):
        small = dataclasses.replace(operator, shapes=shapes)
        if operator.name.startswith("fuse"):  # as many channels as both maps have
            channels = (shapes[0][1] + shapes[1][1],)
            small = dataclasses.replace(operator, shapes=(*shapes[:2], channels, channels))
        check_beside_reference(small, small.inputs())


@pytest.mark.sampled(12)
@each_operator
def test_one_value_or_sample_that_is_not_finite(backend: str, operator: Operator) -> None:
    """No NaN or infinity of a teacher or operand is hidden, or reaches results that do not depend on it."""
    # Of more classes than a vector of the CPU holds.
    shapes = tuple(tuple(40 if n == CLASSES else n for n in shape) for shape in operator.shapes)
    wide = dataclasses.replace(operator, shapes=shapes)
    for place, value in itertools.product(range(len(operator.shapes)), (math.nan, math.inf, -math.inf)):
        if operator.name == "conv_norm groups" and place == 2 and math.isinf(value):
            continue  # torch's group norm folds its scale into its mean, and gives NaN for an infinity
        for whole_row in (False, True):
            inputs = wide.inputs()
            x = inputs[place]
            (x[0] if whole_row else x.view(-1)[:1]).fill_(value)
            check_beside_reference(wide, inputs)


def sure_logits(shape: Sequence[int], seed: int) -> Tensor:
    """Return logits one of whose classes has nearly all of the probability, another share in each row."""
    axis = list(shape).index(CLASSES)
    rows = torch.randn(math.prod(shape) // CLASSES, CLASSES, generator=torch.Generator().manual_seed(seed)) * 0.3
    share, order = SURE.roll(seed)[torch.arange(len(rows)) % len(SURE)], torch.arange(len(rows))
    rows[order, order * 3 % CLASSES] = (share / (1 - share) * (CLASSES - 1)).log()
    moved = [n for i, n in enumerate(shape) if i != axis]
    return rows.view(*moved, CLASSES).movedim(-1, axis).contiguous()


LOSSES = [o for o in OPERATORS if o.name.startswith("contrastive") or any(CLASSES in shape for shape in o.shapes)]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", LOSSES, ids=lambda operator: operator.name)
def test_sixteen_bit_losses_of_sure_predictions(backend: str, operator: Operator, dtype: torch.dtype) -> None:
    """Softmax less target is rounded once: rounded before, 1 - 1e-6 leaves nothing (Liger-Kernel's PR 1329)."""
    inputs = operator.inputs(dtype)
    for place, shape in enumerate(operator.shapes):
        if CLASSES in shape and place not in operator.positive:
            inputs[place] = sure_logits(shape, place).to(dtype)
        elif operator.name.startswith("contrastive") and place < 2:
            inputs[place] = (2.6 * torch.eye(*shape) + 0.1 * inputs[place]).to(dtype)
    got = run(operator, inputs, True)
    with ops.use_backend("reference"):
        expected = run(operator, [x.double() for x in inputs], True)
    # Triton's interpreter cuts off where it becomes bf16. A softmax takes about C + 8 roundings in fp32.
    digits = 1.0 if backend == "triton" and dtype is torch.bfloat16 else 0.5
    error = (CLASSES + 8) / 2 * torch.finfo(torch.float32).eps
    for x, y in zip(got, expected, strict=True):
        bound = digits * ulp(y.detach(), dtype) + error * max(1.0, float(y.detach().abs().max()))
        assert bool(((x.double() - y).abs() <= bound).all())
