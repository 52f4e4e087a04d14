"""Calls of conv_norm and conv_pool, and the same in float64 by the reference."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fedkern import ops
from fedkern.ops._conv import conv_norm
from fedkern.ops._conv.kernels import ConvKernels, Inputs, Settings
from python_tests.ops.operator_cases import KERNELS, using
from python_tests.ops.operator_runs import Calls

LAST = torch.channels_last
# At the portable ISA level there is no kernel.
CONV = [name for name in KERNELS if name != "cpu-portable"]
each_kernel = pytest.mark.parametrize("name", CONV)
needs_portable = pytest.mark.skipif(not 0 < len(CONV) < len(KERNELS), reason="no core for several ISA levels")
needs_core = pytest.mark.skipif(not CONV, reason="no compiled core for AVX2 or AVX-512")
Given = dict[str, Any]
LEAVES = ("x", "weight", "scale", "shift", "bias", "residual")

# Of channels that no kernel takes: zeros fill them up to eights or sixteens.
FILLED = ((3, 7, 9, 8), (7, 7, 8, 8), (7, 14, 7, 9), (14, 28, 8, 8), (28, 16, 5, 3), (24, 48, 6, 7), (45, 90, 8, 8))

# In and out channels and sizes [H, W] that each kernel serves, direct ones and Winograd's; odd sizes and least ones.
SERVED = (
    (1, 8, 28, 28), (3, 8, 32, 32), (3, 40, 5, 7), (3, 16, 2, 4), (8, 16, 16, 16), (8, 24, 9, 13), (16, 32, 8, 8),
    (16, 8, 7, 6), (32, 64, 16, 16), (32, 48, 5, 3), (64, 64, 8, 8),
    *FILLED,
)  # fmt: skip

# The same with a stride of 2.
STRIDED = ((16, 32, 8, 8), (32, 64, 10, 13), (16, 16, 9, 11), (32, 48, 3, 8), (14, 28, 8, 9))

# Of kernels of one tap, with either stride.
POINTS = ((16, 32, 8, 8), (32, 64, 10, 13), (8, 8, 9, 7), (24, 40, 4, 16), (64, 16, 3, 9), (7, 14, 8, 9))

# conv_pool's: side of the kernel, padding, in and out channels and sizes [H, W]; odd and least ones, and Winograd's.
POOLED = (
    (3, 0, 1, 6, 4, 5), (3, 0, 3, 20, 9, 12), (3, 0, 16, 8, 7, 6), (3, 0, 32, 64, 10, 11), (3, 0, 200, 8, 8, 9),
    (3, 1, 1, 8, 2, 3), (3, 1, 6, 20, 5, 7), (3, 1, 3, 32, 16, 17), (3, 1, 16, 16, 2, 2), (3, 1, 16, 32, 9, 8),
    (3, 1, 32, 64, 16, 16), (3, 1, 32, 6, 8, 5), (5, 0, 1, 6, 28, 28), (5, 0, 6, 16, 14, 14), (5, 0, 3, 8, 6, 7),
    (5, 0, 32, 64, 9, 11), (5, 0, 256, 1, 7, 8), (5, 2, 1, 32, 13, 14), (5, 2, 3, 6, 2, 3), (5, 2, 32, 16, 2, 2),
    (5, 2, 16, 20, 9, 8), (5, 2, 32, 64, 7, 6),
)  # fmt: skip

# (stride, side of the kernel, shape).
SHAPES = [
    *((1, 3, shape) for shape in SERVED),
    *((2, 3, shape) for shape in STRIDED),
    *((stride, 1, shape) for stride in (1, 2) for shape in POINTS),
]

# Those of a group norm, whose own channels are not filled up.
GROUPED = [case for case in SHAPES if case[2][1] % 8 == 0]


def arguments(
    batch: int = 4, channels: int = 8, out: int = 16, height: int = 8, width: int = 8, *, residual: bool = False,
    grouped: bool = False, stride: int = 1, side: int = 3, weight_last: bool = True, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    """Return channels-last tensors for a call, in which every tensor with a gradient requires it.

    ``grouped``: with groups.
    """
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    given = {
        "x": randn(batch, channels, height, width).contiguous(memory_format=LAST),
        "weight": randn(out, channels, side, side) / (side * channels**0.5),
        "scale": 1 + randn(out) / 4,
        "shift": randn(out) / 2,
        "mean": randn(out) / 4,
        "variance": 0.5 + randn(out).abs(),
        "bias": None,
        "residual": None,
    }
    if grouped:
        given |= {"mean": None, "variance": None, "bias": randn(out) / 2}
    if residual:
        rows, columns = -(-height // stride), -(-width // stride)
        given["residual"] = randn(batch, out, rows, columns).contiguous(memory_format=LAST)
    if weight_last:
        given["weight"] = given["weight"].contiguous(memory_format=LAST)
    for name in LEAVES:
        if given[name] is not None:
            given[name].requires_grad_()
    return given


def pool_arguments(
    shape: tuple[int, ...] = (3, 1, 3, 8, 8, 8), batch: int = 4, *, bias: bool = True, last: bool = False,
    weight_last: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    """Return tensors that require gradients for a call of conv_pool, and its padding.

    ``last``: channels-last.
    """
    side, padding, channels, out, height, width = shape
    given = arguments(batch, channels, out, height, width, side=side, seed=seed, dtype=dtype, weight_last=False)
    found = {name: given[name].detach() for name in ("x", "weight")} | {"bias": given["shift"].detach()}
    for name, is_last in (("x", last), ("weight", weight_last)):
        found[name] = found[name].contiguous(memory_format=LAST if is_last else torch.contiguous_format)
    for x in found.values():
        x.requires_grad_()
    return {**found, "bias": found["bias"] if bias else None, "padding": padding}


def pool_grad_for(given: Given, relu: bool = True, seed: int = 1) -> Tensor:
    """Return a gradient like :func:`grad_for`, of conv_pool."""
    wide = exact(given)
    with torch.no_grad():
        z = F.conv2d(wide["x"], wide["weight"], wide["bias"], padding=given["padding"])
    return grad_of(z, relu, 2, seed)


def exact(given: Given) -> Given:
    """Return the same in float64, as leaves of their own."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }


