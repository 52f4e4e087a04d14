"""Cases and comparisons of the operator tests."""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern.ops._core import backend, loading

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OFFSETS = range(41)


def _isas() -> list[str]:
    try:
        return list(backend.cpu_core().available_isas())
    except loading.Unavailable:
        return []


def _triton() -> list[str]:
    try:
        loading.load_triton("_core.triton.launch")
    except loading.Unavailable:
        return []
    return ["triton"] if loading.is_interpreted() else []


KERNELS = [f"cpu-{isa}" for isa in _isas()]
BACKENDS = ["reference", *KERNELS, *_triton()]
needs_core = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")


# True while a test runs in Triton's interpreter, at some 100 µs for every operation of every program.
THIN = False
FEW, LARGEST = 2, 20_000


def few(cases: Sequence[Any], values: Callable[[Any], dict[str, Any]] = dict, count: int = FEW) -> list[Any]:
    """Return up to ``count`` of ``cases``, spread over them, none of more than about :data:`LARGEST` elements."""

    def elements(value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return math.prod(max(elements(v), 1) for v in value)
        return value if isinstance(value, int) else 1

    small = [case for case in cases if elements(list(values(case).values())) <= LARGEST] or cases[:1]
    if len(small) <= count:
        return list(small)
    # Not every n-th, which could meet one value of an axis each time.
    return random.Random(len(small)).sample(list(small), count)


def thin_out(cases: Sequence[Any]) -> list[Any]:
    """Return ``cases``, or :func:`few` of them where they are for Triton's interpreter."""
    if not THIN:
        return list(cases)
    return few(cases, lambda case: case if isinstance(case, dict) else {"": case}, 2 * FEW)


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Force a backend of :data:`BACKENDS`."""
    kind, _, isa = name.partition("-")
    with backend.use_backend(kind), backend.use_isa(isa) if isa else contextlib.nullcontext():
        yield


def move_to(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on ``device`` with its strides and alignment, which ``to`` would not keep."""
    if device.type == "cpu" or 0 in x.shape or any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
        return x.to(device)
    size = x.storage_offset() + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) + 1
    memory = torch.full((size,), 7, dtype=x.dtype, device=device)  # what lies between must not be read
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def lay_out_map(x: Tensor, layout: str) -> Tensor:
    """Return the same map with other strides, or at an odd address."""
    if layout == "channels_last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "crop" and x.dim() > 2:
        return torch.nn.functional.pad(x.double(), (1, 2)).to(x.dtype)[..., 1:-2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return x


def pairwise(axes: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return cases in which every value of every two axes meets at least once, in fixed order.

    :func:`thin_out` for Triton.
    """
    draw = random.Random(seed)
    names = list(axes)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    cases = []
    while open_pairs:
        best: list[int] = []
        gain = -1
        pair = min(open_pairs)
        for _ in range(20):
            case = [draw.randrange(len(axes[name])) for name in names]
            case[pair[0]], case[pair[2]] = pair[1], pair[3]
            found = sum((a, case[a], b, case[b]) in open_pairs for a, b in itertools.combinations(range(len(names)), 2))
            if found > gain:
                best, gain = case, found
        open_pairs -= {(a, best[a], b, best[b]) for a, b in itertools.combinations(range(len(names)), 2)}
        cases.append({name: axes[name][index] for name, index in zip(names, best, strict=True)})
    return thin_out(cases)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbours in ``dtype`` at ``value`` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def assert_close(name, got, expected, *, relative=1e-5, absolute=1e-6, slack=0.0):
    """Compare with a float64 result at the tolerance of ``got``'s dtype.

    float32: ``relative`` and ``absolute``; float64: the same at 1e-12; 16-bit: the rounded float64 result and one ulp
    (where float32 arithmetic, ``absolute`` in float64 terms, cannot resolve an ulp: that).
    """
    expected = expected.detach()
    dtype, got = got.dtype, got.detach().double()
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    equal = (got == expected) | (got.isnan() & expected.isnan())
    assert bool(equal[~finite].all()), f"{name}: {got[~finite]} instead of {expected[~finite]}"
    got, expected = got[finite], expected[finite]
    if dtype is torch.float32:
        allowed = relative * expected.abs() + absolute
    elif dtype is torch.float64:
        allowed = 1e-12 * expected.abs() + 1e-12 * max(1.0, absolute * 1e6)
    else:
        rounded = expected.to(dtype).double()
        allowed = (rounded - expected).abs() + ulp(expected, dtype)
        allowed = torch.where(rounded.isfinite(), torch.maximum(allowed, torch.tensor(absolute)), torch.inf)
    error = (got - expected).abs()
    bad = ~(error <= allowed + slack)
    if bad.any():
        worst = int((error / allowed).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} differ, worst {got[worst]:.9g} instead of {expected[worst]:.9g}"
        )
