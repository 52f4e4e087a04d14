"""Tests of arguments of the wrong kind, for every argument of every public operator: the error names the argument."""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkern import ops
from python_tests.ops.every_operator import NO_OPERATORS

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")


def sparse(like: Tensor) -> Tensor:
    return like.to_sparse()


def nest(like: Tensor) -> Tensor:
    return torch.nested.nested_tensor([like, like] if like.dim() < 2 else list(like))


def make_jagged(like: Tensor) -> Tensor:
    rows = [torch.ones(2, dtype=like.dtype)] * 2 if like.dim() < 2 else list(like)
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


# By kind, what no argument of it may be, made from a right one. Kinds that also take None leave that out.
NO_TENSOR: dict[str, Callable[[Any], Any]] = {
    "text": lambda right: "a",
    "set": lambda right: {1.0},
    "number of numbers": lambda right: [1.0, 2.0],
    "sparse": sparse,
    "nested": nest,
    "jagged": make_jagged,
    "csr": lambda right: (right if right.dim() == 2 else torch.ones(2, 2, dtype=right.dtype)).to_sparse_csr(),
    "complex": lambda right: right.to(torch.complex64),
    "dtype": lambda right: right.to(torch.int32),
}
NO_NUMBER: dict[str, Callable[[Any], Any]] = {
    "text": lambda right: "0.5",
    "bytes": lambda right: b"1",
    "none": lambda right: None,
    "complex": lambda right: 0.5 + 0j,
    "complex of NumPy": lambda right: np.complex64(0.5),
    "complex tensor": lambda right: torch.tensor(0.5 + 0j),
    "too large": lambda right: 10**400,
    "beyond printing": lambda right: 10**5000,
    "not a number": lambda right: math.nan,
    "list": lambda right: [0.5],
    "set": lambda right: {0.5},
    "array": lambda right: np.array([0.5, 0.5]),
    "tensor of two": lambda right: torch.ones(2),
    "sparse": lambda right: torch.ones(2).to_sparse(),
    "nested": lambda right: nest(torch.ones(2)),
    "jagged": lambda right: make_jagged(torch.ones(2)),
}
NO_COUNT: dict[str, Callable[[Any], Any]] = {
    "text": lambda right: "1", "none": lambda right: None, "fraction": lambda right: 1.5, "bool": lambda right: True,
    "negative": lambda right: -1, "complex": lambda right: 1j, "list": lambda right: [1],
    "too large": lambda right: 10**5000,
}  # fmt: skip
NO_LIST_OF_TENSORS: dict[str, Callable[[Any], Any]] = {
    "text": lambda right: "ab",
    "none": lambda right: None,
    "set": lambda right: set(right),
    "generator": lambda right: (x for x in right),
    "dict": lambda right: dict(enumerate(right)),
    "number": lambda right: 3.0,
    "empty": lambda right: [],
    "numbers within": lambda right: [1.0, 2.0],
    "none within": lambda right: [right[0], None],
    "text within": lambda right: [right[0], "a"],
    "sparse within": lambda right: [right[0], sparse(right[1])],
    "nested within": lambda right: [right[0], nest(right[1])],
    "nested first": lambda right: [nest(right[0]), right[1]],
    "nested both": lambda right: [nest(right[0]), nest(right[1])],
    "jagged both": lambda right: [make_jagged(right[0]), make_jagged(right[1])],
    "nested stack": lambda right: nest(torch.stack(list(right))),
    "jagged stack": lambda right: make_jagged(torch.stack(list(right))),
    "sparse first": lambda right: [sparse(right[0]), right[1]],
    "complex within": lambda right: [right[0], right[1].to(torch.complex64)],
}
NO_WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "set": set,
    "frozenset": frozenset,
    "dict": lambda right: dict.fromkeys(right, 1.0),
    "keys": lambda right: dict.fromkeys(right, 1.0).keys(),
    "generator": lambda right: (x for x in right),
    "text": lambda right: "1" * len(right),
    "bytes": lambda right: bytes([1] * len(right)),
    "number": lambda right: 1.0,
    "array of no dimension": lambda right: np.array(1.0),
    "texts": lambda right: ["a"] * len(right),
    "numbers as text": lambda right: ["1.0"] * len(right),
    "nones": lambda right: [None] * len(right),
    "too large": lambda right: [10**400] * len(right),
    "beyond printing": lambda right: [10**5000] * len(right),
    "complex": lambda right: [1j] * len(right),
    "complex array": lambda right: np.ones(len(right), dtype=np.complex64),
    "lists": lambda right: [[1.0]] * len(right),
    "tensors of two": lambda right: [torch.ones(2)] * len(right),
    "not numbers": lambda right: [math.nan] * len(right),
    "negative": lambda right: [-1.0] * len(right),
    "too few": lambda right: right[:-1],
    "with a gradient": lambda right: [torch.tensor(x, requires_grad=True) for x in right],
    "sparse tensor": lambda right: torch.tensor(right).to_sparse(),
    "nested tensor": lambda right: nest(torch.tensor(right)),
    "jagged tensor": lambda right: make_jagged(torch.tensor(right)),
    "complex tensor": lambda right: torch.tensor(right).to(torch.complex64),
    "wrong tensor": lambda right: torch.ones(len(right) + 1),
}
NO_CHOICE: dict[str, Callable[[Any], Any]] = {
    "none": lambda right: None,
    "text": lambda right: "no such",
    "number": lambda right: 3,
    "list": lambda right: [right],
}
NO_BETAS: dict[str, Callable[[Any], Any]] = {
    "none": lambda right: None,
    "number": lambda right: 0.9,
    "text": lambda right: "ab",
    "set": set,
    "one": lambda right: right[:1],
    "text within": lambda right: (0.9, "a"),
    "none within": lambda right: (None, 0.9),
    "too large within": lambda right: (0.9, 10**400),
    "one within": lambda right: (0.9, 1.0),
    "negative within": lambda right: (-0.1, 0.9),
    "not a number within": lambda right: (0.9, math.nan),
}
NO_FILL = {
    **{name: make for name, make in NO_NUMBER.items() if name not in ("list", "not a number", "tensor of two")},
    "complex within": lambda right: [0.0, 1j],
    "text within": lambda right: [0.0, "a"],
    "too large within": lambda right: [0.0, 10**400],
    "none within": lambda right: [0.0, None],
}
KINDS = {
    "axis": {**{k: v for k, v in NO_COUNT.items() if k != "negative"}, "too far": lambda right: 2},
    "tensor": {**NO_TENSOR, "none": lambda right: None},
    "optional tensor": NO_TENSOR,
    # integers are index numbers, or weights
    "index": {**{k: v for k, v in NO_TENSOR.items() if k != "dtype"}, "fractions": lambda right: right.double()},
    "mask": {k: v for k, v in NO_TENSOR.items() if k != "csr"},
    "images": {k: v for k, v in {**NO_TENSOR, "none": lambda right: None}.items() if k != "dtype"},
    "boxes": {k: v for k, v in {**NO_TENSOR, "none": lambda right: None}.items() if k not in ("dtype", "csr")},
    "number": NO_NUMBER,
    "optional number": {k: v for k, v in NO_NUMBER.items() if k != "none"},
    "number or tensor": NO_NUMBER,
    "count": NO_COUNT,
    "tensors": NO_LIST_OF_TENSORS,
    "weights": {**NO_WEIGHTS, "none": lambda right: None},
    "optional weights": NO_WEIGHTS,
    "fill": NO_FILL,
    "choice": NO_CHOICE,
    "betas": NO_BETAS,
    "flag": {"text": lambda right: "yes", "number": lambda right: 1, "none": lambda right: None},
    "optional choice": {k: v for k, v in NO_CHOICE.items() if k != "none"},
}


