"""Runs of the operators of every_operator.py on a backend's device, for the CUDA and the Triton tests."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedkern import ops
from python_tests.ops.every_operator import Operator
from python_tests.ops.operator_cases import assert_close


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among an argument's values."""
    return [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor)]


class Named(Tensor):
    """Tensor subclass without any behaviour of its own."""


class Calls(TorchDispatchMode):
    """Mode that records the calls of this project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fedkern":
            self.seen.append((function, args))
        return function(*args, **(kwargs or {}))


def run(operator: Operator, inputs: Sequence[Tensor], gradient: bool) -> list[Tensor]:
    """Return results, and with ``gradient`` the inputs' gradients, of a loss that weighs every element differently."""
    leaves = [x.detach().requires_grad_(gradient) for x in inputs]
    results = operator.results(*leaves)
    if not gradient:
        return list(results)
    loss = sum((r * (torch.arange(r.numel(), device=r.device) % 5 + 1).view_as(r)).sum() for r in results)
    assert isinstance(loss, Tensor)
    return [*results, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def gradients(operator: Operator) -> tuple[bool, ...]:
    return (False, True) if operator.gradient else (False,)


def compare(operator: Operator, device: torch.device) -> None:
    for gradient in gradients(operator):
        inputs = operator.inputs()
        got = run(operator, [x.to(device) for x in inputs], gradient)
        with ops.use_backend("reference"):
            expected = run(operator, [x.double() for x in inputs], gradient)
        for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            assert_close(f"{i}", ours.float().cpu(), theirs.double(), relative=1e-5, absolute=1e-5)


def check_same_bits(operator: Operator, device: torch.device, large: bool) -> None:
    inputs = [x.to(device) for x in operator.inputs(large=large)]
    for gradient in gradients(operator):
        results, again = (run(operator, inputs, gradient) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def capture(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def check_graph(operator: Operator, gpu: torch.device, seeds: Sequence[int]) -> None:
    """Check a graph, captured once and replayed on other inputs: no copy from the host, no wait."""
    for gradient in gradients(operator):
        static = [x.to(gpu) for x in operator.inputs(large=True)]
        graph, results = capture(lambda static=static, gradient=gradient: run(operator, static, gradient))
        for seed in seeds:
            fresh = [x.to(gpu) for x in operator.inputs(large=True, seed=seed)]
            for to, x in zip(static, fresh, strict=True):
                to.copy_(x)
            graph.replay()
            for got, expected in zip(results, run(operator, fresh, gradient), strict=True):
                assert torch.equal(got, expected)


def check_nothing_waits(operator: Operator, gpu: torch.device) -> None:
    inputs = [x.to(gpu) for x in operator.inputs()]
    for gradient in gradients(operator):
        run(operator, inputs, gradient)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(operator, inputs, gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_another_device(operator: Operator, gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = run(operator, [x.to(gpu) for x in operator.inputs()], False)
    got = run(operator, [x.to("cuda:1") for x in operator.inputs()], False)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))
