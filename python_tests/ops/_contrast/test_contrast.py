"""Tests of contrastive: its ways for large calls beside the float64 reference, and guarantees for its callers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedkern import ops
from fedkern.ops._contrast.reference import contrastive_reference
from fedkern.ops._core import backend as backends
from python_tests.ops import differential
from python_tests.ops._contrast.contrast_cases import choose, embeddings
from python_tests.ops.operator_cases import KERNELS, using
from python_tests.ops.operator_runs import Calls


def leaves(pairs: int, size: int, dtype: torch.dtype = torch.float32, length: float = 1.0) -> tuple[Tensor, Tensor]:
    x, y = embeddings(pairs, size, length)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def test_the_reference_is_cross_entropy_both_ways() -> None:
    x, y = leaves(7, 5, torch.float64)
    similarities, own = x @ y.T / 0.3, torch.arange(7)
    expected = cross_entropy(similarities, own) + cross_entropy(similarities.T, own)
    torch.testing.assert_close(contrastive_reference(x, y, 0.3), expected)


@pytest.mark.parametrize("way", ["tiles", "onednn"])
@pytest.mark.parametrize("name", KERNELS)
def test_ways_of_large_calls_agree_with_the_reference(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    with using(name):
        differential.agree("contrastive", 60)


@pytest.mark.parametrize(("way", "temperature"), [("held", 1.0), ("tiles", "tensor"), ("held", 0.01)])
@pytest.mark.parametrize("name", KERNELS)
def test_more_than_a_chunk(name: str, way: str, temperature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The case has several chunks of rows and strips of columns, and softmaxes of one exponential and of two."""
    choose(way, monkeypatch)
    numbers = {"shape": [1061, 9], "dtype": "float32", "values": "normal", "layout": "contiguous", "grad": True}
    case = {**{axis: {**numbers, "seed": seed} for seed, axis in enumerate("xy")}, "temperature": temperature}
    with using(name):
        differential.check("contrastive", {**case, "_learnt": True})


def test_no_worse_than_eager() -> None:
    """Over a few batches the errors of loss and gradients against float64 are at most eager's."""
    worst = {"ours": torch.zeros(3, dtype=torch.float64), "eager": torch.zeros(3, dtype=torch.float64)}
    for seed in range(4):
        exact = [t.requires_grad_() for t in embeddings(200, 64, 2.0, seed)]
        given = [t.detach().float() for t in exact]
        exact = [t.double().requires_grad_() for t in given]
        loss = contrastive_reference(*exact, 0.05)
        expected = (loss, *torch.autograd.grad(loss, exact))
        for name, call in (("ours", ops.contrastive), ("eager", contrastive_reference)):
            inputs = [t.clone().requires_grad_() for t in given]
            value = call(*inputs, 0.05)
            got = (value, *torch.autograd.grad(value, inputs))
            errors = [(a.double() - b).square().mean() for a, b in zip(got, expected, strict=True)]
            worst[name] += torch.stack(errors)
    assert (worst["ours"] <= 1.1 * worst["eager"] + 1e-14).all(), worst