class Public:
    """Public operator: right arguments, and the kind of each by its name."""

    def __init__(self, **given: tuple[Any, str]) -> None:
        self.arguments = {name: value for name, (value, _) in given.items()}
        self.kinds = {name: kind for name, (_, kind) in given.items()}


def logits(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape).clone()


_VECTORS = [torch.arange(6.0), torch.ones(6), torch.arange(6.0).flip(0), torch.zeros(6), torch.full((6,), 2.0)]
_WEIGHTS = [1.0, 2.0, 3.0, 4.0, 5.0]
_LISTED, _SHARES, _SUM = (_VECTORS, "tensors"), (_WEIGHTS, "optional weights"), ("sum", "choice")
_DIM = (-1, "axis")
_STACK = Public(
    logits=(logits(3, 4, 7), "tensor"), weights=(torch.ones(3), "optional tensor"), reduction=_SUM, dim=_DIM,
)  # fmt: skip
_BOXES = Public(
    images=(logits(2, 3, 5, 6), "images"), boxes=(torch.tensor([[[1.0, 1.0, 3.0, 3.0]]] * 2), "boxes"),
    fill=(0.5, "fill"),
)  # fmt: skip
_FUSE = Public(
    features=([logits(2, 3, 4), logits(2, 3, 4)], "tensors"), scale=(torch.ones(6), "optional tensor"),
    shift=(torch.ones(6), "optional tensor"), activation=("relu", "optional choice"),
)  # fmt: skip
# What both steps take, with its kind.
_STEP: dict[str, tuple[Any, str]] = {
    "weight_decay": (0.01, "number"),
    "anchor": (torch.zeros(6), "tensor"),
    "proximal": (0.3, "number"),
    "correction": (torch.full((6,), 0.5), "optional tensor"),
    "gradient_sum": (torch.zeros(6), "optional tensor"),
    "max_norm": (1.0, "optional number"),
    "zero": (True, "flag"),
}

