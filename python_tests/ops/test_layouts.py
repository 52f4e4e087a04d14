"""Tests of every operator on maps of any order, tensors without elements, and ``out=``."""

import contextlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops import empty_cases
from python_tests.ops._aggregate.aggregate_cases import accumulate
from python_tests.ops.emulated_core import emulate
from python_tests.ops.operator_cases import BACKENDS, DTYPES, KERNELS, assert_close, using
from python_tests.ops.operator_runs import Calls, Named

MAP, STACK = (2, 4, 3, 5), (3, 2, 4, 3, 5)


def _apart(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    wide = x.new_full((*x.shape[:-2], 2 * height + 1, width + 3), 7.0)
    return wide[..., 1::2, 1 : 1 + width].copy_(x)


# Of maps [..., channels, height, width].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels_between": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "channels_last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed": lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
    "sliced": _apart,
    "sliced_transposed": lambda x: _apart(x.mT).mT,
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
    "per_channel": lambda x: x[..., :1, :1].expand(x.shape),
}

BOXES = torch.tensor([[[1.0, 0.0, 3.0, 2.0]], [[0.0, 1.0, 2.0, 3.0]]])

OPERATORS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[tuple[int, ...], ...]]] = {
    "kl_div": (lambda s, t: ops.kl_div(s, t, 2.0), (MAP, MAP)),
    "kl_div limit": (lambda s, t: ops.kl_div(s, t, float("inf"), reduction="none"), (MAP, MAP)),
    "kl_div weight": (lambda s, t, w: ops.kl_div(s, t, weight=w.abs(), reduction="none"), (MAP, MAP, (2, 3, 5))),
    "dual_kl": (lambda a, b, t: ops.dual_kl(a, b, t), (MAP, MAP, MAP)),
    "dual_kl student": (lambda a, b, t: ops.dual_kl(a, b, t, direction="student", reduction="sum"), (MAP, MAP, MAP)),
    "entropy": (lambda x: ops.entropy(x, reduction="none"), (MAP,)),
    "ensemble_kl": (lambda s, t, w: ops.ensemble_kl(s, t, w.abs()), (MAP, STACK, STACK)),
    "ensemble_kl logits": (lambda s, t: ops.ensemble_kl(s, t, mix="logits", reduction="none"), (MAP, STACK)),
    "ensemble_kl mean_of_kl": (lambda s, t: ops.ensemble_kl(s, t, mode="mean_of_kl"), (MAP, STACK)),
    "js_div": (lambda t, w: ops.js_div(t, w.abs(), reduction="none"), (STACK, (3, 2, 3, 5))),
    "consensus": (lambda t, w: ops.consensus(t, w.abs()), (STACK, (3, 2, 3, 5))),
    "blend": (lambda x, y: ops.blend(x, y, 0.3, index=torch.tensor([1, 1])), (MAP, MAP)),
    "erase_boxes": (lambda x: ops.erase_boxes(x, BOXES.to(x.dtype), 0.5), (MAP,)),
    "keep_boxes": (lambda x: ops.keep_boxes(x, BOXES.to(x.dtype), 0.5), (MAP,)),
    "fuse_concat": (lambda x, y, a, b: ops.fuse_concat([x, y], a, b, "relu"), (MAP, MAP, (8,), (8,))),
    "fuse_mean": (lambda x, y, a, b: ops.fuse_mean([x, y], a, b, "relu"), (MAP, MAP, (8,), (8,))),
}


