"""Tests of the traps between Python tensors and kernels that see pointers, for every operator."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fedkern import ops
from python_tests.ops import every_operator
from python_tests.ops.emulated_core import emulate
from python_tests.ops.every_operator import (
    NO_OPERATORS,
    OPERATORS,
    UPLOAD_WEIGHTS,
    Operator,
    each_differentiable,
    each_operator,
)
from python_tests.ops.operator_cases import BACKENDS, KERNELS, needs_core, using
from python_tests.ops.operator_runs import Calls, Named, run

pytestmark = pytest.mark.usefixtures("one_thread")


EVERY = {operator.name: operator for operator in OPERATORS}


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def near(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare relative to the largest value of each tensor."""
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * max(1.0, float(y.detach().abs().max())))


def test_every_public_operator_is_covered() -> None:
    missing = set(ops.__all__) - NO_OPERATORS - {operator.name.split()[0] for operator in OPERATORS}
    assert not missing, f"add {sorted(missing)} to OPERATORS of every_operator.py"


# --- tensors whose pointer does not tell what they hold


@pytest.mark.sampled(4)
@each_operator
def test_forward_mode_is_followed_or_refused(operator: Operator) -> None:
    """A kernel would silently drop the tangents: the references keep them, operators without gradient refuse."""
    inputs = operator.inputs(torch.float64)
    expected = operator.results(*inputs)
    directions = tuple(torch.randn_like(x) for x in inputs)
    with forward_ad.dual_level():
        close(operator.results(*inputs), expected)  # nothing to follow
        duals = [forward_ad.make_dual(x, v) for x, v in zip(operator.fresh(inputs), directions, strict=True)]
        if not operator.gradient:
            with pytest.raises(ValueError, match="has no gradient"):
                operator.call(*duals)
            return
        results = operator.results(*duals)
        tangents = tuple(forward_ad.unpack_dual(result).tangent for result in results)
        close(results, expected)
        if KERNELS:
            with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="through the reference under forward-mode"):
                operator.call(*duals)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for tangent, result in zip(tangents, operator.results(*leaves), strict=True):
        grads = torch.autograd.grad(result.sum(), leaves, allow_unused=True, retain_graph=True)
        along = sum((g * v).sum() for g, v in zip(grads, directions, strict=True) if g is not None)
        torch.testing.assert_close(tangent.sum(), along, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.func.jvp(operator.results, tuple(inputs), directions)[1], tangents)
    if operator.name.split()[0] in ("fuse_concat", "fuse_mean", "weighted_mean"):
        return  # lists under vmap and compile are other tests' subject
    stacked = [torch.stack([v, -v]) for v in directions]
    mapped = torch.func.vmap(lambda *v: torch.func.jvp(operator.results, tuple(inputs), v)[1])(*stacked)
    torch.testing.assert_close([m[0] for m in mapped], list(tangents))
    # Else shapes of operators before, which share this code, become symbols, and torch has no jvp of pooling for them.
    traced = torch.compile(lambda *x: torch.func.jvp(operator.results, x[: len(inputs)], x[len(inputs) :])[1],
                           backend="eager", dynamic=False)  # fmt: skip
    torch.testing.assert_close(traced(*inputs, *directions), tangents)


@each_operator
def test_tensors_that_outlived_a_transform(operator: Operator) -> None:
    """A tensor kept by torch.func.grad's function is still a wrapper, whose own pointer is an error."""
    inputs = operator.inputs()
    kept: list[Tensor] = []
    sources = [x.clone().requires_grad_(operator.gradient) for x in inputs]
    for x in sources:
        torch.func.grad(lambda inner: (kept.append(inner), inner.sum())[1])(x)
    if not operator.gradient:
        kept = [x.detach() for x in kept]
    expected, got = operator.results(*sources), operator.results(*kept)
    close(got, expected)
    if operator.gradient:
        grads = [torch.autograd.grad(sum(x.sum() for x in outputs), sources) for outputs in (expected, got)]
        close(grads[1], grads[0])