PUBLIC = {
    "blend": Public(
        foreground=(logits(4, 3), "tensor"), background=(logits(4, 3), "tensor"), alpha=(0.5, "number or tensor"),
        index=(torch.tensor([1, 0, 3, 2]), "index"),
    ),
    "erase_boxes": _BOXES,
    "keep_boxes": _BOXES,
    "kl_div": Public(
        student=(logits(4, 7), "tensor"), teacher=(-logits(4, 7), "tensor"), temperature=(2.0, "number"),
        weight=(torch.ones(4), "optional tensor"), reduction=_SUM, dim=_DIM, rest=("renormalise", "choice"),
    ),
    "dual_kl": Public(
        a=(logits(4, 7), "tensor"), b=(logits(4, 7) * 2, "tensor"), teacher=(-logits(4, 7), "tensor"),
        temperature=(2.0, "number"), direction=("teacher", "choice"), weight=(torch.ones(4), "optional tensor"),
        reduction=_SUM, dim=_DIM,
    ),
    "ensemble_kl": Public(
        student=(logits(4, 7), "tensor"), teachers=(logits(3, 4, 7), "tensor"),
        weights=(torch.ones(3), "optional tensor"), temperature=(2.0, "number"), mix=("probs", "choice"),
        mode=("kl_of_mean", "choice"), class_mask=(torch.ones(3, 7, dtype=torch.bool), "mask"), reduction=_SUM,
        dim=_DIM,
    ),
    "js_div": _STACK,
    "consensus": _STACK,
    "entropy": Public(logits=(logits(4, 7), "tensor"), reduction=_SUM, dim=_DIM),
    "contrastive": Public(
        x=(logits(4, 7), "tensor"), y=(-logits(4, 7), "tensor"), temperature=(0.5, "number or tensor"),
    ),
    "weighted_mean": Public(vectors=_LISTED, weights=(_WEIGHTS, "weights"), out=(None, "optional tensor")),
    "trimmed_mean": Public(vectors=_LISTED, trim=(1, "count"), weights=_SHARES),
    "median": Public(vectors=_LISTED, weights=_SHARES),
    "geometric_median": Public(
        vectors=_LISTED, weights=_SHARES, iterations=(3, "count"), tolerance=(1e-6, "number"),
        smoothing=(1e-6, "number"),
    ),
    "krum": Public(vectors=_LISTED, byzantine=(1, "count"), keep=(2, "count")),
    "pairwise_distances": Public(vectors=_LISTED),
    "clip_by_norm": Public(vectors=_LISTED, max_norm=(1.0, "number")),
    "clip_and_noise": Public(
        vectors=_LISTED, max_norm=(1.0, "number"), noise=(0.5, "number"), seed=(3, "count"), offset=(4, "count"),
    ),
    "server_step": Public(
        global_=(torch.ones(6), "tensor"), vectors=_LISTED, weights=(_WEIGHTS, "weights"), rule=("adam", "choice"),
        first=(torch.zeros(6), "tensor"), second=(torch.zeros(6), "tensor"), learning_rate=(0.1, "optional number"),
        beta1=(0.9, "optional number"), beta2=(0.99, "optional number"), tau=(1e-3, "optional number"),
        out=(None, "optional tensor"), similarities=(True, "flag"),
    ),
    "sgd_step": Public(
        parameters=(torch.ones(6), "tensor"), gradients=(torch.ones(6), "tensor"), velocity=(torch.zeros(6), "tensor"),
        lr=(0.1, "number"), momentum=(0.9, "number"), **_STEP,
    ),
    "adamw_step": Public(
        parameters=(torch.ones(6), "tensor"), gradients=(torch.ones(6), "tensor"), first=(torch.zeros(6), "tensor"),
        second=(torch.zeros(6), "tensor"), step=(2, "count"), lr=(0.1, "number"), betas=((0.9, 0.99), "betas"),
        eps=(1e-6, "number"), **_STEP,
    ),
    "fuse_concat": _FUSE,
    "fuse_mean": _FUSE,
    "conv_norm": Public(
        x=(logits(2, 3, 4, 5), "tensor"), weight=(logits(8, 3, 3, 3), "tensor"), scale=(torch.ones(8), "tensor"),
        shift=(torch.zeros(8), "tensor"), mean=(torch.zeros(8), "optional tensor"),
        variance=(torch.ones(8), "optional tensor"), momentum=(0.2, "number"), eps=(1e-3, "number"),
        stride=(1, "count"), relu=(True, "flag"), pool=(1, "count"), residual=(logits(2, 8, 4, 5), "optional tensor"),
        update=(False, "flag"), training=(True, "flag"), groups=(0, "count"), bias=(None, "optional tensor"),
    ),
    "conv_pool": Public(
        x=(logits(2, 3, 6, 5), "tensor"), weight=(logits(8, 3, 3, 3), "tensor"),
        bias=(torch.ones(8), "optional tensor"), padding=(1, "count"), relu=(False, "flag"),
    ),
}  # fmt: skip

