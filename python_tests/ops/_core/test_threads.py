"""Tests of operators in two Python threads at once, each with its own number of torch threads."""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from python_tests.ops.every_operator import OPERATORS, Operator
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
