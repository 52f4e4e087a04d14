"""fuse_concat and fuse_mean under autograd, torch.compile and torch.func; the same bits every time."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkern.ops import fuse_concat, fuse_mean, use_backend
from fedkern.ops._fuse.reference import fuse_concat_reference, fuse_mean_reference
from python_tests.ops.operator_cases import KERNELS, using

FUNCTIONS = {fuse_concat: fuse_concat_reference, fuse_mean: fuse_mean_reference}

needs_core = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")


def case_fp64(layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    """Two maps, scale and shift, none near the ReLU's corner."""
    maps = [torch.randn(2, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(2)]
    scale = torch.rand(6, dtype=torch.float64) + 0.5
    return [t.requires_grad_() for t in (*maps, scale, torch.randn(6, dtype=torch.float64))]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(backend: str, function: Callable) -> None:
    *maps, scale, shift = case_fp64()
    fixed = scale.detach()
    for call, inputs in (
        (lambda a, b, s, t: function([a, b], s, t, "relu"), (*maps, scale, shift)),
        (lambda a, b, t: function([a, b], fixed, t, "relu"), (*maps, shift)),
        (lambda a, s: function([a, maps[1].detach()], s), (maps[0], scale)),
    ):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=backend == "triton")
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=backend == "triton")


@pytest.mark.exhaustive
def test_opcheck() -> None:
    for layout, relu, mean in itertools.product((torch.contiguous_format, torch.channels_last), (0, 1), (0, 1)):
        *maps, scale, shift = case_fp64(layout)
        for vectors in ((scale, shift), (None, None), (scale.detach(), None)):
            torch.library.opcheck(torch.ops.fedkern.fuse.default, (maps, *vectors, bool(relu), bool(mean)))
        grad = torch.randn(2, 3 if mean else 6, 2, 2, dtype=torch.float64, requires_grad=True)
        rest = (bool(relu), bool(mean), [3, 3], [True, False], True, True)
        torch.library.opcheck(torch.ops.fedkern.fuse_backward.default, (grad, maps, None, scale, shift, *rest))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_is_one_node(function: Callable) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    *maps, scale, shift = case_fp64()
    torch._dynamo.reset()
    torch.compile(lambda m, s, t: function(m, s, t, "relu"), fullgraph=True, backend=keep)(maps, scale, shift)
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == ["fedkern.fuse"]


@pytest.mark.exhaustive
def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of the tests before
    compiled = torch.compile(lambda m, s, t: fuse_concat(m, s, t, "relu"), fullgraph=True, dynamic=True)
    scale, shift = (torch.randn(6, requires_grad=True) for _ in range(2))
    for batch in (5, 3, 7):
        maps = [
            torch.randn(batch, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
        ]
        out, wanted = compiled(maps, scale, shift), fuse_concat(maps, scale, shift, "relu")
        assert torch.equal(out, wanted)
        assert out.stride() == wanted.stride()
        leaves = (*maps, scale, shift)
        for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), leaves) for y in (out, wanted)), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 + 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_func_transforms_go_through_the_reference(function: Callable) -> None:
    maps = torch.randn(4, 2, 3, 5, 2)
    out = torch.func.vmap(lambda a: function([a, a], activation="relu"))(maps)
    assert torch.equal(out, torch.stack([function([a, a], activation="relu") for a in maps]))
    x = maps[0].double()
    ours = torch.func.grad(lambda a: function([a, -a], activation="relu").pow(2).sum())(x)
    torch.testing.assert_close(ours, torch.func.grad(lambda a: FUNCTIONS[function]([a, -a], relu=True).pow(2).sum())(x))


@needs_core
def test_a_forced_kernel_says_that_it_knows_no_transforms() -> None:
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was forced.*reference under torch\.func"):
        torch.func.vmap(lambda a: fuse_concat([a, a]))(torch.randn(4, 2, 3))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batched_backward(function: Callable) -> None:
    *maps, scale, shift = case_fp64()
    leaves = [*maps, scale, shift]
    out = function(maps, scale, shift, "relu")
    many = torch.randn(3, *out.shape, dtype=torch.float64)
    ours = torch.autograd.grad(out, leaves, many, is_grads_batched=True)
    wanted = torch.autograd.grad(FUNCTIONS[function](maps, scale, shift, True), leaves, many, is_grads_batched=True)
    for one, two in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, two)


def run_large(layout: torch.memory_format) -> list[Tensor]:
    torch.manual_seed(3)
    maps = [torch.randn(9, 30, 17, 16).contiguous(memory_format=layout).requires_grad_() for _ in range(4)]
    scale, shift = (torch.randn(120, requires_grad=True) for _ in range(2))
    results = []
    for function in FUNCTIONS:
        out = function(maps, scale, shift, "relu")
        results += [out, *torch.autograd.grad(out, (*maps, scale, shift), torch.randn_like(out))]
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_same_bits_on_every_isa_and_thread_count(layout: torch.memory_format) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = [run_large(layout)]
        for name in KERNELS:
            with using(name):
                results.append(run_large(layout))
        torch.set_num_threads(2)
        results.append(run_large(layout))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_changing_what_was_saved_raises() -> None:
    maps = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    out = fuse_concat(maps, activation="relu")
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_what_is_needed_is_saved() -> None:
    maps = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    out = fuse_concat(maps, torch.full((6,), 3.0))
    with torch.no_grad():
        maps[0].zero_()
        out.zero_()  # neither matters to the maps' gradients
    out.sum().backward()
    assert torch.equal(maps[0].grad, torch.full_like(maps[0], 3.0))


def test_sixteen_bit_maps_with_wide_vectors(backend: str) -> None:
    """Batch norm keeps fp32 parameters under autocast."""
    x = torch.randn(2, 3, 4).bfloat16().requires_grad_()
    scale = torch.randn(6, requires_grad=True)
    out = fuse_concat([x, x], scale, None)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert scale.grad.dtype is torch.float32
    torch.testing.assert_close(scale.grad, x.detach().float().sum((0, 2)).repeat(2))