# 10**400 iterations are more than any, and stop as others do.
ALLOWED = {("geometric_median", "iterations", "too large")}
# Any truth value will do.
FLAGS = {"log_probs"}


def test_every_argument_of_every_operator_is_covered() -> None:
    assert set(PUBLIC) == set(ops.__all__) - NO_OPERATORS
    for name, public in PUBLIC.items():
        assert set(public.kinds) == set(inspect.signature(getattr(ops, name)).parameters) - FLAGS, name


def every_argument() -> Iterator[Any]:
    for name, public in PUBLIC.items():
        for argument in public.kinds:
            yield pytest.param(name, argument, id=f"{name}-{argument}")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_right_arguments_are_right(name: str) -> None:
    getattr(ops, name)(**PUBLIC[name].arguments)


@pytest.mark.parametrize(("name", "argument"), every_argument())
@pytest.mark.filterwarnings("ignore:.*Sparse CSR.*")
def test_wrong_kinds(name: str, argument: str) -> None:
    for kind in KINDS[PUBLIC[name].kinds[argument]]:
        if (name, argument, kind) not in ALLOWED:
            check_refused(name, argument, kind)


# Types of NumPy's numbers that hold these values exactly, by the kind of argument.
NUMBERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("number", "optional number", "number or tensor", "fill", "betas"), (np.float32, np.float16)),
    **dict.fromkeys(("weights", "optional weights"), (np.float32, np.int64)),
    "count": (np.int64, np.uint8),
    "axis": (np.int64,),
}


def results(name: str, **changed: Any) -> list[Tensor]:
    """Return the tensors that an operator gives for its right arguments, and those that it writes to."""
    right = {**PUBLIC[name].arguments, **changed}
    arguments = {key: value.clone() if isinstance(value, Tensor) else value for key, value in right.items()}
    found = getattr(ops, name)(**arguments)
    parts = [*found] if isinstance(found, (tuple, list)) else [found]
    return [x for x in (*parts, *arguments.values()) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if {*public.kinds.values()} & {*NUMBERS}])
def test_numbers_of_numpy_are_numbers(name: str) -> None:
    for argument, kind in PUBLIC[name].kinds.items():
        right = PUBLIC[name].arguments[argument]
        for number in NUMBERS.get(kind, ()):
            several = isinstance(right, (list, tuple))
            given: Any = type(right)(map(number, right)) if several else number(right)
            plain = type(right)(number.item() for number in given) if several else given.item()
            for got, wanted in zip(results(name, **{argument: given}), results(name, **{argument: plain}), strict=True):
                assert torch.equal(got, wanted), (argument, number)
        if kind in ("number", "optional number", "number or tensor", "count"):
            with pytest.raises(TypeError, match=f"{argument} must be a (whole )?number, not bool"):
                results(name, **{argument: np.True_})