@needs_core  # autograd's own gradients of the references may be views
@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_operator
def test_fake_and_meta_tensors(operator: Operator, dtype: torch.dtype) -> None:
    """Fake tensors have null pointers: shapes, dtypes and strides, of gradients too, must come without reading them."""
    inputs = operator.inputs(dtype)
    expected = run(operator, inputs, operator.gradient)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = run(operator, [mode.from_tensor(x) for x in inputs], operator.gradient)
    metas = run(operator, [x.to("meta") for x in inputs], operator.gradient)
    for i, (fake, meta, real) in enumerate(zip(fakes, metas, expected, strict=True)):
        for x in (fake, meta):
            assert (x.shape, x.dtype) == (real.shape, real.dtype)
            if not operator.only_cpu or (x is fake and i == 0):  # torch's convolution of meta tensors has other strides
                assert x.stride() == real.stride()
        assert meta.is_meta


@each_operator
def test_subclasses_and_dispatch_modes(operator: Operator) -> None:
    inputs = operator.inputs()
    expected = operator.results(*inputs)
    close([x.as_subclass(Tensor) for x in operator.results(*(x.as_subclass(Named) for x in inputs))], list(expected))
    with Calls():
        close(operator.results(*inputs), expected)


@each_operator
def test_inference_mode(operator: Operator) -> None:
    expected = operator.results(*operator.inputs())
    with torch.inference_mode():
        close(operator.results(*operator.inputs()), expected)


# --- autograd


@each_differentiable
def test_gradients_may_be_changed_while_their_graph_is_retained(operator: Operator) -> None:
    """Some gradients are computed in the forward pass and only wait to be asked for."""
    inputs = [x.requires_grad_() for x in operator.inputs()]
    results = operator.results(*inputs)
    loss = results[0] if results[0].dim() == 0 else sum(x.sum() for x in results)
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    kept = [None if x is None else x.clone() for x in gradients]
    for x in gradients:
        if x is not None:
            x.zero_()
    for x, y in zip(torch.autograd.grad(loss, inputs, allow_unused=True), kept, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


@each_operator
def test_inputs_are_left_alone(operator: Operator) -> None:
    """Neither their values nor their version counters change, in either direction."""
    inputs = [x.requires_grad_(operator.gradient) for x in operator.inputs()]
    before = [x.detach().clone() for x in inputs]
    results = operator.results(*inputs)
    if operator.gradient:
        sum(x.sum() for x in results).backward()
    for x, kept in zip(inputs, before, strict=True):
        assert x._version == 0
        assert torch.equal(x.detach(), kept)


@each_differentiable
def test_what_changes_before_the_backward_pass(operator: Operator) -> None:
    """The gradients belong to the values during the call, or an error says that these have changed."""

    def leaves() -> list[Tensor]:
        return [x.clone().requires_grad_() for x in operator.inputs()]

    inputs = leaves()
    expected = torch.autograd.grad(sum(x.sum() for x in operator.results(*inputs)), inputs)
    for changed in range(len(inputs) + 1):
        inputs = leaves()
        results = operator.results(*inputs)
        loss = sum(x.sum() for x in results)
        with torch.no_grad():
            (*inputs, results[0])[changed].mul_(2)
        try:
            gradients = torch.autograd.grad(loss, inputs)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            close(gradients, expected)


WRITES: dict[str, tuple[Operator, Callable[[list[Tensor], Tensor], Any]]] = {
    "weighted_mean out": (EVERY["weighted_mean"], lambda x, out: ops.weighted_mean(*x, out=out)),
    "server_step out": (EVERY["server_step"], lambda x, out: ops.server_step(*x, UPLOAD_WEIGHTS, out=out)),
}


@pytest.mark.parametrize("name", WRITES)
def test_results_written_into_given_memory_are_known_to_autograd(name: str) -> None:
    operator, call = WRITES[name]
    inputs = operator.inputs()
    factor = torch.ones(33, requires_grad=True)
    out = torch.empty(33)
    product = factor * out
    with torch.no_grad():
        call(inputs, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.changed], ids=lambda o: o.name)
