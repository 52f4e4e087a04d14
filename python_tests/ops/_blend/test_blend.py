"""blend: every available backend and ISA level against the float64 reference."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkern.ops import blend, use_backend
from fedkern.ops._blend.blend import blend_reference
from fedkern.ops._core import backend
from python_tests.ops.operator_cases import BACKENDS, DTYPES, KERNELS, pairwise, using

pytestmark = pytest.mark.usefixtures("one_thread")


SIZES = [1, 2, 3, 7, 8, 10, 100, 101, 127, 128, 129, 200, 1000, 1271, 3200]
BATCHES = [0, 1, 2, 3, 31, 32, 33, 199, 401]
INDICES = ["identity", "permutation", "repeated", "one", "many"]  # how samples pick their background
ALPHAS = ["number", "zero", "one", "tensor", "scalar", "double"]


needs_core = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")


def make_index(kind: str, rows: int, generator: torch.Generator) -> tuple[Tensor | None, int]:
    if kind == "identity" or not rows:
        return None, rows
    if kind == "permutation":
        return torch.randperm(rows, generator=generator), rows
    if kind == "repeated":
        return torch.randint(0, rows, (rows,), generator=generator), rows
    if kind == "one":
        return torch.zeros(rows, dtype=torch.int64), 1
    return torch.randint(0, 2 * rows + 3, (rows,), generator=generator), 2 * rows + 3


def make_alpha(kind: str, rows: int, dtype: torch.dtype, generator: torch.Generator) -> float | Tensor:
    if kind in ("number", "zero", "one"):
        return {"number": 0.3, "zero": 0.0, "one": 1.0}[kind]
    if kind == "scalar":
        return torch.rand((), generator=generator).to(dtype)
    return torch.rand(rows, generator=generator).to(torch.float64 if kind == "double" else dtype)


def close(given: Tensor, exact: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """The project's tolerances: fp32 1e-5 relative + 1e-6 absolute; 16 bits: the rounded result plus one ulp."""
    assert given.shape == exact.shape
    exact = exact.detach().double()
    error = (given.detach().double() - exact).abs()
    if dtype in (torch.float32, torch.float64):
        small = 1e-5 if dtype == torch.float32 else 1e-12
        bound = slack * (small * exact.abs() + small / 10)
    else:
        info = torch.finfo(dtype)
        ulp = 2.0 ** exact.abs().clamp_min(info.tiny).log2().floor() * info.eps
        bound = slack * (1.5 * ulp + 1e-6)  # where terms cancel, fp32 arithmetic cannot resolve an ulp
    assert bool((error <= bound).all()), f"error {error.max():.3g} over bound by {(error - bound).max():.3g}"


def check(
    served_by: str, shape: tuple[int, ...], dtype: torch.dtype, index_kind: str, alpha_kind: str, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = shape[0]
    index, background_rows = make_index(index_kind, rows, generator)
    foreground = torch.randn(shape, generator=generator).to(dtype)
    background = torch.randn((background_rows, *shape[1:]), generator=generator).to(dtype)
    alpha = make_alpha(alpha_kind, rows, dtype, generator)
    grad = torch.randn(shape, generator=generator).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (foreground, background)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    if isinstance(alpha, Tensor):
        leaves.append(alpha.clone().requires_grad_())
        exact.append(leaves[-1].detach().double().requires_grad_())
    with using(served_by):
        out = blend(*leaves[:2], leaves[2] if len(leaves) > 2 else alpha, index=index)
        out.backward(grad * 2)  # not 1, so that a dropped grad_output shows
    wanted = blend_reference(*exact[:2], exact[2] if len(exact) > 2 else alpha, index)
    wanted.backward(grad.double() * 2)
    # Eager sums thousands of terms in the dtype itself; the compiled backends may not.
    slack = 1.0
    if served_by == "reference":
        slack = 1e5 if dtype in (torch.bfloat16, torch.float16) else 1000.0
    assert out.dtype == dtype
    close(out, wanted, dtype, slack)
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        scale = 1.0
        if leaf.dim() < 2 and leaf.dtype == torch.float32:  # a sum of many products: relative to their size
            scale = 1 + grad.abs().double().sum().item() / 10
        precision = leaf.dtype if served_by != "reference" else dtype  # eager computes in the maps' dtype
        close(leaf.grad, other.grad, precision, slack * scale)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(name: str, size: int) -> None:
    check(name, (5, size), torch.float32, "repeated", "tensor")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", BATCHES)
def test_batches(name: str, rows: int) -> None:
    check(name, (rows, 7), torch.float32, "repeated", "tensor")


@pytest.mark.sampled
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_kind", INDICES)
@pytest.mark.parametrize("alpha_kind", ALPHAS)
def test_kinds(name: str, dtype: torch.dtype, index_kind: str, alpha_kind: str) -> None:
    check(name, (9, 3, 5, 7), dtype, index_kind, alpha_kind)


@pytest.mark.parametrize("name", BACKENDS)
def test_pairs(name: str) -> None:
    axes = {"rows": BATCHES, "size": SIZES, "dtype": DTYPES, "index_kind": INDICES, "alpha_kind": ALPHAS}
    for seed, case in enumerate(pairwise(axes, seed=7)):
        shape = (case.pop("rows"), case.pop("size"))
        check(name, shape, **case, seed=seed)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "other_order": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).transpose(2, 3),
    "batch_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_second": lambda t: torch.stack([t, t], 1)[:, 0],
    "cut_out": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 0))[..., 3:, 1:-2],
    "negated": lambda t: torch._neg_view(-t),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("one", "two"), list(itertools.product(LAYOUTS, repeat=2)))