@pytest.mark.parametrize("way", ["held", "tiles"])
def test_extreme_similarities(backend: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    x, y = leaves(40, 6, length=100.0)
    loss = ops.contrastive(x * 3, y, 1.0)  # up to ±3e4
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = contrastive_reference(exact[0] * 3, exact[1], 1.0)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(x.grad.double(), exact[0].grad, rtol=1e-2, atol=1.0)
    # One that overflows to -inf counts nothing.
    a = torch.tensor([[1e20, 0.0], [0.0, 1.0]], requires_grad=True)
    b = torch.tensor([[1e-20, 0.0], [-1e30, 1.0]], requires_grad=True)
    got = torch.autograd.grad(ops.contrastive(a, b, 0.5), (a, b))
    wanted = torch.autograd.grad(contrastive_reference(a, b, 0.5), (a, b))
    torch.testing.assert_close(ops.contrastive(a, b, 0.5), contrastive_reference(a, b, 0.5))
    torch.testing.assert_close(got, wanted)


def test_well_separated_pairs_have_no_negative_loss(backend: str) -> None:
    x = torch.eye(20) * 3
    assert ops.contrastive(x, x, 0.1).item() >= 0
    assert ops.contrastive(x, x, 0.01).item() == 0


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_large_is_kept(name: str) -> None:
    with using(name):
        loss = ops.contrastive(*leaves(70, 6))
    assert sum(t.numel() for t in loss.grad_fn.saved_tensors if t is not None) <= 4 * 70 * 6


def test_a_loss_scale_lifts_float16_gradients(backend: str) -> None:
    x, y = leaves(400 if backend != "triton" else 70, 4, torch.float16, 1e-3)
    (ops.contrastive(x, y, 100.0) * 4096.0).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    (contrastive_reference(*exact, 100.0) * 4096.0).backward()
    torch.testing.assert_close(x.grad.double(), exact[0].grad, rtol=2e-3, atol=1e-7)


def test_second_derivatives_in_a_dispatch_mode() -> None:
    """The eager path's gradients come from an operator of their own in such a mode."""
    x, y = leaves(5, 3, torch.float64)
    with Calls():
        assert torch.autograd.gradgradcheck(ops.contrastive, (x, y), fast_mode=True)


@pytest.mark.parametrize("name", KERNELS)
def test_the_core_gives_the_same_bits_for_any_thread_count(name: str) -> None:
    x, y = (t.detach() for t in leaves(700, 8))
    with using(name):
        core, results = backends.cpu_core(), []
        for threads in (1, 2, 5):
            for scale in (14.0, 200.0):  # one exponential, two
                tile, sums = x @ y.T, torch.empty(4, 700)
                loss = core.contrast_whole(x, y, tile, scale, 1.0, sums, threads)
                results.append((loss, tile, sums))
        for loss, tile, sums in results[2:]:
            matches = [r for r in results[:2] if r[0] == loss]
            assert matches
            assert torch.equal(tile, matches[0][1])
            assert torch.equal(sums, matches[0][2])


@pytest.mark.parametrize("way", ["held", "tiles"])
def test_a_default_device_changes_nothing(backend: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    x, y = leaves(9, 4)
    learnt = torch.tensor(0.3, requires_grad=True)
    expected = torch.autograd.grad(ops.contrastive(x, y, learnt), (x, y, learnt))
    with torch.device("meta"):
        got = torch.autograd.grad(ops.contrastive(x, y, learnt), (x, y, learnt))
    torch.testing.assert_close(got, expected)


X = torch.zeros(3, 2)
WRONG: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((X[0], X), ValueError, r"x must have shape \[B, D\].* but has \[2\]"),
    ((X, X[:2]), ValueError, r"y must have shape \[3, 2\] like x, row for row, but has \[2, 2\]"),
    ((X, X.to("meta")), ValueError, "y must be on cpu like x, but is on meta"),
    ((X, X, 0), ValueError, "temperature must be greater than 0, not 0"),
    ((X, X, -0.5), ValueError, "temperature must be greater than 0, not -0.5"),
    ((X, X, math.inf), ValueError, "temperature must be greater than 0, not inf"),
    ((X, X, True), TypeError, "temperature must be a number, not bool"),
    ((X, X, torch.ones(1)), ValueError, r"tensor without dimensions, but has shape \[1\]"),
    ((X, X, torch.tensor(1)), TypeError, "temperature must have dtype float32, .* but has torch.int64"),
    ((X, X, torch.tensor(-1.0)), ValueError, "temperature must be greater than 0, not -1"),
    ((X, X, torch.tensor(1.0, device="meta")), ValueError, "temperature must be on cpu like x, but is on meta"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.contrastive(*arguments)