def test_state_written_to_is_known_to_autograd(operator: Operator) -> None:
    inputs = operator.inputs()
    before = [x.clone() for x in inputs]
    operator.call(*inputs)
    for i, (x, old) in enumerate(zip(inputs, before, strict=True)):
        assert (x._version > 0) == (i in operator.changed)
        assert torch.equal(x, old) == (i not in operator.changed)


@pytest.mark.sampled(12)
@each_operator
def test_gradient_or_a_clear_error(operator: Operator) -> None:
    inputs = [x.requires_grad_() for x in operator.inputs(torch.float64)]
    if not operator.gradient:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"gradient|no_grad"):
            operator.call(*inputs)
        with torch.no_grad():
            assert not any(x.requires_grad for x in operator.results(*inputs))
        return
    results = operator.results(*inputs)
    assert all(x.requires_grad for x in results)
    with torch.no_grad():
        assert not any(x.requires_grad for x in operator.results(*inputs))
    assert torch.autograd.gradcheck(operator.results, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator.results, inputs, fast_mode=True)
    places = tuple(range(len(inputs)))
    directions = [torch.randn_like(x) for x in inputs]

    def loss(*tensors: Tensor) -> Tensor:
        return sum(x.pow(2).sum() for x in operator.results(*tensors))  # type: ignore[return-value]

    def along(gradients: tuple[Tensor, ...]) -> Tensor:
        return sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))  # type: ignore[return-value]

    gradients = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    second = torch.func.grad(lambda *x: along(torch.func.grad(loss, places)(*x)), places)(*(x.detach() for x in inputs))
    torch.testing.assert_close(second, torch.autograd.grad(along(gradients), inputs))


@pytest.mark.exhaustive
@each_operator
def test_derivatives_in_every_backend(backend: str, operator: Operator) -> None:
    if not operator.gradient or (operator.only_cpu and backend != "reference"):
        pytest.skip("has no gradient, or no kernel for fp64")
    inputs = [x.requires_grad_() for x in operator.inputs(torch.float64)]
    assert torch.autograd.gradcheck(operator.results, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator.results, inputs, fast_mode=True)


@each_differentiable
def test_grad_outputs_of_any_layout_many_at_once_and_a_second_backward(operator: Operator) -> None:
    inputs = [x.requires_grad_() for x in operator.inputs()]
    results = operator.results(*inputs)
    draw = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=draw) for x in results]

    def gradients(grads: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, inputs, grads, retain_graph=True)

    expected = [x.clone() for x in gradients(grads)]
    close(list(gradients([torch._neg_view(-g) for g in grads])), expected)
    turned = [g.movedim(0, -1).contiguous().movedim(-1, 0) if g.dim() else g for g in grads]
    close(list(gradients(turned)), expected)
    close(list(gradients(grads)), expected)  # what was saved is as it was
    plain = gradients([torch.ones_like(x) for x in results])
    close(list(gradients([torch.ones(()).expand(x.shape) for x in results])), list(plain))
    with torch.autocast("cpu", torch.bfloat16, enabled=operator.compiled):  # the forward pass had none
        stacked = [torch.stack([g, -2 * g]) for g in grads]
        batched = torch.autograd.grad(results, inputs, stacked, is_grads_batched=True)
    for i, factor in enumerate((1, -2)):
        near([x[i] for x in batched], [factor * x for x in expected])


# --- hooks on saved tensors


def _turn(x: Tensor, axis: int) -> Tensor:
    """Return the same values with that axis last in memory."""
    return x.movedim(axis, -1).contiguous().movedim(-1, axis) if x.dim() > 1 else x