def test_layouts(name: str, dtype: torch.dtype, one: str, two: str) -> None:
    if name != "reference" and "negated" in (one, two):
        name = "reference"  # what an unforced call does: no kernel takes a negated view
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        context = using(name)
    foreground = torch.randn(4, 3, 5, 6).to(dtype)
    background = torch.randn(6, 3, 5, 5).to(dtype) if "other" in two else torch.randn(6, 3, 5, 6).to(dtype)
    if "other" in one or "other" in two:
        foreground, background = foreground[..., :5], background[..., :5]
    x, y = LAYOUTS[one](foreground).detach(), LAYOUTS[two](background).detach()
    index = torch.tensor([5, 0, 0, 2])
    with context:
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = blend(x, y, 0.25, index=index)
        blend(a, b, 0.25, index=index).backward(torch.ones_like(out))
    exact = 0.25 * x.double() + 0.75 * y.double()[index]
    if name == "reference" and dtype == torch.bfloat16:
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)  # eager rounds each product
    else:
        close(out, exact, dtype)
    close(a.grad, torch.full_like(exact, 0.25), dtype)
    if one == two == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert a.grad.is_contiguous(memory_format=torch.channels_last)
        assert b.grad.is_contiguous(memory_format=torch.channels_last)


ONE_SAMPLE = {
    "contiguous": lambda: torch.randn(1, 3, 4, 5),
    "sliced": lambda: torch.randn(1, 3, 4, 9)[..., 2:7],
    "sliced_rows": lambda: torch.randn(1, 70)[:, 5:65].view(1, 3, 4, 5),
    "batch_last": lambda: torch.randn(3, 4, 5, 1).permute(3, 0, 1, 2),
    "channels_last": lambda: torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ONE_SAMPLE)
@pytest.mark.parametrize("sums", [True, False], ids=["of a sum", "of maps"])
def test_one_sample_against_many_backgrounds(name: str, layout: str, sums: bool) -> None:
    """The batch axis of a single sample has any stride: its result's, by which the background's gradient was made."""
    foreground, background = ONE_SAMPLE[layout](), torch.randn(6, 3, 4, 5, requires_grad=True)
    grad = torch.ones(()).expand(1, 3, 4, 5) if sums else torch.randn(1, 3, 4, 5)
    with using(name):
        out = blend(foreground.requires_grad_(), background, 0.25, index=torch.tensor([4]))
        by_foreground, by_background = torch.autograd.grad(out, (foreground, background), grad)
    expected = torch.zeros(6, 3, 4, 5)
    expected[4] = 0.75 * grad[0]
    torch.testing.assert_close(by_background, expected)
    torch.testing.assert_close(by_foreground, 0.25 * grad)
    assert by_background.untyped_storage().nbytes() >= expected.numel() * 4


@needs_core
@pytest.mark.parametrize("isa", [name for name in KERNELS if name.startswith("cpu")])
@pytest.mark.parametrize(("dtype", "index_kind"), [(torch.float32, "repeated"), (torch.bfloat16, "many")])
def test_results_past_the_cache(
    isa: str, dtype: torch.dtype, index_kind: str, cache_bytes: Callable[[int], None]
) -> None:
    cache_bytes(-1)
    for size in (12_001, 4_096, 37):
        check(isa, (5, size), dtype, index_kind, "number")


