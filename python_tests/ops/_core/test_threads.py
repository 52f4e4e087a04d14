"""Tests of operators in two Python threads at once, and of torch.jit, which refuses to record the operators."""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fedkern import ops
from python_tests.ops.every_operator import NO_OPERATORS, OPERATORS, Operator, each_operator
from python_tests.ops.operator_cases import KERNELS, using

SUMMED_BY_TORCH = {"weighted_mean", "weighted_mean list"}  # the gradients of their weights are
SAME_AT_EVERY_LEVEL = {"blend", "fuse_concat", "fuse_mean", "weighted_mean", "trimmed_mean", "median"}


@pytest.mark.exhaustive
def test_two_threads_at_once() -> None:
    """All operators run in opposite orders, forward and backward.

    The bits are those of a single thread.
    """
    torch.set_num_threads(1)
    cases = []
    for operator in OPERATORS:
        leaves = [x.requires_grad_(operator.gradient) for x in operator.inputs(large=True)]

        def run(operator=operator, leaves=leaves) -> list[Tensor]:  # type: ignore[no-untyped-def]
            results = operator.results(*leaves)
            if not operator.gradient:
                return list(results)
            return [*results, *torch.autograd.grad([x.sum() for x in results], leaves)]

        # Where a reduction of torch's own is in it, its bits depend on the number of threads.
        cases.append((operator.name, run, [x.detach().clone() for x in run()]))
    start = threading.Barrier(2)
    wrong: list[str] = []

    def work(threads: int, order: list) -> None:
        torch.set_num_threads(threads)
        start.wait()
        for _ in range(3):
            for name, run, expected in order:
                try:
                    torch.testing.assert_close([x.detach() for x in run()], expected, rtol=1e-5, atol=1e-5)
                except BaseException as error:
                    wrong.append(f"{name} with {threads} threads: {error}")

    workers = [threading.Thread(target=work, args=(1, cases)), threading.Thread(target=work, args=(2, cases[::-1]))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong, wrong


def results(operator: Operator, inputs: list[Tensor], gradient: bool) -> list[Tensor]:
    """Return results, and with ``gradient`` the gradients of their sums."""
    found = operator.results(*inputs)
    gradients = torch.autograd.grad([x.sum() for x in found], inputs) if gradient else ()
    return [x.detach() for x in (*found, *gradients)]


def check_same_bits(operator: Operator, places: Sequence[tuple[str, int]]) -> None:
    """Check that kernels and numbers of threads give an operator's results and gradients the same bits."""
    gradient = operator.gradient and operator.name not in SUMMED_BY_TORCH
    inputs = [x.requires_grad_(gradient) for x in operator.inputs(large=True)]
    found = []
    for name, threads in places:
        torch.set_num_threads(threads)
        with using(name):
            found.append(results(operator, inputs, gradient))
    for place, tensors in zip(places, found, strict=True):
        for i, (got, expected) in enumerate(zip(tensors, found[0], strict=True)):
            assert torch.equal(got, expected), f"{operator.name}: {i} at {place}"


@pytest.mark.parametrize("name", KERNELS)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    """Operators that one core computes give the same bits on 1, 2 and 5 threads."""
    for operator in OPERATORS:
        if operator.compiled and not (operator.only_cpu and name == "cpu-portable"):
            check_same_bits(operator, [(name, threads) for threads in (1, 2, 5)])


@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_bits_do_not_depend_on_the_isa_level() -> None:
    """The operators sum nothing along a vector, or sum in fp64."""
    for operator in OPERATORS:
        if operator.name.split()[0] in SAME_AT_EVERY_LEVEL:
            check_same_bits(operator, [(name, torch.get_num_threads()) for name in KERNELS])


# -- torchscript -------------------------------------------------------------------------------------------------------


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
