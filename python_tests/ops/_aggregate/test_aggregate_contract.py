"""What the aggregate operators without a gradient refuse, and how they behave under torch.compile and torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkern.ops import (
    clip_and_noise,
    clip_by_norm,
    geometric_median,
    krum,
    median,
    pairwise_distances,
    server_step,
    trimmed_mean,
)
from python_tests.ops.operator_cases import BACKENDS, using

V = [torch.ones(4), torch.zeros(4), torch.ones(4)]
G = torch.ones(4)

CALLS: dict[str, Callable[..., Any]] = {
    "trimmed_mean": lambda v: trimmed_mean(v, 1),
    "weighted trimmed_mean": lambda v: trimmed_mean(v, 1, [1.0, 2.0, 3.0, 4.0, 5.0]),
    "median": median,
    "weighted median": lambda v: median(v, torch.arange(1.0, 6.0)),
    "pairwise_distances": pairwise_distances,
    "krum": lambda v: krum(v, 1, 2),
    "geometric_median": lambda v: geometric_median(v, [1.0, 2.0, 3.0, 4.0, 5.0]),
    "clip_by_norm": lambda v: clip_by_norm(v, 1.5),
    "clip_and_noise": lambda v: clip_and_noise(v, 1.5, 0.1, (1 << 64) - 1, (1 << 63) + 5),
    "server_step": lambda v: server_step(v[0] * 0, v, [1.0, 2.0, 3.0, 4.0, 5.0]),
}

WRONG_VECTORS = [
    ([], ValueError, "vectors must hold at least one tensor"),
    (torch.ones(2, 4).int(), TypeError, "vectors must have dtype float32.*but has torch.int32"),
    (torch.ones(2, 4, 1), ValueError, r"vectors must have shape \[.*but has \[2, 4, 1\]"),
    ([*V, torch.ones(5)], ValueError, r"vectors\[3\] must have the shape \[4\] of vectors\[0\], but has \[5\]"),
    ([*V, G.double()], TypeError, r"vectors\[3\] must have the dtype torch.float32 of vectors\[0\]"),
    ([*V, [1.0]], TypeError, r"vectors\[3\] must be a tensor, but got list"),
]


@pytest.mark.parametrize("name", CALLS)
def test_wrong_vectors(name: str) -> None:
    for vectors, error, message in WRONG_VECTORS:
        if name == "server_step":
            with pytest.raises(error, match=message):
                server_step(G, vectors, [1.0])
        else:
            with pytest.raises(error, match=message):
                CALLS[name](vectors)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: trimmed_mean(V, 2), ValueError, "trim must be less than half of the number of vectors, 3, not 2"),
    (lambda: trimmed_mean(V, -1), ValueError, "trim must be at least 0, not -1"),
    (lambda: trimmed_mean(V, 0.5), TypeError, "trim must be a whole number, not float"),  # type: ignore[arg-type]
    (lambda: trimmed_mean(V, 1, [1, 2]), ValueError, "weights must have one value for each of the 3 vectors, not 2"),
    (lambda: median(V, [1, -1, 1]), ValueError, r"weights\[1\] must be finite and not negative, not -1"),
    (lambda: median(V, torch.zeros(3)), ValueError, "weights must have a positive, finite sum, not 0"),
    (lambda: median(V, torch.ones(2)), ValueError, r"weights must have shape \[3\], but has \[2\]"),
    (lambda: krum(V, 1), ValueError, r"byzantine must be less than \(M - 2\) / 2 with M = 3 vectors, not 1"),
    (lambda: krum(V, 0, 4), ValueError, "keep must be between 1 and 3, not 4"),
    (lambda: krum(V, True), TypeError, "byzantine must be a whole number, not bool"),
    (lambda: geometric_median(V, iterations=-1), ValueError, "iterations must be at least 0, not -1"),
    (lambda: geometric_median(V, tolerance=-1.0), ValueError, "tolerance must be at least 0, not -1"),
    (lambda: geometric_median(V, smoothing=0.0), ValueError, "smoothing must be greater than 0, not 0"),
    (lambda: geometric_median(V, [0, 0, 0]), ValueError, "weights must have a positive, finite sum, not 0"),
    (lambda: clip_by_norm(V, 0.0), ValueError, "max_norm must be greater than 0, not 0"),
    (lambda: clip_by_norm(V, math.inf), ValueError, "max_norm must be greater than 0, not inf"),
    (lambda: clip_by_norm(V, "1"), TypeError, "max_norm must be a number, not str"),  # type: ignore[arg-type]
    (lambda: clip_and_noise(V, 1.0, -1.0, 0), ValueError, "noise must be at least 0, not -1"),
    (lambda: clip_and_noise(V, 1.0, math.nan, 0), ValueError, "noise must be at least 0, not nan"),
    (lambda: clip_and_noise(V, 1.0, 1.0, -1), ValueError, f"seed must be between 0 and {2**64 - 1}, not -1"),
    (lambda: clip_and_noise(V, 1.0, 1.0, 0, 1 << 64), ValueError, "offset must be between 0 and"),
    (lambda: clip_and_noise(V, 1.0, 1.0, 1.5), TypeError, "seed must be a whole number, not float"),  # type: ignore[arg-type]
    (lambda: server_step(G, V, [1, 1, 1], "sgd"), ValueError, "rule must be one of mean, momentum, adam.*not 'sgd'"),
    (lambda: server_step(torch.ones(5), V, [1, 1, 1]), ValueError, r"global_ must have shape \[4\], but has \[5\]"),
    (
        lambda: server_step(G.double(), V, [1, 1, 1]),
        ValueError,
        "global_ must have the dtype torch.float32 of the vectors, but has torch.float64",
    ),
    (lambda: server_step(G, V, [1, 1, 1], "adam"), ValueError, 'first must be given for rule "adam"'),
    (lambda: server_step(G, V, [1, 1, 1], "yogi", first=G), ValueError, 'second must be given for rule "yogi"'),
    (lambda: server_step(G, V, [1, 1, 1], first=G), ValueError, 'first must be None for rule "mean"'),
    (
        lambda: server_step(G, V, [1, 1, 1], "momentum", first=G, second=G),
        ValueError,
        'second must be None for rule "momentum"',
    ),
    (
        lambda: server_step(G, V, [1, 1, 1], "adam", first=G, second=G.double()),
        TypeError,
        "second must have the dtype torch.float32 of first, but has torch.float64",
    ),
    (
        lambda: server_step(G, V, [1, 1, 1], "momentum", first=G.half()),
        TypeError,
        "first must have dtype float32 or float64, but has torch.float16",
    ),
    (
        lambda: server_step(G, V, [1, 1, 1], "momentum", first=torch.ones(8)[::2]),
        ValueError,
        "first must be contiguous",
    ),
    (
        lambda: server_step(G, V, [1, 1, 1], "momentum", first=G, beta1=1.5),
        ValueError,
        "beta1 must be at least 0 and at most 1, not 1.5",
    ),
    (
        lambda: server_step(G, V, [1, 1, 1], learning_rate=-1.0),
        ValueError,
        "learning_rate must be at least 0, not -1",
    ),
    (lambda: server_step(G, V, [1, 1, 1], similarities=1), TypeError, "similarities must be True or False, not int"),
    (lambda: server_step(G, V, [1, 1, 1], out=torch.ones(5)), ValueError, r"out must have shape \[4\], but has \[5\]"),
    (lambda: server_step(G, V, [1, 1, 1], out=torch.ones(1).expand(4)), ValueError, "out must not be expanded"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def five() -> Tensor:
    return torch.randn(5, 33, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_refused(name: str) -> None:
    vectors = five().requires_grad_()
    for given in (vectors, list(vectors.detach().unbind())):
        if isinstance(given, list):
            given[3].requires_grad_()
        with pytest.raises(ValueError, match="has no gradient; call it under"):
            CALLS[name](given)
        with torch.no_grad():
            CALLS[name](given)
    with pytest.raises(ValueError, match="has no gradient"):
        torch.func.grad(lambda v: sum(t.sum() for t in leaves(CALLS[name](v))))(five())


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"torch.func.vmap over .* is not supported"):
        torch.func.vmap(lambda v: leaves(CALLS[name](v))[0])(torch.stack([five(), five()]))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CALLS)
def test_compile_is_one_node(name: str) -> None:
    nodes: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if "fedkern" in str(node.target))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=count)
    for given in (five(), list(five().unbind())):
        nodes.clear()
        for got, wanted in zip(leaves(compiled(given)), leaves(CALLS[name](given)), strict=True):
            assert torch.equal(got, wanted)
        assert len(nodes) == 1


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.exhaustive
def test_opcheck() -> None:
    rows, weights = list(five().unbind()), torch.arange(1.0, 6.0)
    ops = torch.ops.fedkern
    for operator, arguments in (
        (ops.sorted_mean, (rows, 1, 4, None)),
        (ops.sorted_mean, (rows, 1, 4, weights)),
        (ops.weighted_median, (rows, weights)),
        (ops.pairwise_distances, (rows,)),
        (ops.krum, (rows, 1, 2)),
        (ops.geometric_median, (rows, weights, 10, 1e-6, 1e-6)),
        (ops.clip_and_noise, (rows, doubles(1.0, 0.5), 3, 4)),
        (ops.server_step, (rows[0] * 0, rows, weights, 0, doubles(1.0, 0.0, 0.0, 0.0), None, None, None, False)),
        (
            ops.server_step,
            (rows[0], rows, weights, 2, doubles(0.1, 0.9, 0.99, 1e-9), rows[1] * 0, rows[1] * 0, torch.float64, True),
        ),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_compiled_server_step_updates_its_states() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda g, v, m, s: server_step(g, v, [1, 2, 3, 4, 5], "adam", first=m, second=s),
        fullgraph=True,
        backend="aot_eager",
    )
    one, two = [[torch.zeros(33), torch.zeros(33)] for _ in range(2)]
    for _ in range(2):
        given = compiled(torch.ones(33), five(), *one)
        wanted = server_step(torch.ones(33), five(), [1, 2, 3, 4, 5], "adam", first=two[0], second=two[1])
    assert all(map(torch.equal, given, wanted))
    assert all(map(torch.equal, one, two))


def test_under_inference_mode_and_for_negated_views() -> None:
    with torch.inference_mode():
        states = [torch.zeros(33), torch.zeros(33)]
        server_step(torch.zeros(33), five(), [1] * 5, "adam", first=states[0], second=states[1], out=torch.zeros(33))
        assert states[0].any()
    rows = list(five().unbind())
    for call in (median, pairwise_distances, lambda v: clip_by_norm(v, 1.0)):
        given = [torch._neg_view(-row) for row in rows]
        for got, wanted in zip(leaves(call(given)), leaves(call(rows)), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_inputs_are_left_alone(name: str) -> None:
    vectors = five()
    before = vectors.clone()
    with using(name):
        try:
            for call in CALLS.values():
                call(vectors)
        except RuntimeError as error:
            if "does not implement" not in str(error):
                raise
            pytest.skip(str(error))
    assert torch.equal(vectors, before)
    assert vectors._version == 0


def test_whole_numbers_may_be_numpys() -> None:
    assert torch.equal(trimmed_mean(V, np.int64(1)), trimmed_mean(V, 1))  # type: ignore[arg-type]