def test_channels_last_is_not_copied() -> None:
    x, y = (torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    grad, index = torch.randn_like(x), torch.tensor([1, 0, 3, 3])
    with torch.profiler.profile() as seen:
        torch.autograd.grad(blend(x, y, 0.5, index=index), (x, y), grad)
    names = {event.name for event in seen.events()}
    assert names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


@needs_core
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_offset_over_sentinels(isa: str, dtype: torch.dtype) -> None:
    core = backend.cpu_core()
    rows, size = 3, 129
    count = rows * size
    index = torch.tensor([2, 0, 2])
    x, y, g = (torch.randn(count + 41).to(dtype) for _ in range(3))
    with using(isa):
        for i in range(41):
            out, own, other = (torch.full((count + 82,), 777.0, dtype=dtype) for _ in range(3))
            a, b, c = (t[i : i + count].view(rows, size) for t in (x, y, g))
            to, to_own, to_other = (t[41 - i :][:count].view(rows, size) for t in (out, own, other))
            assert core.blend_forward(a, b, index, None, 0.3, to, 1)
            assert core.blend_backward(c, None, None, index, None, 0.3, rows, to_own, to_other, None, None, None, 1)
            exact = 0.3 * a.double() + 0.7 * b.double()[index]
            wide = c.double()
            scattered = torch.zeros(rows, size, dtype=torch.float64).index_add(0, index, 0.7 * wide)
            for buffer, wanted in ((out, exact), (own, 0.3 * wide), (other, scattered)):
                close(buffer[41 - i :][:count].view(rows, size), wanted, dtype)
                assert bool((buffer[: 41 - i] == 777).all())
                assert bool((buffer[41 - i + count :] == 777).all())


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("alpha", [0.25, torch.tensor([0.25, 0.5, 1.0])])
@pytest.mark.parametrize(
    ("own", "other", "dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ],
)
def test_maps_of_two_dtypes_give_the_promoted_one(name, alpha, own, other, dtype):
    foreground = torch.randn(3, 5).to(own).requires_grad_()
    background = torch.randn(3, 5).to(other).requires_grad_()
    with use_backend(name):
        out = blend(foreground, background, alpha)
    assert out.dtype == dtype
    weight = alpha if isinstance(alpha, float) else alpha[:, None].double()
    close(out, weight * foreground.double() + (1 - weight) * background.double(), dtype)
    out.sum().backward()
    assert (foreground.grad.dtype, background.grad.dtype) == (own, other)
    close(foreground.grad, torch.ones(3, 5).double() * weight, own)


X = torch.zeros(3, 4)
WRONG = [
    ((X.int(), X), {}, TypeError, "foreground must have dtype float32.*but has torch.int32"),
    (([1.0], X), {}, TypeError, "foreground must be a tensor, but got list"),
    ((torch.tensor(1.0), X), {}, ValueError, r"foreground must have shape \[B, \*S\], but has \[\]"),
    ((X, torch.zeros(3, 5)), {}, ValueError, r"background must have shape \['N', 4\], but has \[3, 5\]"),
    (
        (X, torch.zeros(2, 4)),
        {},
        ValueError,
        "background must have foreground's 3 rows when no index.*but has 2",
    ),
    ((X, X), {"index": [0, 1, 2]}, TypeError, "index must be a tensor, but got list"),
    ((X, X), {"index": torch.zeros(3)}, TypeError, "index must have dtype int64, but has torch.float32"),
    ((X, X), {"index": torch.zeros(2, dtype=torch.int64)}, ValueError, r"index must have shape \[3\], but has \[2\]"),
    ((X, X), {"index": torch.tensor([0, 3, 1])}, ValueError, r"index must be in \[0, 3\).*index\[1\] is 3"),
    ((X, X), {"index": torch.tensor([0, 1, -1])}, ValueError, r"index\[2\] is -1"),
    ((X, X, 1.5), {}, ValueError, "alpha must be at least 0 and at most 1, not 1.5"),
    ((X, X, "x"), {}, TypeError, "alpha must be a number, not str"),
    ((X, X, None), {}, TypeError, "alpha must be a number, not NoneType"),
    ((X, X, float("nan")), {}, ValueError, "alpha must be at least 0 and at most 1, not nan"),
    ((X, X, torch.zeros(2)), {}, ValueError, r"alpha must have shape \[3\] or \[\], but has \[2\]"),
    ((X, X, torch.zeros(3, dtype=torch.int64)), {}, TypeError, "alpha must have dtype float32.*but has torch.int64"),
    ((X, X, torch.tensor([0.0, 2.0, 1.0])), {}, ValueError, r"alpha must be in \[0, 1\]; alpha\[1\] is 2"),
    ((X, X, torch.tensor([0.0, 1.0, float("nan")])), {}, ValueError, r"alpha\[2\] is -?nan"),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("arguments", "options", "error", "message"), WRONG)
def test_wrong_arguments(name: str, arguments: tuple, options: dict, error: type, message: str) -> None:
    with using(name), pytest.raises(error, match=message):
        blend(*arguments, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_cuda_core_without_a_driver_says_so() -> None:
    core = pytest.importorskip("fedkern._cuda", reason="fedkern._cuda is not built")
    backend._show_tensors(core, "_cuda")
    with pytest.raises(RuntimeError, match=r"fedkern\._cuda needs an NVIDIA GPU and its driver"):
        core.blend_forward(torch.ones(1, 4), torch.ones(1, 4), None, None, 0.5, torch.empty(1, 4), 0)
