"""blend under autograd, torch.compile and torch.func; the same bits for every run, thread and process."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedkern.ops import blend
from fedkern.ops._blend.blend import blend_reference
from python_tests.ops.operator_cases import BACKENDS, KERNELS, using

pytestmark = pytest.mark.usefixtures("one_thread")


needs_core = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")


def case_fp64() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    return x, y, torch.rand(3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 4, 0])


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name: str) -> None:
    x, y, alpha, index = case_fp64()
    with using(name):
        for function, inputs in (
            (lambda x, y, a: blend(x, y, a, index=index), (x, y, alpha)),
            (lambda x, y: blend(x, y, 0.3, index=index), (x, y)),
            (lambda x, a: blend(x, y.detach()[:3], a), (x, alpha)),
            (lambda x, y, a: blend(x, y, a, index=index), (x, y, alpha.detach()[0].clone().requires_grad_())),
        ):
            assert torch.autograd.gradcheck(function, inputs, fast_mode=name == "triton")
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=name == "triton")


@pytest.mark.exhaustive
def test_opcheck() -> None:
    x, y, alpha, index = case_fp64()
    torch.library.opcheck(torch.ops.fedkern.blend.default, (x, y, alpha, 0.5, index))
    torch.library.opcheck(torch.ops.fedkern.blend.default, (x, y.detach()[:3], None, 0.25, None))
    grad = torch.randn_like(x, requires_grad=True)
    arguments = (grad, x, y, alpha, 0.5, index, 5, True, True, True)
    torch.library.opcheck(torch.ops.fedkern.blend_backward.default, arguments)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fedkern.blend.default, (image, image, None, 0.25, None))


def test_compile_is_one_node() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    x, y, alpha, index = case_fp64()
    torch._dynamo.reset()
    torch.compile(lambda x, y, a: blend(x, y, a, index=index), fullgraph=True, backend=keep)(x, y, alpha)
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == ["fedkern.blend"]


@pytest.mark.exhaustive
def test_compile() -> None:
    x, y, alpha, index = case_fp64()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y, a, i: blend(x, y, a, index=i), fullgraph=True)
    for tensors in ((x, y, alpha), tuple(t.detach().clone().requires_grad_() for t in (x, y, alpha))):
        out = compiled(*tensors, index)
        assert torch.equal(out, blend(*tensors, index=index))
        compiled_grads = torch.autograd.grad(out.pow(2).sum(), tensors)
        grads = torch.autograd.grad(blend(*tensors, index=index).pow(2).sum(), tensors)
        for one, two in zip(compiled_grads, grads, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.sampled(27)
@pytest.mark.parametrize(
    "dims", [d for d in itertools.product((0, 1, None), repeat=4) if any(x is not None for x in d)]
)
def test_vmap_and_grad(dims: tuple[int | None, ...]) -> None:
    torch.manual_seed(1)
    count = 4
    full = (
        torch.randn(count, 3, 2, 3, dtype=torch.float64),
        torch.randn(count, 5, 2, 3, dtype=torch.float64),
        torch.rand(count, 3, dtype=torch.float64),
        torch.randint(0, 5, (count, 3)),
    )
    given = [t[0] if d is None else t.movedim(0, d) for t, d in zip(full, dims, strict=True)]
    each = [[t[0] if d is None else t[v] for t, d in zip(full, dims, strict=True)] for v in range(count)]

    def ours(x: Tensor, y: Tensor, a: Tensor, i: Tensor) -> Tensor:
        return blend(x, y, a, index=i)

    out = torch.func.vmap(ours, dims)(*given)
    torch.testing.assert_close(out, torch.stack([blend_reference(*arguments) for arguments in each]))

    def loss(function: object, *arguments: Tensor) -> Tensor:
        return function(*arguments).pow(2).sum()  # type: ignore[operator]

    gradients = torch.func.vmap(torch.func.grad(lambda *a: loss(ours, *a), argnums=(0, 1, 2)), dims)(*given)
    wanted = [torch.func.grad(lambda *a: loss(blend_reference, *a), argnums=(0, 1, 2))(*e) for e in each]
    for k in range(3):
        torch.testing.assert_close(gradients[k], torch.stack([w[k] for w in wanted]))


def test_vmap_keeps_the_index_check() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    index = torch.tensor([[0, 1, 2], [0, 3, 1]])  # 3 would be another entry's row 0
    with pytest.raises(ValueError, match="index must be in"):
        torch.func.vmap(lambda x, y, i: blend(x, y, 0.5, index=i))(x, y, index.flip(0))


def test_second_order_transforms() -> None:
    x, y, alpha, index = (t.detach() for t in case_fp64())

    def loss(function: object) -> object:
        return lambda x, a: function(x, y, a, index).pow(3).sum()  # type: ignore[operator]

    ours = loss(lambda x, y, a, i: blend(x, y, a, index=i))
    for nested in (
        lambda f: torch.func.jacrev(torch.func.grad(f, argnums=1), argnums=0),
        lambda f: torch.func.grad(lambda x, a: torch.func.grad(f)(x, a).pow(2).sum(), argnums=1),
    ):
        torch.testing.assert_close(nested(ours)(x, alpha), nested(loss(blend_reference))(x, alpha))


def test_batched_backward() -> None:
    x, y, alpha, index = case_fp64()
    many = torch.randn(6, 3, 2, 4, dtype=torch.float64)
    ours = torch.autograd.grad(blend(x, y, alpha, index=index), (x, y, alpha), many, is_grads_batched=True)
    wanted = torch.autograd.grad(blend_reference(x, y, alpha, index), (x, y, alpha), many, is_grads_batched=True)
    for one, two in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, two)


def run_large() -> list[Tensor]:
    torch.manual_seed(3)
    x, y = (torch.randn(64, 64, 14, 14, requires_grad=True) for _ in range(2))
    alpha = torch.rand(64, requires_grad=True)
    out = blend(x, y, alpha, index=torch.randint(0, 64, (64,)))
    out.backward(torch.randn_like(out))
    return [out.detach(), x.grad, y.grad, alpha.grad]


def test_same_bits_for_every_run_and_thread_count() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, again = run_large(), run_large()
        torch.set_num_threads(2)
        two = run_large()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(first, again, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@needs_core
def test_same_bits_on_every_isa() -> None:
    results = []
    for name in KERNELS:
        with using(name):
            results.append(run_large())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_of_a_sum_and_a_second_backward() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x, y = (torch.randn(3, 4, 5, 5).to(memory_format=layout).requires_grad_() for _ in range(2))
        out = blend(x, y, 0.25, index=torch.tensor([0, 0, 2]))
        out.sum().backward(retain_graph=True)
        torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))
        torch.testing.assert_close(y.grad[:, 0, 0, 0], torch.tensor([1.5, 0.0, 0.75]))
        assert x.grad.is_contiguous(memory_format=layout)
        out.sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, 0.5))


def test_changing_a_saved_tensor_raises() -> None:
    x, y, alpha, index = case_fp64()
    index = index.clone()
    out = blend(x, y, alpha, index=index)
    index.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_what_alpha_needs_is_saved() -> None:
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out = blend(x, y, 0.5)
    with torch.no_grad():
        x.zero_()  # its values do not matter to the gradients
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.5))