def cut_off(given: Given) -> Given:
    """Return the same tensors without gradients."""
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}


def grad_for(given: Given, seed: int = 1, **settings: Any) -> Tensor:
    """Return a gradient of the result: 0 where rounding could decide what the ReLU or a window's maximum passes on."""
    plain = {**settings, "relu": False, "pool": 1, "update": False}
    with torch.no_grad(), ops.use_backend("reference"):
        z = ops.conv_norm(**exact(given), **plain)
    return grad_of(z, settings.get("relu", True), settings.get("pool", 1), seed).contiguous(memory_format=LAST)


def grad_of(z: Tensor, relu: bool, pool: int, seed: int, near: float = 1e-4) -> Tensor:
    """Return the same for the input of the ReLU and the pooling.

    ``near``: the effect of rounding.
    """
    clear = torch.ones_like(z, dtype=torch.bool)
    if relu:
        clear, z = z.abs() > near, z.relu()
    if pool == 2:
        height, width = (size // 2 * 2 for size in z.shape[2:])
        windows = z[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
        largest, second = windows.topk(2, -1).values.unbind(-1)
        clear = (largest - second > near) | (largest == 0)  # a dead window passes nothing on
        if relu:
            clear &= (largest == 0) | (largest > near)
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(clear.shape, generator=draw).where(clear, 0)


def results(given, grad=None, *, call=ops.conv_norm, **settings):
    """Return the result, the running statistics after the call, and with ``grad`` the gradients, by name."""
    statistics = {n: copy.deepcopy(given[n]) for n in ("mean", "variance") if given.get(n) is not None}
    out = call(**{**given, **statistics}, **settings)
    found = {"out": out.detach(), **statistics}
    leaves = leaves_of(given)
    if grad is not None:
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found


def serve_both(name, given, oracle, grad=None, **settings):
    """Return the results of a kernel for ``given``, and those of the reference for ``oracle``."""
    with using(name):
        got = results(given, grad, **settings)
    with ops.use_backend("reference"):
        return got, results(oracle, grad, **settings)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5, label: str = "") -> None:
    """Compare with float64 results, relative to the largest value of each."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].shape == x.shape, f"{label} {name}"
        error = float((got[name].double() - x).abs().max())
        largest = max(float(x.abs().max()), 1e-3)
        assert error <= tolerance * largest, f"{label} {name}: off by {error:.2g}, the largest value is {largest:.2g}"


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
    """Check that both have the same bits."""
    for name in expected if names is None else names:
        assert torch.equal(got[name], expected[name]), name


# --- what is around calls


class Served(list[str]):
    """Record of kernel calls, "forward" or "backward" each, with the last call's result as ``last``."""

    last: Any = None


# --- what both operators promise


def leaves_of(given: Given) -> dict[str, Tensor]:
    """Return the tensors of a call that have a gradient, in the order of its kernel's gradients."""
    return {name: given[name] for name in LEAVES if given.get(name) is not None and given[name].requires_grad}


def check_chosen_gradients(calls, name, given, grad, limit, **settings):
    """Check that chosen gradients have the bits of a call for all, and that no others are computed."""
    leaves, order = [*leaves_of(given)], [leaf for leaf in LEAVES if leaf in given]
    with using(name):
        full = results(given, grad, **settings)
        for count in range(1, limit):
            for chosen in itertools.combinations(leaves, count):
                tensors = {n: x.detach().requires_grad_(n in chosen) if n in leaves else x for n, x in given.items()}
                got = results(tensors, grad, **settings)
                assert [n for n, x in zip(order, calls.last, strict=True) if x is not None] == [*chosen]
                assert set(got) - {"mean", "variance"} == {"out", *(f"gradient of {n}" for n in chosen)}
                assert_same(got, full, list(got))


def check_threads(name: str, counts: Sequence[int], given: Given, grad: Tensor, **settings: Any) -> None:
    """Check that the bits are the same on any number of threads, and without gradients."""
    found = []
    for threads in counts:
        torch.set_num_threads(threads)
        with using(name), torch.no_grad():
            evaluated = results(given, **settings)
            with torch.enable_grad():
                found.append(results(given, grad, **settings))
    for got in found:
        assert_same(got, found[0])
        assert_same(got, evaluated, list(evaluated))


def check_second_derivatives(given: Given, grad: Tensor, call: Callable[..., Tensor], **settings: Any) -> None:
    """Check the gradients and their derivatives beside the reference's."""
    leaves, found = [*leaves_of(given).values()], []
    for name in (None, "reference"):
        with ops.use_backend(name):
            along = grad.clone().requires_grad_()
            gradients = torch.autograd.grad(call(**given, **settings), leaves, along, create_graph=True)
            loss = torch.stack([(x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in gradients]).sum()
            found.append([*gradients, *torch.autograd.grad(loss, [*leaves, along], materialize_grads=True)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


def check_spreading(name, given, grad, label, call=ops.conv_norm, **settings):
    """Check that infinities and NaN spread as in torch, and no further.

    Returns the results with gradients, those without, and the reference's.
    """
    with using(name):
        got, evaluated = results(given, grad, call=call, **settings), results(cut_off(given), call=call, **settings)
    with ops.use_backend("reference"):
        expected = results(given, grad, call=call, **settings)
    assert torch.equal(got["out"].isfinite(), evaluated["out"].isfinite())
    for key, x in expected.items():
        finite = x.isfinite()
        assert torch.equal(got[key][~finite].nan_to_num(9), x[~finite].nan_to_num(9)), (key, label)
        if finite.any():
            assert_near({key: got[key][finite]}, {key: x[finite]}, label=label)
    return got, evaluated, expected


def check_no_worse_than_eager(name: str, given: Given, grad: Tensor, label: object, **settings: Any) -> None:
    with ops.use_backend("reference"):
        expected, eager = results(exact(given), grad, **settings), results(given, grad, **settings)
    with using(name):
        ours = results(given, grad, **settings)
    for key, x in expected.items():
        off = [float((found[key] - x).abs().max() / x.abs().max()) for found in (ours, eager)]
        assert off[0] <= max(3 * off[1], 1e-5), (label, key, off)


class Overriding(TorchFunctionMode):
    pass


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Calls,
    "function mode": Overriding,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "forward-mode AD": forward_ad.dual_level,
    "reference": lambda: ops.use_backend("reference"),
    "triton": lambda: ops.use_backend("triton"),
    "cuda": lambda: ops.use_backend("cuda"),
}


def serving(**call: Any) -> ConvKernels | None:
    """Return the kernel that serves a call of conv_norm with these arguments."""
    inputs = {name: call.pop(name, None) for name in LEAVES}
    return conv_norm.choose_norm_kernels(Inputs(**inputs), Settings(**call))


def check_never_served(serves: Callable[..., Any], given: Given) -> None:
    """Check that compilers, transforms, tracing and exports meet no kernel, and that asking does not disturb them."""
    asked: list[bool] = []

    def call(x: Tensor) -> Tensor:
        fit = serves(**{**given, "x": x}) is not None
        asked.append(fit)
        return x * 2 if fit else x

    x = given["x"].detach()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(x), x)
    torch.func.vmap(call)(torch.stack([x, x]))
    torch.func.grad(lambda x: call(x).sum())(x)
    torch.jit.trace(call, x, check_trace=False)
    torch.export.export(Module(call), (x,), strict=False)
    assert not any(asked)
    assert serves(**given) is not None


class Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *given: Tensor) -> Any:
        return self.call(*given)
