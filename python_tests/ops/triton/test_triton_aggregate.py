"""The aggregate kernels in Triton's interpreter against plain PyTorch, method by method.

The operators' own tests reach most of them; here also what they do only on a GPU (weights in memory), and with more
vectors than a launch takes.
"""

import math
import sys

import pytest
import torch
from torch import Tensor

from fedkern.ops._aggregate.plain import PLAIN
from python_tests.ops.operator_cases import BACKENDS, DTYPES, pairwise

if "triton" not in BACKENDS:
    pytest.skip("Triton's interpreter is not there", allow_module_level=True)

from fedkern.ops._aggregate.triton import aggregate as triton_aggregate
from fedkern.ops._aggregate.triton.aggregate import TritonAggregate
from fedkern.ops._aggregate.triton.means import encoded
from fedkern.ops._core.triton.offsets import MARK, whole

KERNEL = TritonAggregate()
COUNTS = (1, 2, 3, 8, 11)
SIZES = (0, 1, 17, 1100)
FORMS = ("list", "stack", "strided", "mixed")


def make(count: int, size: int, dtype: torch.dtype, form: str) -> Tensor | list[Tensor]:
    values = torch.randn(count, size).to(dtype)
    if form == "stack":
        return values
    if form == "strided":
        return torch.stack([values, values], 2)[..., 0]
    rows = [row.clone() for row in values]
    if form == "mixed":
        rows[0] = torch.stack([rows[0], rows[0]], 1)[:, 1]
    return rows


def same(got: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """As aggregate's tolerance: 1e-6 in fp32, 1e-12 in fp64, a unit in the last place below."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype in (torch.bfloat16, torch.float16):
        relative = torch.finfo(got.dtype).eps
    elif got.dtype is torch.float64:
        relative *= 1e-6
    torch.testing.assert_close(got, expected, rtol=relative, atol=relative, equal_nan=True)


def test_weights_keep_all_bits() -> None:
    """On their way through codes that are odd and need 64 bits, for which one kernel stands."""
    tiny, least = 5e-324, sys.float_info.min
    weights = [0.0, 1.0, 2.0, 64.0, 0.1, 1 / 3, tiny, 3 * tiny, least / 2, least, math.pi * 1e300, sys.float_info.max]
    for weight in weights:
        code = encoded(weight)
        assert code % 2
        assert -(1 << 63) <= code < 1 << 63
        assert weight == least / 2 or not -(1 << 31) <= code < 1 << 31
        vectors = torch.tensor([[weight], [0.0]], dtype=torch.float64)
        # (w w + 1 * 0) / (w + 1), with the same roundings
        got = KERNEL.weighted_mean(list(vectors), [weight, 1.0], None)
        assert torch.equal(got, (vectors[0] * weight) / (weight + 1))


@pytest.mark.parametrize("number", [0, 1, -1, 15, 16, -16, 2**31, -(2**31) - 1, 2**46, -(2**46)])
def test_places_keep_all_bits(number: int) -> None:
    code = whole(number)
    assert code % 2
    assert not -(1 << 31) <= code < 1 << 31
    assert -(1 << 63) <= code < 1 << 63
    assert (code ^ MARK.value) >> 1 == number


@pytest.mark.parametrize("how", ["strided", "expanded", "negated"])
def test_weights_in_memory_of_any_strides(how: str) -> None:
    for count in (5, 70):  # in one launch, in two
        vectors = torch.randn(count, 33)
        values = torch.arange(1.0, count + 1)
        weights = {
            "strided": values.repeat_interleave(2)[::2],
            "expanded": torch.full((1,), 3.0).expand(count),
            "negated": torch.complex(values, -values).conj().imag,
        }[how]
        numbers = weights.tolist()
        assert weights.is_neg() or not weights.is_contiguous()
        got = KERNEL.weighted_mean(vectors, weights, None)
        assert torch.equal(got, PLAIN.weighted_mean(vectors, numbers, None))


@pytest.mark.parametrize("device_weights", [False, True])
def test_weighted_mean(device_weights: bool) -> None:
    for case in pairwise({"count": COUNTS, "size": SIZES, "dtype": DTYPES, "form": FORMS}, seed=1):
        vectors, weights = make(**case), [float(m % 3) for m in range(1, case["count"] + 1)]
        given = torch.tensor(weights) if device_weights else weights
        assert torch.equal(
            KERNEL.weighted_mean(vectors, given, None).isnan(), PLAIN.weighted_mean(vectors, weights, None).isnan()
        )
        same(KERNEL.weighted_mean(vectors, given, None), PLAIN.weighted_mean(vectors, weights, None))


def test_weighted_mean_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_aggregate, "MEMBERS", 4)
    monkeypatch.setattr(triton_aggregate, "UNROLLED", 2)
    for count in (4, 5, 8, 10):
        vectors, weights = make(count, 1500, torch.float32, "list"), [0.1 * m for m in range(count)]
        assert torch.equal(KERNEL.weighted_mean(vectors, weights, None), PLAIN.weighted_mean(vectors, weights, None))


def test_weights_of_sum_zero_give_nan() -> None:
    vectors = make(3, 17, torch.float32, "stack")
    assert KERNEL.weighted_mean(vectors, torch.zeros(3), None).isnan().all()
    assert KERNEL.weighted_mean(list(vectors), torch.zeros(3), None).isnan().all()
