"""Tests of torch.jit, which refuses to record the operators.

Torch.export can record each of them.
"""

import pytest
import torch
from torch import Tensor, nn

from fedkern import ops
from python_tests.ops.every_operator import NO_OPERATORS, Operator, each_operator

REFUSAL = r"cannot be recorded by torch\.jit\.trace or torch\.jit\.script.*use torch\.export\.export"


class Calling(nn.Module):
    """Operator as a module, which torch.export takes."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.operator.results(*inputs)


@pytest.mark.sampled(12)
@each_operator
def test_trace_raises(operator: Operator) -> None:
    """A recording would hold one ``aten::empty``, and its replay return uninitialised memory."""
    inputs = tuple(operator.inputs())
    for recorded in (operator.results, Calling(operator)):
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.jit.trace(recorded, inputs)
    with ops.use_backend("reference"), pytest.raises(RuntimeError, match=REFUSAL):
        torch.jit.trace(operator.results, inputs)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - NO_OPERATORS))
def test_script_raises(name: str) -> None:
    function = getattr(ops, name)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.jit.script(function)
    with pytest.raises(RuntimeError, match=REFUSAL):  # what the compiler does with a function that it meets
        torch.jit._recursive.try_compile_fn(function, None)


def calling_one(student: Tensor, teacher: Tensor) -> Tensor:
    return ops.kl_div(student, teacher)


def test_script_of_a_function_or_module_that_calls_an_operator_raises() -> None:
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.jit.script(calling_one)
    blocks = ops.FusedBlocks([nn.Conv2d(2, 3, 3)])
    for module in (blocks, nn.Sequential(blocks, nn.ReLU())):
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.jit.script(module)


def test_trace_of_fused_blocks_raises_and_export_works() -> None:
    blocks = ops.FusedBlocks([nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2)]).eval()
    x, unseen = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.jit.trace(blocks, (x,))
        exported = torch.export.export(blocks, (x,)).module()
        torch.testing.assert_close(exported(unseen), blocks(unseen), rtol=1e-5, atol=1e-6)


def test_accumulator_cannot_be_traced() -> None:
    def mean(x: Tensor) -> Tensor:
        accumulator = ops.Accumulator(3)
        accumulator.add(x)
        return accumulator.mean()

    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.jit.trace(mean, (torch.ones(3),))


@pytest.mark.exhaustive
@each_operator
@pytest.mark.parametrize("strict", [False, True])
def test_export_records_the_operator(operator: Operator, strict: bool) -> None:
    """The results are those of an eager call, also on other inputs than the recorded ones."""
    torch._dynamo.reset()
    program = torch.export.export(Calling(operator), tuple(operator.inputs()), strict=strict)
    nodes = [node for node in program.graph.nodes if "fedkern" in str(node.target)]
    assert bool(nodes) != operator.only_cpu, program.graph
    for seed in (0, 1):
        inputs = operator.inputs(seed=seed)
        expected = operator.results(*inputs)
        got = program.module()(*operator.fresh(inputs))
        torch.testing.assert_close(tuple(got), expected, rtol=1e-5, atol=1e-6)