def check_refused(name: str, argument: str, kind: str) -> None:
    public = PUBLIC[name]
    arguments = {key: value.clone() if isinstance(value, Tensor) else value for key, value in public.arguments.items()}
    right = arguments[argument]
    if right is None:
        right = torch.zeros(6)  # out; what memory happened to hold could be NaN, which equals nothing
    arguments[argument] = KINDS[public.kinds[argument]][kind](right)
    states = {key: (x, x.clone()) for key, x in arguments.items() if isinstance(x, Tensor) and key in public.arguments}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=np.exceptions.ComplexWarning)
        try:
            getattr(ops, name)(**arguments)
        except (TypeError, ValueError) as error:
            told = str(error)
        else:
            pytest.fail(f"{name}({argument}=...) takes what is {kind}")
    says_so(told, argument)
    for key, (x, before) in states.items():
        if x.layout is torch.strided and not x.is_nested:
            assert torch.equal(x, before), key


def says_so(sentence: str, argument: str) -> None:
    assert re.match(rf"{argument}\b", sentence), sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


def test_dual_kl_takes_two_students() -> None:
    with pytest.raises(TypeError, match="b must be a tensor of logits, but got NoneType"):
        ops.dual_kl(logits(4, 7), None, -logits(4, 7))  # type: ignore[arg-type]


ACCUMULATOR = [
    *[("size", kind, make) for kind, make in NO_COUNT.items() if kind != "bool"],
    *[("weight", kind, make) for kind, make in {**NO_NUMBER, "negative": lambda right: -1.0}.items()],
    *[("vector", kind, make) for kind, make in KINDS["tensor"].items()],
    *[("out", kind, make) for kind, make in NO_TENSOR.items()],
    *[("dtype", kind, make) for kind, make in NO_CHOICE.items() if kind != "none"],
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("argument", "kind", "make"), ACCUMULATOR, ids=[f"{a}-{w}" for a, w, _ in ACCUMULATOR])
def test_wrong_arguments_of_the_accumulator(argument: str, kind: str, make: Callable[[Any], Any], exact: bool) -> None:
    accumulator = ops.Accumulator(6, exact)
    accumulator.add(torch.ones(6), 2.0)
    calls: dict[str, Callable[[], Any]] = {
        "size": lambda: ops.Accumulator(make(6), exact),
        "weight": lambda: accumulator.add(torch.ones(6), make(1.0)),
        "vector": lambda: accumulator.add(make(torch.ones(6))),
        "out": lambda: accumulator.mean(out=make(torch.ones(6))),
        "dtype": lambda: accumulator.mean(dtype=make("float32")),
    }
    with pytest.raises((TypeError, ValueError)) as told:
        calls[argument]()
    says_so(str(told.value), argument)
    assert (accumulator.count, accumulator.weight) == (1, 2.0)
    assert torch.equal(accumulator.mean(), torch.ones(6))


@pytest.mark.parametrize("device", ["nope", 3.5, "cuda:99", torch.ones(2)])
def test_wrong_devices_of_the_accumulator(device: Any) -> None:
    with pytest.raises(ValueError, match="device must be one that torch can use here") as told:
        ops.Accumulator(6, device=device)
    says_so(str(told.value), "device")


NO_VECTOR = {
    **KINDS["tensor"],
    "array": lambda right: np.ones(6),
    "mkldnn": lambda right: right.to_mkldnn(),
    "quantised": lambda right: torch.quantize_per_tensor(right.float(), 1.0, 0, torch.qint8),
    "shape": lambda right: torch.ones(right.numel() + 1, dtype=right.dtype),
}
NO_INTEGERS = {
    **{key: make for key, make in NO_VECTOR.items() if key not in ("dtype", "mkldnn", "quantised")},
    "fractions": lambda right: right.double(),
}


def in_vectors(name, part):
    """Return wrong vectors of a part of a module's vector, in the mapping that load_vectors takes."""
    return {kind: lambda right, make=make: {name: make(right[part])} for kind, make in NO_VECTOR.items()}


FLAT: list[Any] = [
    pytest.param(method, argument, make, id=f"{method}-{argument}-{kind}".replace(" ", "-"))
    for method, argument, kinds in (
        ("load", "vector", {**NO_VECTOR, "meta": lambda right: right.to("meta")}),
        ("load_vectors", "parameters", in_vectors("parameters", slice(10))),
        ("load_vectors", "buffers", in_vectors("buffers", slice(10, None))),
        ("load_integers", "integers", {**NO_INTEGERS, "meta": lambda right: right.to("meta")}),
        ("load_vectors", "vectors", {"tensor": lambda right: right, "none": lambda right: None}),
        ("views", "vector", {key: make for key, make in NO_VECTOR.items() if key != "complex"}),
        ("copy_", "other", {**NO_VECTOR, "module": lambda right: nn.Linear(2, 2)}),
        ("gradients", "dtype", {**NO_CHOICE, "tensor": lambda right: right}),
    )
    for kind, make in kinds.items()
    if (method, kind) != ("gradients", "none")
]