# How torch.autograd.graph.save_on_cpu and hooks that compress or quantise may give a tensor back.
SAVED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "through NumPy": (lambda x: x.numpy().copy(), torch.from_numpy),
    "through float64": (lambda x: (x.double(), x.dtype), lambda kept: kept[0].to(kept[1])),
    "negative view": (
        lambda x: -x if x.is_floating_point() else x,
        lambda x: torch._neg_view(x) if x.is_floating_point() else x,
    ),
    "first axis last": (torch.clone, lambda x: _turn(x, 0)),
    "channels last": (torch.clone, lambda x: _turn(x, 1)),
    "rows and columns swapped": (torch.clone, lambda x: _turn(x, -2)),
    "every other number": (lambda x: torch.stack([x, x], -1), lambda x: x[..., 0]),
    "negative view with strides": (
        lambda x: torch.stack([-x, x], -1) if x.is_floating_point() else x,
        lambda x: torch._neg_view(x[..., 0]) if x.is_floating_point() else x,
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("way", SAVED)
@pytest.mark.parametrize("name", [operator.name for operator in OPERATORS if operator.gradient])
def test_saved_tensors_that_come_back_otherwise(name: str, way: str) -> None:
    if name == "conv_norm groups" and way not in ("through NumPy", "through float64", "negative view", "channels last"):
        pytest.skip("PyTorch's own group norm (2.13) takes the statistics that it saved for contiguous")
    operator = EVERY[name]
    rows = operator.inputs()
    for given in (rows, [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in rows]):
        inputs = [x.requires_grad_() for x in given]
        plain = operator.results(*inputs)
        with torch.autograd.graph.saved_tensors_hooks(*SAVED[way]):
            results = operator.results(*inputs)
        expected, got = (torch.autograd.grad(sum(x.square().sum() for x in outs), inputs) for outs in (plain, results))
        close(got, expected)


# --- torch.library


@pytest.mark.sampled(12)
@each_operator
def test_vmap_and_func_grad_or_a_clear_error(operator: Operator) -> None:
    inputs = operator.inputs()
    batches = [torch.stack([x, x * 0.5, x + 0.25]) for x in inputs]

    def loss(*tensors: Tensor) -> Tensor:
        return sum(x.pow(2).sum() for x in operator.results(*tensors))  # type: ignore[return-value]

    if not operator.vmap:
        transforms: list[Callable[..., Any]] = [
            lambda: torch.vmap(operator.call)(*batches),
            lambda: torch.func.grad(loss)(*inputs),
            lambda: torch.func.vjp(operator.results, *inputs),
            lambda: torch.func.linearize(operator.results, *inputs),
            lambda: torch.vmap(torch.func.grad(loss, argnums=len(inputs) - 1))(*batches),
        ]
        for call in transforms:
            with pytest.raises((RuntimeError, ValueError), match=r"vmap over .* is not supported|has no gradient"):
                call()
        return
    mapped = torch.vmap(operator.results)(*batches)
    for i in range(3):
        close([x[i] for x in mapped], list(operator.results(*(x[i] for x in batches))))

    gradient = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    near(gradient(*inputs), expected)
    for i, x in enumerate(inputs):  # one operand under a transform, the others outside of it

        def alone(x: Tensor, i: int = i) -> Tensor:
            return loss(*inputs[:i], x, *inputs[i + 1 :])

        value, pull = torch.func.vjp(alone, x)
        of_rows = torch.vmap(torch.func.grad(alone))(batches[i])
        near([*pull(torch.ones_like(value)), of_rows[0]], [expected[i]] * 2)
        near([torch.func.grad(lambda rows, alone=alone: torch.vmap(alone)(rows).sum())(batches[i])], [of_rows])
    # Mapped over the last axis, one input after the other being shared.
    for shared in range(len(inputs)):
        axes = tuple(None if i == shared and i else -1 for i in range(len(inputs)))
        given = [x if a is None else b.movedim(0, -1) for x, b, a in zip(inputs, batches, axes, strict=True)]
        mapped_gradients = torch.vmap(gradient, in_dims=axes)(*given)
        for i in range(3):
            single = [x if a is None else b[i] for x, b, a in zip(inputs, batches, axes, strict=True)]
            near([x[i] for x in mapped_gradients], gradient(*single))


@pytest.mark.sampled(4)
@each_operator
def test_compiled_to_one_node_without_recompilation(operator: Operator) -> None:
    nodes: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        calls = (node.target for node in graph.graph.nodes if node.op == "call_function")
        nodes.extend(name for name in map(str, calls) if name.startswith("fedkern."))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(operator.call, fullgraph=True, dynamic=True, backend=keep)
    # Sizes that happen to be equal at first are not the same.
    distinct = torch.fx.experimental._config.patch(use_duck_shape=False)
    # torch's own convolution, which serves conv_norm and conv_pool here, may compile anew for another batch size.
    with torch._dynamo.config.patch(error_on_recompile=not operator.only_cpu), distinct:
        for inputs in operator.two_sizes():
            got = compiled(*operator.fresh(inputs))
            with ops.use_backend("reference" if operator.only_cpu else None):
                expected = operator.results(*inputs)
            close(got if isinstance(got, tuple) else (got,), expected)
    assert len(nodes) == (not operator.only_cpu)


@pytest.mark.exhaustive
@pytest.mark.parametrize("forced", [None, "reference"])
@each_differentiable
def test_compiled_gradients(operator: Operator, forced: str | None) -> None:
    """Compilers meet the plain reference inside an operator, also where no kernel serves."""

    def total(*tensors: Tensor) -> Tensor:
        return torch.stack([result.square().sum() for result in operator.results(*tensors)]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True, dynamic=True)
    with ops.use_backend("reference" if operator.only_cpu else forced):
        for inputs in operator.two_sizes():
            leaves = [x.requires_grad_() for x in inputs]
            expected = torch.autograd.grad(total(*leaves), leaves)
            near(torch.autograd.grad(compiled(*leaves), leaves), expected)


@contextlib.contextmanager
def served_by(name: str) -> Iterator[None]:
    """Yield the unforced choice, Triton's interpreter or the emulated CUDA core."""
    if name == "triton" and name not in BACKENDS:
        pytest.skip("Triton's interpreter is not there")
    with {"chosen": contextlib.nullcontext, "triton": lambda: using("triton"), "cuda": emulate}[name]():
        yield


# Who has not compiled the emulated core yet waits a minute of processor time for it.
@pytest.mark.parametrize(
    "name", [pytest.param("chosen", marks=needs_core), "triton", pytest.param("cuda", marks=pytest.mark.exhaustive)]
)
def test_opcheck_of_every_library_operator(name: str) -> None:
    """Each gets the arguments of the public functions, the backward operators too."""
    with served_by(name):
        check_library(name)


def check_library(name: str) -> None:
    checked = set()
    for operator in OPERATORS:
        if operator.only_cpu:  # has none
            continue
        dtype = torch.float32 if name == "cuda" else torch.float64  # its weighted sorts know no fp64
        inputs = [x.requires_grad_(operator.gradient) for x in operator.inputs(dtype)]
        with Calls() as calls:
            results = operator.results(*inputs)
            if operator.gradient:
                torch.autograd.backward(results, [torch.ones_like(x) for x in results])
        for function, args in calls.seen:
            if function not in checked:
                checked.add(function)
                utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
                torch.library.opcheck(function, args, test_utils=utilities)
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fedkern::")}
    seen = {f"fedkern::{function._schema.name.partition('::')[2]}" for function in checked}
    assert {name.partition(".")[0] for name in defined} <= seen | every_operator.INDIRECT