def _differentiate(operator: str, tensors: list[Tensor]) -> list[Tensor]:
    """Return results and gradients of a loss that weighs every element differently."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    given = OPERATORS[operator][0](*leaves)
    results = given if isinstance(given, tuple) else (given,)
    steps = [torch.empty_like(x).copy_((torch.arange(x.numel()) % 7 + 1).view_as(x)) for x in results]
    loss = torch.stack([(x * step).sum() for x, step in zip(results, steps, strict=True)]).sum()
    return [*results, *torch.autograd.grad(loss, leaves)]


def test_maps_of_any_strides(backend: str) -> None:
    """The test loops over its cases, because Triton's interpreter would take only a few parametrised ones."""
    draw = torch.Generator().manual_seed(0)
    for operator, (_, shapes) in OPERATORS.items():
        for number, (name, lay_out) in enumerate(LAYOUTS.items()):
            tensors = [torch.randn(shape, generator=draw) for shape in shapes]
            maps = [i for i, x in enumerate(tensors) if x.dim() > 1]
            # All of them or, in turn, one beside others that are contiguous.
            chosen = maps if number % 2 == 0 else maps[number // 2 % len(maps) :][:1]
            laid = [lay_out(x) if i in chosen else x for i, x in enumerate(tensors)]
            with using("reference"):
                expected = _differentiate(operator, [x.double() for x in laid])
            with using(backend):
                got = _differentiate(operator, laid)
            if name == "channels_last" and backend != "reference":  # whose torch.cat hands slices back
                of_maps = [x for x in got if x.dim() == 4 and len(x) == MAP[0]]
                assert all(x.is_contiguous(memory_format=torch.channels_last) for x in of_maps), operator
            for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
                assert_close(f"{operator} {name} {place}", ours, theirs, absolute=2e-5)


# -- out ---------------------------------------------------------------------------------------------------------------


SIZE = 37
WEIGHTS = [1.0, 2.0, 0.5]


def write_total(vectors: Tensor, out: Tensor, exact: bool) -> Tensor:
    return accumulate(vectors, WEIGHTS, exact).mean(out=out)


def write_step(vectors: Tensor, out: Tensor) -> Tensor:
    states = {name: torch.full((SIZE,), 0.25, dtype=torch.float64) for name in ("first", "second")}
    return ops.server_step(vectors[0], vectors, WEIGHTS, "adam", out=out, **states).model


WRITERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted_mean": lambda vectors, out: ops.weighted_mean(vectors, WEIGHTS, out=out),
    "weighted_mean list": lambda vectors, out: ops.weighted_mean(list(vectors), WEIGHTS, out),
    "weighted_mean tensor": lambda vectors, out: ops.weighted_mean(vectors, torch.tensor(WEIGHTS), out=out),
    "server_step": lambda vectors, out: ops.server_step(vectors[0], vectors, WEIGHTS, out=out).model,
    "server_step adam": write_step,
    "Accumulator.mean": lambda vectors, out: write_total(vectors, out, False),
    "Accumulator.mean exact": lambda vectors, out: write_total(vectors, out, True),
}

OUT_LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "offset": lambda dtype: torch.empty(SIZE + 3, dtype=dtype)[3:],
    "strided": lambda dtype: torch.empty(2 * SIZE, dtype=dtype)[::2],
    "column": lambda dtype: torch.empty(SIZE, 3, dtype=dtype)[:, 1],
    "negated": lambda dtype: torch._neg_view(torch.empty(SIZE, dtype=dtype)),
}


def test_every_operator_that_takes_out_is_covered() -> None:
    public = {name: getattr(ops, name) for name in ops.__all__}
    public |= {f"Accumulator.{name}": value for name, value in vars(ops.Accumulator).items() if callable(value)}
    taking = {name for name, value in public.items() if "out" in inspect.signature(value).parameters}
    assert taking == {name.split()[0] for name in WRITERS}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("writer", WRITERS)
def test_strides_of_out_do_not_matter(name: str, writer: str) -> None:
    write = WRITERS[writer]
    with emulate() if name == "cuda" else using(name):
        for dtype in DTYPES:
            vectors = torch.randn(3, SIZE, dtype=torch.float64).to(dtype)
            for wanted in DTYPES:
                expected = write(vectors, torch.empty(SIZE, dtype=wanted))
                if wanted is torch.float64 and dtype is not wanted:
                    assert not torch.equal(expected, expected.to(dtype).double())
                for layout, make in OUT_LAYOUTS.items():
                    out = make(wanted)
                    assert write(vectors, out) is out
                    assert torch.equal(out, expected), (dtype, wanted, layout)


