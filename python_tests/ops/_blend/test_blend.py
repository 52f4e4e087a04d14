"""Tests of blend where random calls (test_differential.py) do not look closely enough."""

import itertools

import pytest
import torch
from torch import Tensor

from fedkern.ops import blend
from fedkern.ops._blend.blend import blend_reference
from fedkern.ops._core import backend
from python_tests.ops.operator_cases import BACKENDS, DTYPES, KERNELS, needs_core, using

pytestmark = pytest.mark.usefixtures("one_thread")


def close(given: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Compare at the project's tolerances: fp32 1e-5 relative + 1e-6 absolute.

    16 bits: the rounded result plus one ulp.
    """
    assert given.shape == exact.shape
    exact = exact.detach().double()
    error = (given.detach().double() - exact).abs()
    if dtype in (torch.float32, torch.float64):
        small = 1e-5 if dtype == torch.float32 else 1e-12
        bound = small * exact.abs() + small / 10
    else:
        info = torch.finfo(dtype)
        ulp = 2.0 ** exact.abs().clamp_min(info.tiny).log2().floor() * info.eps
        bound = 1.5 * ulp + 1e-6  # where terms cancel, fp32 arithmetic cannot resolve an ulp
    assert bool((error <= bound).all()), f"error {error.max():.3g} over bound by {(error - bound).max():.3g}"


def test_alpha_of_0_and_1_gives_the_maps_themselves(backend: str) -> None:
    foreground, background, index = torch.randn(3, 50), torch.randn(4, 50), torch.tensor([2, 0, 2])
    assert torch.equal(blend(foreground, background, 1.0, index=index), foreground)
    assert torch.equal(blend(foreground, background, 0.0, index=index), background[index])


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_past_the_cache_are_the_same(isa, dtype, cache_bytes):
    index = torch.tensor([4, 0, 4, 2, 1])
    for size in (12_001, 4_096, 37):
        maps, results = [torch.randn(5, size).to(dtype).requires_grad_() for _ in range(2)], []
        for limit in (1 << 40, -1):
            cache_bytes(limit)
            with using(isa):
                out = blend(*maps, 0.3, index=index)
                results.append([out, *torch.autograd.grad(out, maps, torch.ones_like(out).cumsum(1))])
        assert all(map(torch.equal, *results))


@needs_core
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
            out, own, back = (torch.full((count + 82,), 777.0, dtype=dtype) for _ in range(3))
            a, b, c = (t[i : i + count].view(rows, size) for t in (x, y, g))
            to, to_own, to_other = (t[41 - i :][:count].view(rows, size) for t in (out, own, back))
            assert core.blend_forward(a, b, index, None, 0.3, to, 1)
            assert core.blend_backward(c, None, None, index, None, 0.3, rows, to_own, to_other, None, None, None, 1)
            exact = 0.3 * a.double() + 0.7 * b.double()[index]
            wide = c.double()
            scattered = torch.zeros(rows, size, dtype=torch.float64).index_add(0, index, 0.7 * wide)
            for buffer, wanted in ((out, exact), (own, 0.3 * wide), (back, scattered)):
                close(buffer[41 - i :][:count].view(rows, size), wanted, dtype)
                assert bool((buffer[: 41 - i] == 777).all())
                assert bool((buffer[41 - i + count :] == 777).all())


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dims", [d for d in itertools.product((0, 1, None), repeat=4) if d != (None,) * 4])
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
    rows_of_batch = [[t[0] if d is None else t[v] for t, d in zip(full, dims, strict=True)] for v in range(count)]

    def ours(x: Tensor, y: Tensor, a: Tensor, i: Tensor) -> Tensor:
        return blend(x, y, a, index=i)

    out = torch.func.vmap(ours, dims)(*given)
    torch.testing.assert_close(out, torch.stack([blend_reference(*arguments) for arguments in rows_of_batch]))

    def loss(function: object, *arguments: Tensor) -> Tensor:
        return function(*arguments).pow(2).sum()  # type: ignore[operator]

    gradients = torch.func.vmap(torch.func.grad(lambda *a: loss(ours, *a), argnums=(0, 1, 2)), dims)(*given)
    wanted = [torch.func.grad(lambda *a: loss(blend_reference, *a), argnums=(0, 1, 2))(*e) for e in rows_of_batch]
    for k in range(3):
        torch.testing.assert_close(gradients[k], torch.stack([w[k] for w in wanted]))


def test_vmap_keeps_the_index_check() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    index = torch.tensor([[0, 1, 2], [0, 3, 1]])  # 3 would be another entry's row 0
    with pytest.raises(ValueError, match="index must be in"):
        torch.func.vmap(lambda x, y, i: blend(x, y, 0.5, index=i))(x, y, index.flip(0))


def test_changing_a_saved_tensor_raises() -> None:
    index = torch.tensor([4, 4, 0])
    out = blend(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.rand(3), index=index)
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


X = torch.zeros(3, 4)
WRONG = [
    ((torch.tensor(1.0), X), {}, ValueError, r"foreground must have shape \[B, \*S\], but has \[\]"),
    ((X, torch.zeros(3, 5)), {}, ValueError, r"background must have shape \['N', 4\], but has \[3, 5\]"),
    ((X, torch.zeros(2, 4)), {}, ValueError, "background must have foreground's 3 rows when no index.*but has 2"),
    ((X, X), {"index": torch.zeros(2, dtype=torch.int64)}, ValueError, r"index must have shape \[3\], but has \[2\]"),
    ((X, X), {"index": torch.tensor([0, 3, 1])}, ValueError, r"index must be in \[0, 3\).*index\[1\] is 3"),
    ((X, X), {"index": torch.tensor([0, 1, -1])}, ValueError, r"index\[2\] is -1"),
    ((X, X, 1.5), {}, ValueError, "alpha must be at least 0 and at most 1, not 1.5"),
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