@pytest.mark.parametrize(("method", "argument", "make"), FLAT)
@pytest.mark.filterwarnings("ignore:.*Sparse CSR.*", "ignore:.*quantiz.*")
def test_wrong_arguments_of_flat_parameters(method: str, argument: str, make: Callable[[Any], Any]) -> None:
    flat = ops.FlatParameters(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    right = {"load_integers": flat.integers}
    before, integers = flat.vector.clone(), flat.integers
    with pytest.raises((TypeError, ValueError)) as told:
        getattr(flat, method)(make(right.get(method, flat.vector).detach().clone()))
    says_so(str(told.value), argument)
    assert torch.equal(flat.vector, before)
    assert torch.equal(flat.integers, integers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_may_lie_over_the_weights(dtype: torch.dtype) -> None:
    """The weights are read before anything is written."""
    vectors = torch.arange(25.0, dtype=dtype).view(5, 5).cos()
    for given in (vectors, list(vectors)):
        for backend in (None, "reference"):
            memory = torch.arange(1.0, 11.0, dtype=dtype)
            out, weights = memory[2:7], memory[:5]
            expected = ops.weighted_mean(given, weights.clone())
            with nullcontext() if backend is None else ops.use_backend(backend):
                ops.weighted_mean(given, weights, out=out)
            assert torch.equal(out, expected)
            step = torch.arange(1.0, 11.0, dtype=dtype)
            with nullcontext() if backend is None else ops.use_backend(backend):
                expected = ops.server_step(torch.ones(5, dtype=dtype), given, step[:5].clone())
                got = ops.server_step(torch.ones(5, dtype=dtype), given, step[:5], out=step[2:7])
            assert torch.equal(got.model, expected.model)


@pytest.mark.parametrize("blocks", [None, nn.Conv2d(2, 3, 3), {nn.Conv2d(2, 3, 3)}, "ab", 3])
def test_fused_blocks_take_modules_in_order(blocks: Any) -> None:
    with pytest.raises(TypeError, match=f"blocks must be a list of modules, not {type(blocks).__name__}"):
        ops.FusedBlocks(blocks)


def test_switches_take_names() -> None:
    with pytest.raises(TypeError, match="name must be one of portable, avx2, avx512, not int"), ops.use_isa(3):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="unknown backend 3; it is one of reference"), ops.use_backend(3):  # type: ignore[arg-type]
        pass


def test_fused_blocks_take_no_sparse_maps() -> None:
    blocks = ops.FusedBlocks([nn.Conv2d(2, 3, 3)])
    with pytest.raises(TypeError, match="x must be a dense tensor, not a sparse_coo one"):
        blocks(torch.ones(1, 2, 5, 5).to_sparse())
    for make in (nest, make_jagged):
        with pytest.raises(TypeError, match="x must be a dense tensor, not a nested one"):
            blocks(make(torch.ones(1, 2, 5, 5)))


@pytest.mark.parametrize(
    "weights",
    [(1, 2, 3, 4, 5), range(1, 6), np.arange(1, 6), np.arange(1.0, 6.0, dtype=np.float32), torch.arange(1, 6),
     [np.float32(1), 2, 3.0, torch.tensor(4.0), torch.tensor([5])], torch.arange(1.0, 6.0).bfloat16(),
     (True, np.float64(2), np.int64(3), 4, 5), [n << 64 for n in range(1, 6)]],
    ids=["tuple", "range", "integer array", "array", "integer tensor", "mixed", "bfloat16", "NumPy's", "large"],
)  # fmt: skip
def test_weights_in_other_forms(weights: Any) -> None:
    expected = ops.weighted_mean(_VECTORS, _WEIGHTS)
    assert torch.equal(ops.weighted_mean(_VECTORS, weights), expected)
    assert torch.equal(ops.weighted_mean(torch.stack(_VECTORS), weights), expected)
    assert torch.equal(ops.median(_VECTORS, weights), ops.median(_VECTORS, _WEIGHTS))