@pytest.mark.parametrize("writer", WRITERS)
def test_out_within_the_vectors_memory(writer: str) -> None:
    """The result overwrites a vector while others read it."""
    draw = torch.randn(3, SIZE + 1)
    for start in (0, 1):
        memory = draw.clone()
        vectors, out = memory[:, :SIZE], memory[1, start : start + SIZE]
        expected = WRITERS[writer](vectors.clone(), torch.empty(SIZE))
        assert torch.equal(WRITERS[writer](vectors, out), expected)


def compile_writer(write: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(write, backend="aot_eager")


def as_subclasses(write: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda vectors, out: write(vectors.as_subclass(Named), out).as_subclass(Tensor)


OBSERVERS = {"compile": compile_writer, "mode": lambda write: write, "subclass": as_subclasses}


@pytest.mark.exhaustive
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("writer", [name for name in WRITERS if not name.startswith("Accumulator")])
def test_out_is_rounded_once_where_somebody_looks_on(writer: str, observer: str) -> None:
    vectors = torch.randn(3, SIZE)
    for wanted in DTYPES:
        expected = WRITERS[writer](vectors, torch.empty(SIZE, dtype=wanted))
        for out in (torch.empty(SIZE, dtype=wanted), OUT_LAYOUTS["strided"](wanted)):
            with Calls() if observer == "mode" else contextlib.nullcontext():
                OBSERVERS[observer](WRITERS[writer])(vectors, out)
            assert torch.equal(out, expected), wanted


# -- empty -------------------------------------------------------------------------------------------------------------


# Every so many cases, and blend's in full; all of them where slow tests run.
SOME, FEW = 3, 20


def child(*arguments: str) -> None:
    """Run Python in a process of its own, which a failure of these tests would end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = found.stdout.rstrip().rpartition("\n")[2]
    assert found.returncode == 0, f"exit {found.returncode} in {last}\n{found.stderr[-4000:]}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*BACKENDS, "emulated"])
def test_inputs_without_elements(name: str) -> None:
    child("-m", empty_cases.__name__, name, str(FEW if name in ("triton", "emulated") else SOME))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BACKENDS, "emulated"])
def test_all_inputs_without_elements(name: str) -> None:
    child("-m", empty_cases.__name__, name, "1")


BLEND = """
import torch
from fedkern import ops
i = torch.zeros(0, dtype=torch.int64)
f = torch.ones(0, 2, 4, 4)
for rows in (1, 3):
    b = torch.ones(rows, 2, 4, 4, requires_grad=True)
    for alpha in (0.3, torch.rand(0), torch.tensor(0.3)):
        def loss(b):
            return ops.blend(f, b, alpha, index=i).sum()
        second = torch.func.hessian(loss)(b).sum((4, 5, 6, 7))
        got = [torch.autograd.grad(loss(b), b)[0], torch.func.grad(loss)(b), second]
        assert all(torch.equal(g, torch.zeros_like(b)) for g in got), got
compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
assert torch.equal(torch.autograd.grad(compiled(b), b)[0], torch.zeros_like(b))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_blend_of_no_rows_with_an_index_under_transforms() -> None:
    child("-c", BLEND)


def test_boxes_of_no_images_of_any_stride(backend: str) -> None:
    """The result of contiguous() of a tensor without elements is the tensor itself, whatever its strides."""
    images = torch.zeros(2, 3, 8, 8)[:0, :, ::2, ::2].requires_grad_()
    for call in (ops.erase_boxes, ops.keep_boxes):
        result = call(images, [])
        assert result.shape == images.shape
        result.sum().backward()


FREED = """
import torch
from fedkern import ops
for lost in ("index", "alpha"):
    for transposed in (False, True):
        f, b = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        given = {"alpha": torch.rand(3, requires_grad=True), "index": torch.tensor([4, 2, 0])}
        result = ops.blend(f, b, **given)
        given[lost].untyped_storage().resize_(0)
        grad = torch.randn(4, 3).t() if transposed else torch.randn(3, 4)
        try:
            result.backward(grad)
        except RuntimeError as error:
            assert lost in str(error) and "no memory" in str(error), error
        else:
            raise AssertionError(f"{lost} was read where it no longer is")
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_a_saved_index_without_memory_is_an_error() -> None:
    child("-c", FREED)
