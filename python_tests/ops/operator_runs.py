"""Running the operators of every_operator.py on a backend's device, as the CUDA and the Triton tests do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from every_operator import Operator
from operator_cases import assert_close
from torch import Tensor

from fedkern import ops


def run(operator: Operator, inputs: Sequence[Tensor], gradient: bool) -> list[Tensor]:
    """Results, and with ``gradient`` the inputs' gradients, of a loss that weighs every element differently."""
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
