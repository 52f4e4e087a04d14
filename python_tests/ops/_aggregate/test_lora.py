"""Tests of lora_merge beside the dense mean of products and its SVD, and beside peft."""

import re

import pytest
import torch
from torch import nn

from fedkern import ops

OUT, IN, RANKS, WEIGHTS, SCALES = 7, 5, (2, 1, 3), [3.0, 1.0, 2.0], [2.0, 0.5, 1.0]


def draw(ranks=RANKS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = [(torch.randn(r, IN, generator=generator), torch.randn(OUT, r, generator=generator)) for r in ranks]
    return [(a.to(dtype), b.to(dtype)) for a, b in normal]


def mean_product(pairs, weights=WEIGHTS, scales=SCALES):
    entries = zip(pairs, weights, scales, strict=True)
    return sum(w / sum(weights) * s * b.double() @ a.double() for (a, b), w, s in entries)


def test_without_a_rank_the_product_is_the_mean():
    pairs = draw()
    a, b, error = ops.lora_merge(pairs, WEIGHTS, SCALES)
    assert torch.equal(a, torch.cat([a for a, _ in pairs]))
    torch.testing.assert_close(b.double() @ a.double(), mean_product(pairs), rtol=1e-6, atol=1e-6)
    assert 0 < error < 1e-7
    wide = draw(dtype=torch.float64)
    assert ops.lora_merge(wide, torch.tensor(WEIGHTS), tuple(SCALES))[2] < 1e-15


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_with_a_rank_the_product_is_the_nearest(rank):
    pairs = draw(dtype=torch.float64)
    a, b, error = ops.lora_merge(pairs, WEIGHTS, SCALES, rank)
    mean = mean_product(pairs)
    u, values, v = torch.linalg.svd(mean)
    assert (a.shape, b.shape) == ((rank, IN), (OUT, rank))
    torch.testing.assert_close(b @ a, u[:, :rank] * values[:rank] @ v[:rank])
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()))
    for side in (b, a.T):
        torch.testing.assert_close(side.T @ side, values[:rank].diag())
    assert (b.gather(0, b.abs().argmax(0)[None]) > 0).all()
    single, _, rounded = ops.lora_merge([(a.float(), b.float()) for a, b in pairs], WEIGHTS, SCALES, rank)
    torch.testing.assert_close(single, a.float())
    assert rounded == pytest.approx(error, rel=1e-5)


def test_beyond_the_rank_of_the_mean_are_zeros():
    a, b, error = ops.lora_merge(draw((1, 1)), [1, 1], [1, 1], 9)
    assert (a.shape, b.shape) == ((9, IN), (OUT, 9))
    assert not a[2:].any()
    assert not b[:, 2:].any()
    assert error < 1e-7
    zero = [(a, 0 * b) for a, b in draw()]
    a, b, error = ops.lora_merge(zero, WEIGHTS, SCALES, 2)
    assert (float(a.abs().sum()), float(b.abs().sum()), error) == (0, 0, 0)


def test_a_client_of_weight_zero_is_left_out():
    pairs = draw()
    found, expected = ops.lora_merge(pairs, [3, 0, 2], SCALES), ops.lora_merge(pairs[::2], [3, 2], SCALES[::2])
    assert all(torch.equal(x, y) for x, y in zip(found[:2], expected[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_adapters_with_any_strides(dtype):
    pairs = [(a.T.contiguous().T, b.T.contiguous().T) for a, b in draw(dtype=dtype)]
    a, b, error = ops.lora_merge(pairs, WEIGHTS, SCALES, 4)
    assert a.dtype == b.dtype == dtype
    mean = mean_product(pairs)
    assert error == pytest.approx(float((b.double() @ a.double() - mean).norm() / mean.norm()))


A, B = draw((2,))[0]


@pytest.mark.parametrize(
    ("pairs", "weights", "scales", "rank", "text"),
    [
        ([], [], [], None, "pairs must be a list of at least one pair of tensors (A [r, in], B [out, r])"),
        ([(A, 1.0)], [1], [1], None, "pairs[0][1] must be a tensor, but got float"),
        ([(B, A)], [1], [1], None, "with the in and out of pairs[0], but has [7, 2] and [2, 5]"),
        ([(A[:0], B[:, :0])], [1], [1], None, "pairs[0] must have shapes"),
        ([(A, B), (A, B[1:])], [1, 1], [1, 1], None, "pairs[1] must have shapes [r, in] and [out, r], with the in and"),
        ([(A, B), (A, B.double())], [1, 1], [1, 1], None, "pairs[1][1] must have dtype torch.float32 like pairs[0][0]"),
        ([(A, B / 0)], [1], [1], None, "pairs[0][1] must be finite, but holds NaN or infinite values"),
        ([(A, B.clone().requires_grad_())], [1], [1], None, "lora_merge has no gradient"),
        ([(A, B)], [1, 1], [1], None, "weights must have one value for each"),
        ([(A, B)], [1], 2.0, None, "scales must be a list of 1 numbers, one for each pair, not 2.0"),
        ([(A, B)], [1], [-1], None, "scales[0] must be at least 0, not -1"),
        ([(A, B)], [1], [1], 0, "rank must be at least 1, not 0"),
    ],
)
def test_refusals(pairs, weights, scales, rank, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        ops.lora_merge(pairs, weights, scales, rank)


@pytest.mark.parametrize("rank", [None, 5])
def test_peft_loads_the_result_with_alpha_equal_to_r(rank):
    """The layer of the merged adapter answers as the clients' layers do on average."""
    peft = pytest.importorskip("peft", reason="needs the extra [foundation]")
    base = nn.Sequential(nn.Linear(IN, OUT))
    x, answers, pairs, scales = torch.randn(4, IN), [], [], []

    def adapt(**settings):
        copied = nn.Sequential(nn.Linear(IN, OUT))
        copied.load_state_dict(base.state_dict())
        return peft.get_peft_model(copied, peft.LoraConfig(target_modules=["0"], **settings))

    for (a, b), alpha, root in zip(draw(), (4, 3, 8), (False, True, True), strict=True):
        model = adapt(r=len(a), lora_alpha=alpha, use_rslora=root)
        state = {"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}
        assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
        answers.append(model(x))
        pairs.append((a, b))
        scales.append(alpha / len(a) ** (0.5 if root else 1))
    a, b, error = ops.lora_merge(pairs, WEIGHTS, scales, rank)
    merged = adapt(r=len(a), lora_alpha=len(a))
    peft.set_peft_model_state_dict(
        merged, {"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}
    )
    expected = sum(w * y for w, y in zip(WEIGHTS, answers, strict=True)) / sum(WEIGHTS)
    torch.testing.assert_close(merged(x), expected)
    assert error < 1e-6
    assert (merged(x) - base(x)).abs().max() > 0.5
